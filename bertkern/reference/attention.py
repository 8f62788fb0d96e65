"""Attention: out = dropout(softmax(scale · q kᵀ)) v        (Vaswani et al. 2017, section 3.2)

B batch, S sequence, T total tokens, H heads, D head dim. Two layouts: batched q [B, Sq, H, D] with
k and v [B, Sk, H, D], keys optionally cut at key_lengths [B]; and variable-length q [Tq, H, D] with
k and v [Tk, H, D], sequences delimited by cu_seqlens [B + 1].

    s = scale · q kᵀ,  lse = log Σ exp(s),  p = exp(s − lse),  out = (p · mask) v
    backward:  dv = (p · mask)ᵀ dout,  dp = dout vᵀ · mask,  ds = p · (dp − delta),  dq = scale · ds
    k, dk = scale · dsᵀ q,  delta = Σ_D dout · out − dlse

Query i sees key j when j < len_k and, CAUSAL_BOTTOM_RIGHT: j ≤ i + Sk − Sq (batched layout: of the
whole matrix, so that key_lengths mean padding and nothing else) or j ≤ i + len_k − len_q (variable
lengths);
CAUSAL_TOP_LEFT: j ≤ i. A query that sees nothing gives out 0, lse −inf and no gradient.
"""

import torch
from torch import Tensor

from .dropout import random_bits, threshold_and_scale
from .layer_norm import statistics_dtype

CAUSAL_NONE, CAUSAL_BOTTOM_RIGHT, CAUSAL_TOP_LEFT = 0, 1, 2


def _sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
) -> list[tuple[int, int, slice, slice]]:
    """(first, last + 1, queries, keys) of each group of sequences that can be computed together.

    In the batched layout the slices run over S within sequences first..last; in the variable-length
    layout they run over T and a group is one sequence.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        return [
            (i, i + 1, slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]))
            for i in range(len(starts_q) - 1)
        ]
    queries = slice(0, q.shape[1])
    if key_lengths is None:
        return [(0, q.shape[0], queries, slice(0, k.shape[1]))]
    return [(i, i + 1, queries, slice(0, n)) for i, n in enumerate(key_lengths.tolist())]


def _batched(part: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, H, D] or [B, S, H, D] -> [B, S, H, D] in `dtype`."""
    return (part[None] if part.dim() == 3 else part).to(dtype)


def _diagonal(causal: int, len_q: int, len_k: int) -> int | None:
    """Query i sees keys j ≤ i + diagonal; None: all."""
    return {CAUSAL_BOTTOM_RIGHT: len_k - len_q, CAUSAL_TOP_LEFT: 0}.get(causal)


def _probabilities(
    q: Tensor, k: Tensor, diagonal: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(p [B, H, Sq, Sk], lse [B, H, Sq]) of q [B, Sq, H, D], k [B, Sk, H, D]; empty rows: p 0, lse
    −inf."""
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if diagonal is not None:
        allowed = allowed.tril(diagonal)
    s = s.masked_fill(~allowed, float("-inf"))
    empty = ~allowed.any(-1)  # [Sq]: −inf − (−inf) would be NaN in these rows
    s = s.masked_fill(empty[:, None], 0.0)
    p = torch.softmax(s, -1).masked_fill(~allowed, 0.0)
    lse = torch.logsumexp(s, -1) if k.shape[1] else s.sum(-1)
    return p, lse.masked_fill(empty, float("-inf"))


def _dropout_mask(
    p: Tensor, first: int, dropout_p: float, seed: Tensor | None, sequence_offset: int
) -> Tensor | None:
    """The factor, 0 or scale, on each probability of p [B, H, Sq, Sk]; sequences count from
    `first`."""
    if seed is None:
        return None

    def coordinate(dim: int, start: int = 0) -> Tensor:
        index = torch.arange(start, start + p.shape[dim], device=p.device)
        return index.reshape([-1 if d == dim else 1 for d in range(4)])

    threshold, scale = threshold_and_scale(dropout_p)
    bits = random_bits(
        seed, coordinate(0, first + sequence_offset), coordinate(1), coordinate(2), coordinate(3)
    )
    return (bits >= threshold).to(p.dtype) * scale


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out like q; lse [B, H, Sq], or [H, Tq] in the variable-length layout."""
    varlen = cu_seqlens_q is not None
    dtype = statistics_dtype(q)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    heads = q.shape[-2]
    lse_shape = (heads, q.shape[0]) if varlen else (q.shape[0], heads, q.shape[1])
    lse = torch.full(lse_shape, float("-inf"), dtype=dtype, device=q.device)
    for first, last, queries, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, key_lengths):
        at_q = queries if varlen else (slice(first, last), queries)
        at_k = keys if varlen else (slice(first, last), keys)
        q_BSHD, k_BSHD, v_BSHD = (_batched(t, dtype) for t in (q[at_q], k[at_k], v[at_k]))
        len_k = k_BSHD.shape[1] if varlen else k.shape[1]
        diagonal = _diagonal(causal, q_BSHD.shape[1], len_k)
        p, lse_BHS = _probabilities(q_BSHD, k_BSHD, diagonal, scale)
        mask = _dropout_mask(p, first, dropout_p, dropout_seed, sequence_offset)
        p = p if mask is None else p * mask
        out_BSHD = torch.einsum("bhqk,bkhd->bqhd", p, v_BSHD).to(q.dtype)
        out[at_q] = out_BSHD[0] if varlen else out_BSHD
        if varlen:
            lse[:, queries] = lse_BHS[0]
        else:
            lse[first:last] = lse_BHS
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). out and lse are recomputed from q, k and v, so that this can be differentiated
    again."""
    varlen = cu_seqlens_q is not None
    dtype = statistics_dtype(q)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    for first, last, queries, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, key_lengths):
        at_q = queries if varlen else (slice(first, last), queries)
        at_k = keys if varlen else (slice(first, last), keys)
        q_BSHD, k_BSHD, v_BSHD, dout_BSHD = (
            _batched(t, dtype) for t in (q[at_q], k[at_k], v[at_k], dout[at_q])
        )
        len_k = k_BSHD.shape[1] if varlen else k.shape[1]
        diagonal = _diagonal(causal, q_BSHD.shape[1], len_k)
        p, _ = _probabilities(q_BSHD, k_BSHD, diagonal, scale)
        mask = _dropout_mask(p, first, dropout_p, dropout_seed, sequence_offset)
        dropped = p if mask is None else p * mask
        dv_BSHD = torch.einsum("bhqk,bqhd->bkhd", dropped, dout_BSHD)
        dp = torch.einsum("bqhd,bkhd->bhqk", dout_BSHD, v_BSHD)
        dp = dp if mask is None else dp * mask
        delta = (p * dp).sum(-1)  # = Σ_D dout · out, [B, H, Sq]
        if dlse is not None:
            dlse_BHS = dlse[:, queries][None] if varlen else dlse[first:last]
            # lse = −inf in a row without keys: it is a constant, and p = 0 there.
            delta = delta - dlse_BHS.to(dtype)
        ds = p * (dp - delta[..., None]) * scale
        dq_BSHD = torch.einsum("bhqk,bkhd->bqhd", ds, k_BSHD).to(q.dtype)
        dk_BSHD = torch.einsum("bhqk,bqhd->bkhd", ds, q_BSHD).to(k.dtype)
        dq[at_q] = dq_BSHD[0] if varlen else dq_BSHD
        dk[at_k] = dk_BSHD[0] if varlen else dk_BSHD
        dv[at_k] = (dv_BSHD[0] if varlen else dv_BSHD).to(v.dtype)
    return dq, dk, dv
