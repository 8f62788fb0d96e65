"""The backend "cpu": hands tensors to the compiled extension's CPU kernels as addresses and
strides.

The matrix products of `linear` and `ffn` are torch's own (oneDNN, MKL or what torch is built with);
what stands around them, bias, activation, dropout, residual and column sums, is one pass of a
kernel here. Functions, arguments and equations are those of `bertkern/reference/`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bertkern import _C

from ..reference.dropout import threshold_and_scale

_DTYPES = {
    torch.float32: _C.DType.FLOAT32,
    torch.float16: _C.DType.FLOAT16,
    torch.bfloat16: _C.DType.BFLOAT16,
}
_ACTIVATIONS = {
    "": _C.Activation.NONE,
    "gelu": _C.Activation.GELU,
    "gelu_tanh": _C.Activation.GELU_TANH,
    "relu": _C.Activation.RELU,
}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype_or(tensor: Tensor | None, other: Tensor) -> Any:
    return _DTYPES[(other if tensor is None else tensor).dtype]


def _parameter(tensor: Tensor | None) -> Tensor | None:
    """A weight or bias as the kernels take it: contiguous, and float32 where it is float64."""
    if tensor is None:
        return None
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()


def _dropout_options(dropout_p: float, dropout_seed: Tensor | None) -> dict[str, Any]:
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


def _attention_options(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    causal: int,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
) -> dict[str, Any]:
    varlen = cu_seqlens_q is not None
    return {
        "cu_seqlens_q": _address(cu_seqlens_q),
        "cu_seqlens_k": _address(cu_seqlens_k),
        "key_lengths": _address(key_lengths),
        "batch": cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0],
        "seqlen_q": q.shape[0] if varlen else q.shape[1],
        "seqlen_k": k.shape[0] if varlen else k.shape[1],
        "heads": q.shape[-2],
        "head_dim": q.shape[-1],
        "dtype": _DTYPES[q.dtype],
        "causal": causal,
        "scale": scale,
        "sequence_offset": sequence_offset,
        "threads": torch.get_num_threads(),
        **_dropout_options(dropout_p, dropout_seed),
    }


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
    """(out, lse)."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.empty(lse_shape, dtype=torch.float32)
    _C.cpu_attention_fwd(
        q=_address(q),
        k=_address(k),
        v=_address(v),
        out=_address(out),
        lse=_address(lse),
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        out_strides=_strides(out),
        **_attention_options(
            q,
            k,
            cu_seqlens_q,
            cu_seqlens_k,
            key_lengths,
            dropout_seed,
            causal,
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
    """(dq, dk, dv)."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    lse = lse.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    _C.cpu_attention_bwd(
        dout=_address(dout),
        q=_address(q),
        k=_address(k),
        v=_address(v),
        out=_address(out),
        lse=_address(lse),
        dlse=_address(dlse),
        dq=_address(dq),
        dk=_address(dk),
        dv=_address(dv),
        dout_strides=_strides(dout),
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        out_strides=_strides(out),
        **_attention_options(
            q,
            k,
            cu_seqlens_q,
            cu_seqlens_k,
            key_lengths,
            dropout_seed,
            causal,
            dropout_p,
            scale,
            sequence_offset,
        ),
    )
    return dq, dk, dv


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
    weight, bias = _parameter(weight), _parameter(bias)
    y = torch.empty(x.shape, dtype=x.dtype)
    z = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    _C.cpu_layer_norm_fwd(
        x=_address(x),
        residual=_address(residual),
        weight=_address(weight),
        bias=_address(bias),
        y=_address(y),
        z=_address(z),
        mean=_address(mean),
        rstd=_address(rstd),
        dropout_rows=_address(dropout_rows),
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=_DTYPES[x.dtype],
        weight_dtype=_dtype_or(weight, x),
        bias_dtype=_dtype_or(bias, x),
        eps=eps,
        threads=torch.get_num_threads(),
        **_dropout_options(dropout_p, dropout_seed),
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
    weight, bias = _parameter(weight), _parameter(bias)
    dx = torch.empty(z.shape, dtype=z.dtype)
    dresidual = None if dropout_seed is None else torch.empty(z.shape, dtype=z.dtype)
    dweight, dbias = (
        None if p is None else torch.empty(p.shape, dtype=p.dtype) for p in (weight, bias)
    )
    _C.cpu_layer_norm_bwd(
        dy=_address(dy),
        dz=_address(dz),
        z=_address(z),
        weight=_address(weight),
        mean=_address(mean),
        rstd=_address(rstd),
        dx=_address(dx),
        dresidual=_address(dresidual),
        dweight=_address(dweight),
        dbias=_address(dbias),
        dropout_rows=_address(dropout_rows),
        dy_stride=dy.stride(0),
        dz_stride=0 if dz is None else dz.stride(0),
        z_stride=z.stride(0),
        rows=z.shape[0],
        cols=z.shape[1],
        dtype=_DTYPES[z.dtype],
        weight_dtype=_dtype_or(weight, z),
        bias_dtype=_dtype_or(bias, z),
        threads=torch.get_num_threads(),
        **_dropout_options(dropout_p, dropout_seed),
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
        x=_address(x),
        y=_address(y),
        dropout_rows=_address(dropout_rows),
        x_stride=x.stride(0),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=_DTYPES[x.dtype],
        threads=torch.get_num_threads(),
        **_dropout_options(dropout_p, dropout_seed),
    )
    return y


def _epilogue(
    x: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    y: Tensor,
    z: Tensor | None,
) -> None:
    """z = x + b, y = residual + dropout(act(z)); y or z may be x's own memory, z may be
    unwanted."""
    b = _parameter(b)
    _C.cpu_bias_act_fwd(
        x=_address(x),
        bias=_address(b),
        residual=_address(residual),
        y=_address(y),
        z=_address(z),
        dropout_rows=_address(dropout_rows),
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=_DTYPES[x.dtype],
        bias_dtype=_dtype_or(b, x),
        activation=_ACTIVATIONS[activation],
        threads=torch.get_num_threads(),
        **_dropout_options(dropout_p, dropout_seed),
    )


def _epilogue_bwd(
    dy: Tensor,
    z: Tensor | None,
    b: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(dz, db): dz = dropout'(dy) · act'(z), dy itself where there is neither."""
    unchanged = not activation and dropout_seed is None
    if unchanged and b is None:
        return dy, None
    dz = None if unchanged else torch.empty(dy.shape, dtype=dy.dtype)
    db = None if b is None else torch.empty(b.shape, dtype=b.dtype)
    _C.cpu_act_bwd(
        dy=_address(dy),
        z=_address(z if activation else None),
        dz=_address(dz),
        dbias=_address(db),
        dropout_rows=_address(dropout_rows),
        dy_stride=dy.stride(0),
        z_stride=dy.shape[1] if z is None else z.stride(0),
        rows=dy.shape[0],
        cols=dy.shape[1],
        dtype=_DTYPES[dy.dtype],
        bias_dtype=_dtype_or(b, dy),
        activation=_ACTIVATIONS[activation],
        threads=torch.get_num_threads(),
        **_dropout_options(dropout_p, dropout_seed),
    )
    return dy if dz is None else dz, db


def linear_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z); z is empty unless it was asked for and there is an activation."""
    if not activation and residual is None and dropout_seed is None:
        return F.linear(x, w, None if b is None else b.to(x.dtype)), x.new_empty(0)
    # In half precision the bias joins before the one rounding: rounding twice can change the sign
    # of a small z, and with it relu's derivative.
    late_bias = b is not None and x.dtype == torch.float32
    product = F.linear(x, w) if b is None or late_bias else F.linear(x, w, b.to(x.dtype))
    b = b if late_bias else None
    z = product if save_preact and activation else None
    y = product if z is None else torch.empty_like(product)
    _epilogue(product, b, residual, activation, dropout_p, dropout_seed, dropout_rows, y, z)
    return y, x.new_empty(0) if z is None else z


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    z: Tensor,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dw, db)."""
    dz, db = _epilogue_bwd(dy, z, b, activation, dropout_p, dropout_seed, dropout_rows)
    return dz @ w, dz.t() @ x, db


def ffn_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, z)."""
    h, z = linear_fwd(x, w1, b1, None, activation, 0.0, None, None, True)
    y, _ = linear_fwd(h, w2, b2, None, "", dropout_p, dropout_seed, dropout_rows, False)
    return y, z


def ffn_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    z: Tensor,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """(dx, dw1, db1, dw2, db2)."""
    g, db2 = _epilogue_bwd(dy, None, b2, "", dropout_p, dropout_seed, dropout_rows)
    dz, db1 = _epilogue_bwd(g @ w2, z, b1, activation, 0.0, None, None)
    h = torch.empty_like(z)
    _epilogue(z, None, None, activation, 0.0, None, None, h, None)
    return dz @ w1, dz.t() @ x, db1, g.t() @ h, db2
