"""The backend "cuda": hands tensors to the compiled extension's CUDA kernels as addresses and
strides.

Functions, arguments and equations are those of `bertkern/reference/`. Kernels run on the tensors'
device and its current stream, whichever device is current.
"""

import torch
from torch import Tensor

from bertkern import _C

from ..reference.dropout import threshold_and_scale

_DTYPES = {
    torch.float32: _C.DType.FLOAT32,
    torch.float16: _C.DType.FLOAT16,
    torch.bfloat16: _C.DType.BFLOAT16,
}


def cannot_layer_norm(columns: int) -> str | None:
    """Why the kernels cannot take rows of this many columns; None when they can."""
    most = _C.cuda_layer_norm_max_cols()
    if columns > most:
        return f"its rows have at most {most} columns, not {columns}"
    return None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parameter(tensor: Tensor | None, float32: bool) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor.float() if float32 else tensor).contiguous()


def _parameters(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Weight and bias in one dtype: x's if all are, else float32."""
    float32 = any(t is not None and t.dtype != x.dtype for t in tensors)
    return tuple(_parameter(t, float32) for t in tensors)


def _weight_dtype(x: Tensor, *tensors: Tensor | None):
    return _DTYPES[next((t.dtype for t in tensors if t is not None), x.dtype)]


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
    weight, bias = _parameters(x, weight, bias)
    threshold, scale = (0, 1.0) if dropout_seed is None else threshold_and_scale(dropout_p)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    z = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    _C.cuda_layer_norm_fwd(
        x=_address(x),
        residual=_address(residual),
        weight=_address(weight),
        bias=_address(bias),
        y=_address(y),
        z=_address(z),
        mean=_address(mean),
        rstd=_address(rstd),
        dropout_rows=_address(dropout_rows),
        dropout_seed=_address(dropout_seed),
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=_DTYPES[x.dtype],
        weight_dtype=_weight_dtype(x, weight, bias),
        eps=eps,
        dropout_threshold=threshold,
        dropout_scale=scale,
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
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
    weight, bias = _parameters(z, weight, bias)
    threshold, scale = (0, 1.0) if dropout_seed is None else threshold_and_scale(dropout_p)
    dx = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dresidual = None if dropout_seed is None else torch.empty_like(dx)
    dweight, dbias = (None if p is None else torch.empty_like(p) for p in (weight, bias))
    partial = None
    if dweight is not None or dbias is not None:
        partial = torch.empty(
            (_C.cuda_layer_norm_partials(z.shape[0]), 2, z.shape[1]),
            dtype=torch.float32,
            device=z.device,
        )
    _C.cuda_layer_norm_bwd(
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
        partial=_address(partial),
        dropout_rows=_address(dropout_rows),
        dropout_seed=_address(dropout_seed),
        dy_stride=dy.stride(0),
        dz_stride=0 if dz is None else dz.stride(0),
        z_stride=z.stride(0),
        rows=z.shape[0],
        cols=z.shape[1],
        dtype=_DTYPES[z.dtype],
        weight_dtype=_weight_dtype(z, weight, bias),
        dropout_threshold=threshold,
        dropout_scale=scale,
        device=z.device.index,
        stream=torch.cuda.current_stream(z.device).cuda_stream,
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


dropout_add_layer_norm_bwd = _layer_norm_bwd
