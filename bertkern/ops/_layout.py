"""Attention's layouts: [B, S, H, D], heads first [B, H, S, D], and [T, H, D] of a variable-length
batch. Heads first is a way to name the dimensions: in memory what the ops return is [B, S, H, D] in
both.
"""

import torch
from torch import Tensor


def sizes(t: Tensor, heads_first: bool) -> tuple[int, int, int, int]:
    """(B, S, H, D); (T, T, H, D) of a variable-length batch."""
    if t.dim() == 3:
        tokens, heads, head_dim = t.shape
        return tokens, tokens, heads, head_dim
    if heads_first:
        batch, heads, sequence, head_dim = t.shape
    else:
        batch, sequence, heads, head_dim = t.shape
    return batch, sequence, heads, head_dim


def strides(t: Tensor, heads_first: bool) -> tuple[int, int, int]:
    """(batch, sequence, head); (0, token, head) of a variable-length batch."""
    if t.dim() == 3:
        return 0, t.stride(0), t.stride(1)
    batch, first, second, _ = t.stride()
    return (batch, second, first) if heads_first else (batch, first, second)


def lse_shape(q: Tensor, heads_first: bool) -> tuple[int, ...]:
    """[B, H, Sq]; [H, Tq] of a variable-length batch."""
    batch, queries, heads, _ = sizes(q, heads_first)
    return (heads, queries) if q.dim() == 3 else (batch, heads, queries)


def empty_like(t: Tensor, heads_first: bool) -> Tensor:
    """A tensor of t's sizes whose memory is a contiguous [B, S, H, D] or [T, H, D].

    Not a view of such a tensor: autograd lets nobody change a view that a node returned.
    """
    if not heads_first:
        return t.new_empty(t.shape)
    return torch.empty_strided(t.shape, heads_first_strides(t), dtype=t.dtype, device=t.device)


def heads_first_strides(t: Tensor) -> tuple[int, int, int, int]:
    """Of a tensor of t's sizes [B, H, S, D] whose memory is a contiguous [B, S, H, D]."""
    _, heads, sequence, head_dim = t.shape
    token = heads * head_dim
    return sequence * token, head_dim, token, 1
