"""Attention: out = dropout(softmax(scale · q kᵀ)) v        (Vaswani et al. 2017; Dao et al. 2022
for the tiling)

B batch, S sequence, T total tokens of a variable-length batch, H heads, D head dim.
Backward: dv = (p·mask)ᵀ dout, ds = p · (dp·mask − delta), dq = scale · ds k, dk = scale · dsᵀ q,
with p recomputed from lse and delta = Σ_D dout · out − dlse.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..reference import attention as reference
from ..reference.attention import CAUSAL_BOTTOM_RIGHT, CAUSAL_NONE
from ..reference.layer_norm import statistics_dtype
from . import _arguments as arguments
from ._backend import implementation
from ._registration import define, define_backward

MAX_HEAD_DIM = 256

_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? dropout_seed, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int causal, float dropout_p, float scale, "
    "SymInt sequence_offset"
)


def _fwd(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return implementation("attention", "_fwd", q, head_dim=q.shape[-1])(q, *rest)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=statistics_dtype(q))


def _bwd(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("attention", "_bwd", q, head_dim=q.shape[-1])(dout, q, *rest)


def _bwd_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention_bwd = define_backward(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? "
    "dlse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    reference.attention_bwd,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, key_lengths, seed, out, lse = ctx.saved_tensors
    nothing: tuple[None, ...] = (None,) * (4 + len(ctx.options))
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _attention_bwd(
        dout, q, k, v, out, lse, dlse, cu_q, cu_k, key_lengths, seed, *ctx.options
    )
    return (*grads, *nothing)


_attention_fwd = define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_lengths: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    scale: float | None,
    sequence_offset: int,
) -> tuple[Tensor, Tensor]:
    """Checks what every face of attention shares, draws the seed and calls the op.

    Args:
        op: the name that errors begin with.
        causal: one of the CAUSAL_ constants of `bertkern.reference.attention`.

    Returns:
        (out, lse).
    """
    arguments.check_tensor(op, "q", q)
    arguments.check_same(op, "q", q, k=k, v=v)
    head_dim = q.shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dim is {head_dim}; allowed are 1 to {MAX_HEAD_DIM}")
    if k.shape[-1] != head_dim or v.shape[-1] != head_dim:
        raise ValueError(
            f"{op}: k and v have head dims {k.shape[-1]} and {v.shape[-1]}; both must be q's, "
            f"{head_dim}"
        )
    if k.shape[-2] != q.shape[-2] or v.shape[-2] != q.shape[-2]:
        raise NotImplementedError(
            f"{op}: k and v have {k.shape[-2]} and {v.shape[-2]} heads and q has {q.shape[-2]}; "
            "grouped "
            "heads are not supported yet, so the counts must be equal"
        )
    if k.shape != v.shape:
        raise ValueError(f"{op}: v has shape {list(v.shape)}; it must be k's, {list(k.shape)}")
    seed = arguments.dropout_seed_for(op, q, dropout_p, dropout_seed)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    return _attention_fwd(
        arguments.unit_last_stride(q),
        arguments.unit_last_stride(k),
        arguments.unit_last_stride(v),
        cu_seqlens_q,
        cu_seqlens_k,
        key_lengths,
        seed,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        float(dropout_p),
        scale,
        sequence_offset,
    )


def _refuse(op: str, **given: object) -> None:
    for name, value in given.items():
        if isinstance(value, Tensor) or value not in (None, 0.0):
            shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else value
            raise NotImplementedError(f"{op}: {name}={shown} is not supported yet; leave it out")


def _check_rank(op: str, rank: int, layout: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        arguments.check_tensor(op, name, tensor)
        if tensor.dim() != rank:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}; it must have {rank} dimensions, "
                f"{layout}"
            )


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def attention(  # type: ignore[misc]  # the overloads abbreviate the options
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    sequence_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax(scale · q kᵀ) v over a batch of equally long sequences.

    Args:
        q: [B, Sq, H, D], float16, bfloat16, float32 or float64; any strides (one whose last
            dimension is
            not contiguous is copied once).
        k, v: [B, Sk, H, D].
        key_lengths: int32 [B]; sequence b has keys 0 … key_lengths[b] − 1, at most Sk. Values are
            not
            read on the host. What lies behind is never used, whatever it holds.
        causal: query i sees keys j ≤ i + Sk − Sq (the mask is aligned to the bottom right of the
            whole
            Sq × Sk matrix; key_lengths then only take keys away).
        dropout_p: probability to drop each attention probability, rounded to a multiple of 1/65536.
        dropout_seed: int64, one element, on q's device; None draws one.
        scale: factor on the scores; None is 1/√D.
        return_lse: also return lse = log Σ_j exp(score_ij), float32 [B, H, Sq] (differentiable).
        sequence_offset: added to the batch index in the dropout mask (batches split over
            processes).
        key_padding_mask, bias, window, softcap: not supported yet.

    Returns:
        [B, Sq, H, D] in q's dtype, contiguous; with return_lse, (out, lse). A query that sees no
        key gives 0 and lse −inf.

    Raises:
        ValueError, TypeError, NotImplementedError: naming the argument, its value and those
            allowed.
    """
    _refuse(
        "attention", key_padding_mask=key_padding_mask, bias=bias, window=window, softcap=softcap
    )
    _check_rank("attention", 4, "[B, S, H, D]", q=q, k=k, v=v)
    q, k, v = arguments.to_autocast_dtype(q, k, v)  # type: ignore[assignment]
    batch = q.shape[0]
    if k.shape[0] != batch:
        raise ValueError(f"attention: k has batch {k.shape[0]}; it must be q's, {batch}")
    if key_lengths is not None:
        arguments.check_index_tensor(
            "attention", "key_lengths", key_lengths, q, (batch,), torch.int32
        )
        key_lengths = key_lengths.contiguous()
    out, lse = attend(
        "attention",
        q,
        k,
        v,
        key_lengths=key_lengths,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        causal=CAUSAL_BOTTOM_RIGHT if causal else CAUSAL_NONE,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        scale=scale,
        sequence_offset=sequence_offset,
    )
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(  # type: ignore[misc]  # the overloads abbreviate the options
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    sequence_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax(scale · q kᵀ) v over sequences laid end to end, without padding.

    Args:
        q: [Tq, H, D]; k, v: [Tk, H, D]. Tokens past the last sequence (a fixed token budget) give
            0.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], rising from 0; sequence b is tokens cu_seqlens[b]
            …
            cu_seqlens[b + 1] − 1. Empty sequences are allowed. Values are not read on the host.
        max_seqlen_q, max_seqlen_k: the longest lengths (or more), as ints: nothing synchronises.
        Others: as in `attention`; causal is aligned to the bottom right of each sequence.

    Returns:
        [Tq, H, D] in q's dtype, contiguous; with return_lse, (out, lse [H, Tq] float32).

    Raises:
        ValueError, TypeError, NotImplementedError: naming the argument, its value and those
            allowed.
    """
    op = "attention_varlen"
    _refuse(op, bias=bias, window=window, softcap=softcap)
    _check_rank(op, 3, "[T, H, D]", q=q, k=k, v=v)
    q, k, v = arguments.to_autocast_dtype(q, k, v)  # type: ignore[assignment]
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        arguments.check_index_tensor(op, name, lengths, q, None, torch.int32)
        if lengths.shape[0] < 1 or lengths.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{op}: {name} has shape {list(lengths.shape)}; both need the same B + 1 >= 1 "
                "elements "
                f"(cu_seqlens_q has {list(cu_seqlens_q.shape)})"
            )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, Tensor):
            raise TypeError(
                f"{op}: {name} is a tensor; it must be an int (reading it would synchronise)"
            )
        if longest < 0:
            raise ValueError(f"{op}: {name}={longest}; it must not be negative")
    out, lse = attend(
        op,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=CAUSAL_BOTTOM_RIGHT if causal else CAUSAL_NONE,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        scale=scale,
        sequence_offset=sequence_offset,
    )
    return (out, lse) if return_lse else out
