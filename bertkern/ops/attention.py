"""Attention: out = dropout(softmax(score(q kᵀ))) v,  score(x) = softcap(scale · x) + bias
(Vaswani et al. 2017; Dao et al. 2022 for the tiling; the cap is Gemma 2's)

B batch, S sequence, T total tokens of a variable-length batch, H heads, Hk key heads, D head dim.
Backward: dv = (p·mask)ᵀ dout, ds = p · (dp·mask − delta), dbias = Σ ds, dx = ds · softcap',
dq = scale · dx k, dk = scale · dxᵀ q, with p recomputed from lse and delta = Σ_D dout · out − dlse.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..reference import attention as reference
from ..reference.attention import CAUSAL_BOTTOM_RIGHT, CAUSAL_NONE
from ..reference.layer_norm import statistics_dtype
from . import _arguments as arguments
from . import _layout
from ._backend import implementation
from ._registration import UNUSUAL, define, define_backward, present, usual_call
from ._vmap import Fold

MAX_HEAD_DIM = 256

_OPTIONS = (
    "Tensor? bias, Tensor? key_padding_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? key_lengths, Tensor? dropout_seed, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "int causal, SymInt window_left, SymInt window_right, float softcap, float dropout_p, "
    "float scale, SymInt sequence_offset, bool heads_first"
)


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    function = implementation("attention", "_fwd", q, head_dim=q.shape[-1], rows=(q, k, v))
    return function(q, k, v, *rest)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    heads_first = rest[-1]
    out = _layout.empty_like(q, heads_first)
    return out, q.new_empty(_layout.lse_shape(q, heads_first), dtype=statistics_dtype(q))


def _bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    function = implementation("attention", "_bwd", q, head_dim=q.shape[-1], rows=(dout, q, k, v))
    dq, dk, dv, dbias = function(dout, q, k, v, *rest)
    return dq, dk, dv, present(dbias, q)


def _bwd_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bias, heads_first, bias_grad = rest[3], *rest[-2:]
    dbias = bias.new_empty(bias.shape) if bias_grad else q.new_empty(0)
    return *(_layout.empty_like(t, heads_first) for t in (q, k, v)), dbias


_attention_bwd = define_backward(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? "
    f"dlse, {_OPTIONS}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    reference.attention_bwd,
)

_TENSORS = 9  # arguments of the forward that are tensors: they come first


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.options = inputs[_TENSORS:]


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    q, k, v, bias, *indices, out, lse = ctx.saved_tensors
    nothing: tuple[None, ...] = (None,) * (len(indices) + len(ctx.options))
    if dout is None and dlse is None:
        return (None, None, None, None, *nothing)
    dout = torch.zeros_like(out) if dout is None else dout
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _attention_bwd(
        dout, q, k, v, out, lse, dlse, bias, *indices, *ctx.options, bias_grad
    )
    return (dq, dk, dv, dbias if bias_grad else None, *nothing)


_attention_fwd = define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("q", "k", "v", "bias"),
    # Dropout numbers the sequences of the batch, and a bias may have a batch of its own.
    fold=Fold(
        ("q", "k", "v", "key_padding_mask", "key_lengths"),
        unless=("bias", "cu_seqlens_q", "dropout_seed"),
    ),
)


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_lengths: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    dropout_p: float,
    dropout_seed: Tensor | None,
    scale: float | None,
    sequence_offset: int,
    return_lse: bool = False,
    heads_first: bool = False,
    usual: int = UNUSUAL,
) -> tuple[Tensor, ...]:
    """Checks what every face of attention shares, draws the seed and calls the op.

    Args:
        op: the name that errors begin with.
        bias: [B or 1, H or 1, Sq or 1, Sk or 1], checked.
        causal: one of the CAUSAL_ constants of `bertkern.reference.attention`.
        heads_first: whether q, k and v, and so out, are [B, H, S, D] instead of [B, S, H, D].
        usual: what `usual_call` said of the tensors.

    Returns:
        (out,), with return_lse (out, lse).
    """
    if usual == UNUSUAL:
        arguments.check_tensor(op, "q", q)
        arguments.check_same(op, "q", q, k=k, v=v)
        q, k, v = (arguments.unit_last_stride(t) for t in (q, k, v))
    heads_at = 1 if heads_first else -2
    heads, head_dim = q.shape[heads_at], q.shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dim is {head_dim}; allowed are 1 to {MAX_HEAD_DIM}")
    if usual == UNUSUAL:
        _check_keys(op, head_dim, k, v)
    key_heads = k.shape[heads_at]
    if key_heads != heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"{op}: k and v have {key_heads} heads and q has {heads}; q's must be a multiple of "
            "k's (each key head serves as many query heads)"
        )
    left, right = _window(op, window)
    if not softcap >= 0.0:
        raise ValueError(f"{op}: softcap={softcap}; it must be 0 (none) or positive")
    seed = arguments.dropout_seed_for(op, q, dropout_p, dropout_seed, usual)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    return _attention_fwd(
        q,
        k,
        v,
        bias,
        key_padding_mask,
        cu_seqlens_q,
        cu_seqlens_k,
        key_lengths,
        seed,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        left,
        right,
        float(softcap),
        float(dropout_p),
        scale,
        sequence_offset,
        heads_first,
        outputs=2 if return_lse else 1,
        usual=usual,
    )


_usual = usual_call(
    "x[b s h d], x[b t g d], x[b t g d], mask?[b|1 h|1 s|1 t|1], bool?[b t], int32?[b], int64?[*]"
)
_usual_varlen = usual_call("x[s h d], x[t g d], x[t g d], int32[c+], int32[c+], int64?[*]")


def _check_keys(op: str, head_dim: int, k: Tensor, v: Tensor) -> None:
    if k.shape[-1] != head_dim or v.shape[-1] != head_dim:
        raise ValueError(
            f"{op}: k and v have head dims {k.shape[-1]} and {v.shape[-1]}; both must be q's, "
            f"{head_dim}"
        )
    if k.shape != v.shape:
        raise ValueError(f"{op}: v has shape {list(v.shape)}; it must be k's, {list(k.shape)}")


def _window(op: str, window: tuple[int, int] | None) -> tuple[int, int]:
    """(left, right) of a window, −1 where it has no limit."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window={window!r}; it must be None or (left, right)")
    for side in window:
        if not isinstance(side, (int, torch.SymInt)) or isinstance(side, bool) or side < -1:
            raise ValueError(
                f"{op}: window={tuple(window)}; left and right must be ints, -1 (no limit) or more"
            )
    return window[0], window[1]


def bias_matrices(
    op: str, name: str, bias: Tensor | None, q: Tensor, shape: tuple[int, int, int, int]
) -> Tensor | None:
    """The bias as a view of four dimensions, each 1 or that of `shape` [B, H, Sq, Sk]."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(bias).__name__}")
    if bias.is_nested:
        raise TypeError(f"{op}: {name} is a nested tensor; it must be a plain one")
    if bias.dtype not in (torch.bool, q.dtype, torch.float32):
        raise TypeError(
            f"{op}: {name} has dtype {bias.dtype}; allowed are torch.bool, torch.float32 and "
            f"q's, {q.dtype}"
        )
    arguments.check_device(op, "q", q, name, bias)
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(sizes) != 4 or any(s not in (1, w) for s, w in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"{op}: {name} has shape {list(bias.shape)}; it must broadcast to [B, H, Sq, Sk] = "
            f"{list(shape)}"
        )
    return bias.reshape(sizes)


def _check_rank(op: str, rank: int, layout: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments.check_tensor(op, name, tensor)
        if tensor.dim() != rank:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}; it must have {rank} dimensions, "
                f"{layout}"
            )


def _check_longest(op: str, name: str, longest: object) -> None:
    if isinstance(longest, Tensor):
        raise TypeError(
            f"{op}: {name} is a tensor; it must be an int (reading it would synchronise)"
        )
    if longest < 0:  # type: ignore[operator]
        raise ValueError(f"{op}: {name}={longest}; it must not be negative")


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
            dimension is not contiguous is copied once).
        k, v: [B, Sk, Hk, D]; H is a multiple of Hk, query head h reads key head h // (H / Hk).
        key_lengths: int32 [B]; sequence b has keys 0 … key_lengths[b] − 1, at most Sk. Values are
            not read on the host. What lies behind is never used, whatever it holds.
        key_padding_mask: bool [B, Sk], True for keys that count: left padding, holes. As behind
            key_lengths, what stands at the others is never used.
        bias: added to the scores, in q's dtype or float32, with a gradient (deterministic); or
            bool, False meaning −inf. It broadcasts to [B, H, Sq, Sk].
        causal: query i sees keys j ≤ i + Sk − Sq (the mask is aligned to the bottom right of the
            whole Sq × Sk matrix; key_lengths then only take keys away).
        window: (left, right), −1 for no limit: query i sees keys i + Sk − Sq − left ≤ j ≤ i + Sk −
            Sq + right.
        softcap: c > 0 replaces each product x by c · tanh(x / c), before the bias; 0 is none.
        dropout_p: probability to drop each attention probability, rounded to a multiple of 1/65536.
        dropout_seed: int64, one element, on q's device; None draws one.
        scale: factor on the products; None is 1/√D.
        return_lse: also return lse = log Σ_j exp(score_ij), float32 [B, H, Sq] (differentiable).
        sequence_offset: added to the batch index in the dropout mask (batches split over
            processes).

    Returns:
        [B, Sq, H, D] in q's dtype, contiguous; with return_lse, (out, lse). A query that sees no
        key gives 0 and lse −inf.

    Raises:
        ValueError, TypeError, NotImplementedError: naming the argument, its value and those
            allowed.
    """
    if arguments.autocasts(q):
        q, k, v, bias = arguments.to_autocast_dtype(q, k, v, bias)  # type: ignore[assignment]
    usual = _usual(q, k, v, bias, key_padding_mask, key_lengths, dropout_seed)
    if usual == UNUSUAL:
        _check_rank("attention", 4, "[B, S, H, D]", q, k, v)
        batch, queries, heads, _ = q.shape
        key_batch, keys, _, _ = k.shape
        if key_batch != batch:
            raise ValueError(f"attention: k has batch {key_batch}; it must be q's, {batch}")
        if key_lengths is not None:
            arguments.check_index_tensor(
                "attention", "key_lengths", key_lengths, q, (batch,), torch.int32
            )
            key_lengths = key_lengths.contiguous()
        if key_padding_mask is not None:
            arguments.check_index_tensor(
                "attention", "key_padding_mask", key_padding_mask, q, (batch, keys), torch.bool
            )
        bias = bias_matrices("attention", "bias", bias, q, (batch, heads, queries, keys))
    outputs = attend(
        "attention",
        q,
        k,
        v,
        bias=bias,
        key_padding_mask=key_padding_mask,
        key_lengths=key_lengths,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        causal=CAUSAL_BOTTOM_RIGHT if causal else CAUSAL_NONE,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        scale=scale,
        sequence_offset=sequence_offset,
        return_lse=return_lse,
        usual=usual,
    )
    return outputs if return_lse else outputs[0]  # type: ignore[return-value]


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
        q: [Tq, H, D]; k, v: [Tk, Hk, D]. Tokens past the last sequence (a fixed token budget) give
            0.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], rising from 0; sequence b is tokens cu_seqlens[b]
            … cu_seqlens[b + 1] − 1. Empty sequences are allowed. Values are not read on the host.
        max_seqlen_q, max_seqlen_k: the longest lengths (or more), as ints: nothing synchronises.
        bias: broadcasts to [B, H, max_seqlen_q, max_seqlen_k]; element (i, j) is added to the score
            of the sequence's own query i and key j.
        Others: as in `attention`; causal and window are aligned to the bottom right of each
            sequence.

    Returns:
        [Tq, H, D] in q's dtype, contiguous; with return_lse, (out, lse [H, Tq] float32).

    Raises:
        ValueError, TypeError, NotImplementedError: naming the argument, its value and those
            allowed.
    """
    op = "attention_varlen"
    _check_longest(op, "max_seqlen_q", max_seqlen_q)
    _check_longest(op, "max_seqlen_k", max_seqlen_k)
    if arguments.autocasts(q):
        q, k, v, bias = arguments.to_autocast_dtype(q, k, v, bias)  # type: ignore[assignment]
    usual = UNUSUAL  # with a bias, whose sizes no tensor has
    if bias is None:
        usual = _usual_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_seed)
    if usual == UNUSUAL:
        _check_rank(op, 3, "[T, H, D]", q, k, v)
        arguments.check_index_tensor(op, "cu_seqlens_q", cu_seqlens_q, q, None, torch.int32)
        arguments.check_index_tensor(op, "cu_seqlens_k", cu_seqlens_k, q, None, torch.int32)
        batch = cu_seqlens_q.shape[0] - 1
        if batch < 0 or cu_seqlens_k.shape[0] != batch + 1:
            raise ValueError(
                f"{op}: cu_seqlens_k has shape {list(cu_seqlens_k.shape)} and cu_seqlens_q "
                f"{list(cu_seqlens_q.shape)}; both need the same B + 1 >= 1 elements"
            )
        bias = bias_matrices(op, "bias", bias, q, (batch, q.shape[1], max_seqlen_q, max_seqlen_k))
    outputs = attend(
        op,
        q,
        k,
        v,
        bias=bias,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=CAUSAL_BOTTOM_RIGHT if causal else CAUSAL_NONE,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        scale=scale,
        sequence_offset=sequence_offset,
        return_lse=return_lse,
        usual=usual,
    )
    return outputs if return_lse else outputs[0]  # type: ignore[return-value]
