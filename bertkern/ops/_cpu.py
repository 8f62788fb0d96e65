"""The backend "cpu": hands tensors to the compiled extension's CPU kernels as addresses and
strides.

Functions, arguments and equations are those of `bertkern/reference/`. `linear` and `ffn` are in
`_cpu_linear.py`. Arguments of the extension's functions stand in the order of `bertkern/_C.pyi`,
without their names: with names a call costs the host several times as much.
"""

from typing import Any

import torch
from torch import Tensor

from bertkern import _C

from ..reference.dropout import threshold_and_scale
from . import _layout

DTYPES = {
    torch.float32: _C.DType.FLOAT32,
    torch.float16: _C.DType.FLOAT16,
    torch.bfloat16: _C.DType.BFLOAT16,
}

_NOTHING = (0, 0, 0, 0)  # sizes and strides of a bias that is absent


def address(tensor: Tensor | None) -> int:
    """Where its elements are; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_or(tensor: Tensor | None, other: Tensor) -> Any:
    """The kernels' name for its dtype, or for other's where it is absent."""
    return DTYPES[(other if tensor is None else tensor).dtype]


def parameter(tensor: Tensor | None) -> Tensor | None:
    """A weight or bias as the kernels take it: contiguous, and float32 where it is float64."""
    if tensor is None:
        return None
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()


def dropout_options(dropout_p: float, dropout_seed: Tensor | None) -> tuple[int, float, int]:
    """dropout_threshold, dropout_scale and dropout_seed, which is on the host already."""
    if dropout_seed is None:
        return 0, 1.0, 0
    return *threshold_and_scale(dropout_p), int(dropout_seed)


def _bias_options(bias: Tensor | None) -> tuple[Any, ...]:
    """bias_sizes, bias_strides, bias_dtype."""
    if bias is None:
        return _NOTHING, _NOTHING, None
    return tuple(bias.shape), bias.stride(), DTYPES.get(bias.dtype)


def _attention_options(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
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
    batch, queries, heads, head_dim = _layout.sizes(q, heads_first)
    _, keys, key_heads, _ = _layout.sizes(k, heads_first)
    return (
        *_bias_options(bias),
        address(key_padding_mask),
        address(cu_seqlens_q),
        address(cu_seqlens_k),
        address(key_lengths),
        batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        queries,
        keys,
        heads,
        key_heads,
        head_dim,
        DTYPES[q.dtype],
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        *dropout_options(dropout_p, dropout_seed),
        sequence_offset,
        torch.get_num_threads(),
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
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    out = _layout.empty_like(q, heads_first)
    lse = torch.empty(_layout.lse_shape(q, heads_first), dtype=torch.float32)
    keys = None if key_padding_mask is None else key_padding_mask.contiguous()
    _C.cpu_attention_fwd(
        address(q),
        address(k),
        address(v),
        address(out),
        address(lse),
        address(bias),
        _layout.strides(q, heads_first),
        _layout.strides(k, heads_first),
        _layout.strides(v, heads_first),
        _layout.strides(out, heads_first),
        *_attention_options(
            q,
            k,
            bias,
            keys,
            cu_seqlens_q,
            cu_seqlens_k,
            key_lengths,
            dropout_seed,
            causal,
            window_left,
            window_right,
            softcap,
            dropout_p,
            scale,
            sequence_offset,
            heads_first,
        ),
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
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias); dbias only if bias_grad."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    lse = lse.contiguous()
    keys = None if key_padding_mask is None else key_padding_mask.contiguous()
    dq, dk, dv = (_layout.empty_like(t, heads_first) for t in (q, k, v))
    dbias = bias.new_empty(bias.shape) if bias_grad and bias is not None else None
    _C.cpu_attention_bwd(
        address(dout),
        address(q),
        address(k),
        address(v),
        address(out),
        address(lse),
        address(dlse),
        address(bias),
        address(dq),
        address(dk),
        address(dv),
        address(dbias),
        _layout.strides(dout, heads_first),
        _layout.strides(q, heads_first),
        _layout.strides(k, heads_first),
        _layout.strides(v, heads_first),
        _layout.strides(out, heads_first),
        *_attention_options(
            q,
            k,
            bias,
            keys,
            cu_seqlens_q,
            cu_seqlens_k,
            key_lengths,
            dropout_seed,
            causal,
            window_left,
            window_right,
            softcap,
            dropout_p,
            scale,
            sequence_offset,
            heads_first,
        ),
    )
    return dq, dk, dv, dbias


def _layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    weight, bias = parameter(weight), parameter(bias)
    rows, cols = x.shape
    y = x.new_empty((rows, cols))
    z = None if residual is None else x.new_empty((rows, cols))
    mean = torch.empty(rows, dtype=torch.float32)
    rstd = torch.empty(rows, dtype=torch.float32)
    _C.cpu_layer_norm_fwd(
        address(x),
        address(residual),
        address(weight),
        address(bias),
        address(y),
        address(z),
        address(mean),
        address(rstd),
        address(dropout_rows),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        rows,
        cols,
        DTYPES[x.dtype],
        dtype_or(weight, x),
        dtype_or(bias, x),
        eps,
        *dropout_options(dropout_p, dropout_seed),
        torch.get_num_threads(),
    )
    return y, z, mean, rstd


def _layer_norm_bwd(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    dtypes = [None if p is None else p.dtype for p in (weight, bias)]
    weight, bias = parameter(weight), parameter(bias)
    dx = z.new_empty(z.shape)
    dresidual = None if dropout_seed is None else z.new_empty(z.shape)
    dweight = None if weight is None else weight.new_empty(weight.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    _C.cpu_layer_norm_bwd(
        address(dy),
        address(dz),
        address(z),
        address(weight),
        address(mean),
        address(rstd),
        address(dx),
        address(dresidual),
        address(dweight),
        address(dbias),
        address(dropout_rows),
        dy.stride(0),
        0 if dz is None else dz.stride(0),
        z.stride(0),
        z.shape[0],
        z.shape[1],
        DTYPES[z.dtype],
        dtype_or(weight, z),
        dtype_or(bias, z),
        *dropout_options(dropout_p, dropout_seed),
        torch.get_num_threads(),
    )
    dweight, dbias = (
        None if g is None else g.to(dtype)
        for g, dtype in zip((dweight, dbias), dtypes, strict=True)
    )
    return dx, dx if dresidual is None else dresidual, dweight, dbias


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    y, _, mean, rstd = _layer_norm_fwd(x, None, weight, bias, 0.0, eps, None, None)
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias)."""
    dx, _, dweight, dbias = _layer_norm_bwd(dy, None, x, weight, bias, mean, rstd, 0.0, None, None)
    return dx, dweight, dbias


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, z, mean, rstd)."""
    y, z, mean, rstd = _layer_norm_fwd(
        x, residual, weight, bias, dropout_p, eps, dropout_seed, dropout_rows
    )
    assert z is not None, "z is made wherever there is a residual"
    return y, z, mean, rstd


def dropout_add_layer_norm_bwd(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias); one tensor twice where nothing is dropped."""
    return _layer_norm_bwd(
        dy, dz, z, weight, bias, mean, rstd, dropout_p, dropout_seed, dropout_rows
    )


def dropout(
    x: Tensor, dropout_p: float, dropout_seed: Tensor, dropout_rows: Tensor | None
) -> Tensor:
    """Y = x · keep · scale."""
    y = x.new_empty(x.shape)
    _C.cpu_dropout(
        address(x),
        address(y),
        address(dropout_rows),
        x.stride(0),
        x.shape[0],
        x.shape[1],
        DTYPES[x.dtype],
        *dropout_options(dropout_p, dropout_seed),
        torch.get_num_threads(),
    )
    return y


def fma_rates(type_name: str, threads: int) -> list[float]:
    """Operations a second of the widest multiply-add for "float32", "bfloat16" or "int8", measured
    some times; empty where the processor has none. The benchmarks' ceiling; no op uses it."""
    return _C.cpu_fma_rates(type_name, threads)
