"""The backend "cpu": hands tensors to the compiled extension's CPU kernels as addresses and
strides.

Functions, arguments and equations are those of `bertkern/reference/`. `linear` and `ffn` are in
`_cpu_linear.py`.
"""

from typing import Any

import torch
from torch import Tensor

from bertkern import _C

from ..reference.dropout import threshold_and_scale

DTYPES = {
    torch.float32: _C.DType.FLOAT32,
    torch.float16: _C.DType.FLOAT16,
    torch.bfloat16: _C.DType.BFLOAT16,
}


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


def dropout_options(dropout_p: float, dropout_seed: Tensor | None) -> dict[str, Any]:
    """The last arguments of every kernel that drops; the seed is on the host already."""
    if dropout_seed is None:
        return {"dropout_threshold": 0, "dropout_scale": 1.0, "dropout_seed": 0}
    threshold, scale = threshold_and_scale(dropout_p)
    seed = int(dropout_seed)
    return {"dropout_threshold": threshold, "dropout_scale": scale, "dropout_seed": seed}


def _strides(t: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) of [B, S, H, D], or (0, token, head) of [T, H, D]."""
    batch, sequence, head = t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2])
    return batch, sequence, head


def _bias_options(bias: Tensor | None) -> dict[str, Any]:
    if bias is None:
        nothing = (0, 0, 0, 0)
        return {"bias": 0, "bias_sizes": nothing, "bias_strides": nothing, "bias_dtype": None}
    return {
        "bias": address(bias),
        "bias_sizes": tuple(bias.shape),
        "bias_strides": bias.stride(),
        "bias_dtype": None if bias.dtype == torch.bool else DTYPES[bias.dtype],
    }


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
) -> dict[str, Any]:
    """What both directions take; key_padding_mask is contiguous."""
    varlen = cu_seqlens_q is not None
    return {
        **_bias_options(bias),
        "key_padding_mask": address(key_padding_mask),
        "cu_seqlens_q": address(cu_seqlens_q),
        "cu_seqlens_k": address(cu_seqlens_k),
        "key_lengths": address(key_lengths),
        "batch": cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0],
        "seqlen_q": q.shape[0] if varlen else q.shape[1],
        "seqlen_k": k.shape[0] if varlen else k.shape[1],
        "heads": q.shape[-2],
        "key_heads": k.shape[-2],
        "head_dim": q.shape[-1],
        "dtype": DTYPES[q.dtype],
        "causal": causal,
        "window_left": window_left,
        "window_right": window_right,
        "softcap": softcap,
        "scale": scale,
        "sequence_offset": sequence_offset,
        "threads": torch.get_num_threads(),
        **dropout_options(dropout_p, dropout_seed),
    }


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
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.empty(lse_shape, dtype=torch.float32)
    keys = None if key_padding_mask is None else key_padding_mask.contiguous()
    _C.cpu_attention_fwd(
        q=address(q),
        k=address(k),
        v=address(v),
        out=address(out),
        lse=address(lse),
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        out_strides=_strides(out),
        **_attention_options(
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
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias); dbias only if bias_grad."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    lse = lse.contiguous()
    keys = None if key_padding_mask is None else key_padding_mask.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    dbias = torch.empty(bias.shape, dtype=bias.dtype) if bias_grad and bias is not None else None
    _C.cpu_attention_bwd(
        dout=address(dout),
        q=address(q),
        k=address(k),
        v=address(v),
        out=address(out),
        lse=address(lse),
        dlse=address(dlse),
        dq=address(dq),
        dk=address(dk),
        dv=address(dv),
        dbias=address(dbias),
        dout_strides=_strides(dout),
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        out_strides=_strides(out),
        **_attention_options(
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
    y = torch.empty(x.shape, dtype=x.dtype)
    z = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    _C.cpu_layer_norm_fwd(
        x=address(x),
        residual=address(residual),
        weight=address(weight),
        bias=address(bias),
        y=address(y),
        z=address(z),
        mean=address(mean),
        rstd=address(rstd),
        dropout_rows=address(dropout_rows),
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=DTYPES[x.dtype],
        weight_dtype=dtype_or(weight, x),
        bias_dtype=dtype_or(bias, x),
        eps=eps,
        threads=torch.get_num_threads(),
        **dropout_options(dropout_p, dropout_seed),
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
    dx = torch.empty(z.shape, dtype=z.dtype)
    dresidual = None if dropout_seed is None else torch.empty(z.shape, dtype=z.dtype)
    dweight, dbias = (
        None if p is None else torch.empty(p.shape, dtype=p.dtype) for p in (weight, bias)
    )
    _C.cpu_layer_norm_bwd(
        dy=address(dy),
        dz=address(dz),
        z=address(z),
        weight=address(weight),
        mean=address(mean),
        rstd=address(rstd),
        dx=address(dx),
        dresidual=address(dresidual),
        dweight=address(dweight),
        dbias=address(dbias),
        dropout_rows=address(dropout_rows),
        dy_stride=dy.stride(0),
        dz_stride=0 if dz is None else dz.stride(0),
        z_stride=z.stride(0),
        rows=z.shape[0],
        cols=z.shape[1],
        dtype=DTYPES[z.dtype],
        weight_dtype=dtype_or(weight, z),
        bias_dtype=dtype_or(bias, z),
        threads=torch.get_num_threads(),
        **dropout_options(dropout_p, dropout_seed),
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
    y = torch.empty(x.shape, dtype=x.dtype)
    _C.cpu_dropout(
        x=address(x),
        y=address(y),
        dropout_rows=address(dropout_rows),
        x_stride=x.stride(0),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
        **dropout_options(dropout_p, dropout_seed),
    )
    return y


def fma_rates(type_name: str, threads: int) -> list[float]:
    """Operations a second of the widest multiply-add for "float32", "bfloat16" or "int8", measured
    some times; empty where the processor has none. The benchmarks' ceiling; no op uses it."""
    return _C.cpu_fma_rates(type_name, threads)
