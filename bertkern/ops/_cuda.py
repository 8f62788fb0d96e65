"""The backend "cuda": hands tensors to the compiled extension's CUDA kernels as addresses and
strides.

Functions, arguments and equations are those of `bertkern/reference/`. Kernels run on the tensors'
device and its current stream, whichever device is current. Arguments of the extension's functions
stand in the order of `bertkern/_C.pyi`, without their names, as in `_cpu.py`.
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


def cannot_layer_norm(columns: int) -> str | None:
    """Why the kernels cannot take rows of this many columns; None when they can."""
    most = _C.cuda_layer_norm_max_cols()
    if columns > most:
        return f"its rows have at most {most} columns, not {columns}"
    return None


def address(tensor: Tensor | None) -> int:
    """Where its elements are; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def place(tensor: Tensor) -> tuple[int, int]:
    """The last arguments of every kernel: the tensor's device and its current stream."""
    device = tensor.device
    return device.index, torch.cuda.current_stream(device).cuda_stream


def parameters(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Weight and bias in one dtype: x's if all are, else float32; and that dtype's code."""
    dtype = x.dtype
    if any(t is not None and t.dtype != dtype for t in tensors):
        dtype = torch.float32
    return *(None if t is None else t.to(dtype).contiguous() for t in tensors), DTYPES[dtype]


def dropout_options(dropout_p: float, dropout_seed: Tensor | None) -> tuple[int, float]:
    """dropout_threshold and dropout_scale; without a seed nothing is dropped."""
    return (0, 1.0) if dropout_seed is None else threshold_and_scale(dropout_p)


def partial_sums(rows: int, like: Tensor, *gradients: Tensor | None) -> Tensor | None:
    """What a backward of the LayerNorm family sums weight's and bias's gradients in, or None."""
    if all(gradient is None for gradient in gradients):
        return None
    shape = (_C.cuda_layer_norm_partials(rows), 2, like.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def in_dtype_of(
    gradients: tuple[Tensor | None, ...], likes: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Gradients of weight and bias in the dtypes of these."""
    return [
        None if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, likes, strict=True)
    ]


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
    weight, bias, weight_dtype = parameters(x, weight, bias)
    rows, cols = x.shape
    y = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    z = None if residual is None else torch.empty_like(y)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    _C.cuda_layer_norm_fwd(
        address(x),
        address(residual),
        address(weight),
        address(bias),
        address(y),
        address(z),
        address(mean),
        address(rstd),
        address(dropout_rows),
        address(dropout_seed),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        rows,
        cols,
        DTYPES[x.dtype],
        weight_dtype,
        eps,
        *dropout_options(dropout_p, dropout_seed),
        *place(x),
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
    given = (weight, bias)
    weight, bias, weight_dtype = parameters(z, weight, bias)
    dx = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dresidual = None if dropout_seed is None else torch.empty_like(dx)
    dweight, dbias = (None if p is None else torch.empty_like(p) for p in (weight, bias))
    partial = partial_sums(z.shape[0], z, dweight, dbias)
    _C.cuda_layer_norm_bwd(
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
        address(partial),
        address(dropout_rows),
        address(dropout_seed),
        dy.stride(0),
        0 if dz is None else dz.stride(0),
        z.stride(0),
        z.shape[0],
        z.shape[1],
        DTYPES[z.dtype],
        weight_dtype,
        *dropout_options(dropout_p, dropout_seed),
        *place(z),
    )
    dweight, dbias = in_dtype_of((dweight, dbias), given)
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
