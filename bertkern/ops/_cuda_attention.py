"""Attention of the backend "cuda": hands tensors to the compiled extension as addresses and
strides.

Functions, arguments and equations are those of `bertkern/reference/attention.py`.
"""

from typing import Any

import torch
from torch import Tensor

from bertkern import _C

from ..reference.dropout import threshold_and_scale
from . import _layout
from ._cuda import DTYPES, address, place

MAX_HEAD_DIM = 128
_NOTHING = (0, 0, 0, 0)  # sizes and strides of a bias that is absent


def cannot_attention(dtype: torch.dtype, head_dim: int, aligned: bool) -> str | None:
    """Why the kernels cannot take a call; None when they can."""
    if dtype == torch.float32:
        return "its attention kernels take float16 and bfloat16"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"its head dim is a multiple of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    if not aligned:
        return "its rows of q, k, v and dout start on multiples of 16 bytes"
    return None


def _empty_like(t: Tensor, heads_first: bool) -> Tensor:
    """`_layout.empty_like` by this module's own torch, whose memory the emulator watches."""
    options: dict[str, Any] = {"dtype": t.dtype, "device": t.device}
    if heads_first:
        return torch.empty_strided(t.shape, _layout.heads_first_strides(t), **options)
    return torch.empty(t.shape, **options)


def _order(cu_seqlens: Tensor | None, *directions: int) -> Tensor | None:
    """Scratch int32 [*directions, B] for the order in which a varlen batch's sequences are taken:
    longest first, found on the device. None in the batched layout."""
    if cu_seqlens is None:
        return None
    shape = (*directions, cu_seqlens.shape[0] - 1)
    return torch.empty(shape, dtype=torch.int32, device=cu_seqlens.device)


def _options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
    heads_first: bool,
) -> tuple[Any, ...]:
    """What the arguments of both directions end with; key_padding_mask is contiguous."""
    varlen = cu_seqlens_q is not None
    batch, queries, heads, head_dim = _layout.sizes(q, heads_first)
    _, keys, key_heads, _ = _layout.sizes(k, heads_first)
    threshold, dropout_scale = (0, 1.0) if dropout_seed is None else threshold_and_scale(dropout_p)
    return (
        _layout.strides(q, heads_first),
        _layout.strides(k, heads_first),
        _layout.strides(v, heads_first),
        _layout.strides(out, heads_first),
        _NOTHING if bias is None else tuple(bias.shape),
        _NOTHING if bias is None else bias.stride(),
        None if bias is None else DTYPES.get(bias.dtype),
        address(key_padding_mask),
        address(cu_seqlens_q),
        address(cu_seqlens_k),
        address(key_lengths),
        address(order),
        batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        max_seqlen_q if varlen else queries,
        max_seqlen_k if varlen else keys,
        q.shape[0],
        k.shape[0],
        heads,
        key_heads,
        head_dim,
        DTYPES[q.dtype],
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        threshold,
        dropout_scale,
        address(dropout_seed),
        sequence_offset,
        *place(q),
    )


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out like q, lse fp32 [B, H, Sq] or [H, Tq]."""
    heads_first = options[-1]
    out = _empty_like(q, heads_first)
    lse = torch.empty(_layout.lse_shape(q, heads_first), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    keys = None if key_padding_mask is None else key_padding_mask.contiguous()
    indices = (keys, cu_seqlens_q, cu_seqlens_k, key_lengths)
    order = _order(cu_seqlens_q)
    _C.cuda_attention_fwd(
        address(q),
        address(k),
        address(v),
        address(out),
        address(lse),
        address(bias),
        *_options(q, k, v, out, bias, order, *indices, *options),
    )
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias), in memory contiguous [B, S, H, D] or [T, H, D]; dbias only if bias_grad,
    the last of the options. The same bits from run to run: no atomics, sums in one order."""
    *options_of_both, bias_grad = options
    if 0 in dout.stride():  # as from a sum: the copy engine cannot reach rows on top of each other
        dout = dout.contiguous()
    keys = None if key_padding_mask is None else key_padding_mask.contiguous()
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    heads_first = options_of_both[-1]
    dq, dk, dv = (_empty_like(t, heads_first) for t in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    dbias = None
    if bias_grad and bias is not None:
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if dq.numel() == 0:  # no queries, or no query heads
        return dq, dk.zero_(), dv.zero_(), None if dbias is None else dbias.zero_()
    indices = (keys, cu_seqlens_q, cu_seqlens_k, key_lengths)
    order = _order(cu_seqlens_q, 2)
    _C.cuda_attention_bwd(
        address(dout),
        address(q),
        address(k),
        address(v),
        address(out),
        address(lse),
        address(dlse),
        address(delta),
        address(bias),
        address(dq),
        address(dk),
        address(dv),
        address(dbias),
        _layout.strides(dout, heads_first),
        *_options(q, k, v, out, bias, order, *indices, *options_of_both),
    )
    return dq, dk, dv, dbias
