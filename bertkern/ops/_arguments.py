"""Checks that ops share. Every error names the argument, the value received and what is allowed."""

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling

from ..reference.activation import ACTIVATIONS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(op: str, name: str, value: object) -> None:
    """TypeError unless it is a floating-point tensor of a dtype that the ops compute in, and not
    nested."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{op}: {name} is a nested tensor; give its values(), and for attention its offsets() "
            "as cu_seqlens to attention_varlen"
        )
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} has dtype {value.dtype}; allowed are float16, bfloat16, float32, float64"
        )


def check_same(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """The tensors share the first one's dtype (TypeError) and device (ValueError)."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        check_tensor(op, name, tensor)
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}, but {first_name} has {first.dtype}; "
                "they must be equal"
            )
        check_device(op, first_name, first, name, tensor)


def check_device(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.device != first.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, but {first_name} is on {first.device}; "
            "they must be on one device"
        )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has exactly this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must be {list(shape)}")


def check_index_tensor(
    op: str,
    name: str,
    value: object,
    like: Tensor,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> None:
    """An integer tensor of one dtype (TypeError), on like's device and of one shape
    (ValueError)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{op}: {name} is a nested tensor; it must be a plain one")
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}; it must be {dtype}")
    check_device(op, "the input", like, name, value)
    if shape is not None:
        check_shape(op, name, value, shape)
    elif value.dim() != 1:
        raise ValueError(f"{op}: {name} has {value.dim()} dimensions; it must have 1")


def check_activation(op: str, activation: object, optional: bool) -> str:
    """The activation's name; "" for None where it is optional."""
    if activation is None and optional:
        return ""
    if activation not in ACTIVATIONS:
        allowed = ", ".join(repr(a) for a in ((None, *ACTIVATIONS) if optional else ACTIVATIONS))
        raise ValueError(f"{op}: activation={activation!r}; allowed are {allowed}")
    return str(activation)


def dropout_seed_for(
    op: str, x: Tensor, dropout_p: float, dropout_seed: Tensor | None, usual: int = 0
) -> Tensor | None:
    """The seed that the kernels read; None when nothing is dropped.

    A seed that was not given is drawn here by a plain torch op on x's device: `torch.manual_seed`,
    recomputation in checkpointing and replay of CUDA graphs see an ordinary random op, and nothing
    synchronises. usual: what `usual_call` said of x and dropout_seed.
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p={dropout_p}; it must be between 0 and 1")
    if dropout_seed is not None and not usual:
        if not isinstance(dropout_seed, Tensor):
            raise TypeError(
                f"{op}: dropout_seed must be an int64 tensor of one element on {x.device}, "
                f"not {type(dropout_seed).__name__}"
            )
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            raise ValueError(
                f"{op}: dropout_seed is {dropout_seed.dtype} of shape {list(dropout_seed.shape)}; "
                "it "
                "must be int64 with one element"
            )
        check_device(op, "the input", x, "dropout_seed", dropout_seed)
    if dropout_p == 0.0:
        return None
    if dropout_seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return dropout_seed


def check_dropout_rows(op: str, x: Tensor, rows: int, dropout_rows: Tensor | None) -> Tensor | None:
    """dropout_rows as int64 [rows]: each token's row in the padded layout, or None."""
    if dropout_rows is None:
        return None
    check_index_tensor(op, "dropout_rows", dropout_rows, x, None, torch.int64)
    check_shape(op, "dropout_rows", dropout_rows, (rows,))
    return dropout_rows.contiguous()


def autocasts(first: object) -> bool:
    """Whether `to_autocast_dtype` may have something to do; False for what is no tensor."""
    return (is_dynamo_compiling() or _is_any_autocast_enabled()) and isinstance(first, Tensor)


def to_autocast_dtype(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors cast as `torch.autocast` asks of a matrix product on their device, or as they
    are."""
    tensors = (first, *others)
    if first.is_cuda or first.is_cpu:  # asked first because `device.type` makes a string
        device_type = "cuda" if first.is_cuda else "cpu"
    else:
        device_type = first.device.type
        if not torch.amp.is_autocast_available(device_type):
            return tensors
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else one contiguous copy."""
    if tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def vector(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias [n] as the kernels read it: with unit stride; None stays None."""
    return None if parameter is None else unit_last_stride(parameter)


def as_rows(x: Tensor) -> Tensor:
    """[..., columns] -> [rows, columns] with unit last stride, without a copy where strides
    allow."""
    if x.dim() != 2:
        x = x.flatten(0, -2) if x.dim() > 2 else x[None]
    return unit_last_stride(x)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """[rows, columns] -> [..., columns] with like's leading dimensions: `as_rows` undone."""
    return rows if like.dim() == 2 else rows.reshape(*like.shape[:-1], rows.shape[-1])
