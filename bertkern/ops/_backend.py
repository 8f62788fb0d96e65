"""Chooses who computes an op: one function, `implementation`, and the reasons against every other
choice.

Backends: "cuda" (compiled kernels), "triton", "cpu" (compiled kernels), "reference" (plain
PyTorch). Every backend has functions of the same names and arguments (see `bertkern/reference/`).
Nothing here depends on batch size or lengths: the same sequence is computed by the same kernel in
every batch. float64 is always the reference formula. Where two backends can compute attention on a
GPU, the faster one by head dim and pass is first if `bertkern tune` measured it there.
"""

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Ops of each backend. What is not here goes to the next backend in the order of `_PREFERENCE`.
_LAYER_NORM_OPS = ("layer_norm", "dropout_add_layer_norm")
_PRODUCT_OPS = ("attention", "attention_decode", "linear", "ffn", "linear_cross_entropy")
_ALL_OPS = (*_PRODUCT_OPS, "dropout", "embedding_layer_norm", *_LAYER_NORM_OPS)
_CUDA_OPS = ("attention", "embedding_layer_norm", *_LAYER_NORM_OPS)
_OPS = {"cuda": _CUDA_OPS, "triton": _ALL_OPS, "cpu": _ALL_OPS, "reference": _ALL_OPS}
_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_TRITON_MODULE = {"dropout_add_layer_norm": "layer_norm"}
_CPU_MODULE = {
    "attention_decode": "_cpu_attention_decode",
    "embedding_layer_norm": "_cpu_embedding_layer_norm",
    "ffn": "_cpu_linear",
    "linear": "_cpu_linear",
    "linear_cross_entropy": "_cpu_linear_cross_entropy",
}
_CUDA_MODULE = {
    "attention": "_cuda_attention",
    "embedding_layer_norm": "_cuda_embedding_layer_norm",
}
_MAX_HEAD_DIM = 256
_ALIGNMENT = 16  # bytes
_MAX_TRITON_COLUMNS = 65536

_forced: str | None = None  # process-wide: autograd runs backwards in threads of its own


class backend:
    """Forces a backend inside a `with` block, for every thread of the process.

    `BERTKERN_BACKEND` in the environment, read at the first call of an op, does the same for the
    whole process; the innermost wins.

    Args:
        name: "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: for another name. A forced backend that cannot compute a call makes that call
            raise NotImplementedError, which says why.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r}: allowed are {', '.join(BACKENDS)}")
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> "backend":
        global _forced
        self._outer.append(_forced)
        _forced = self.name
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._outer.pop()


@functools.cache  # a look into os.environ costs as much as the rest of `implementation`
def _environment_backend() -> str | None:
    name = os.environ.get("BERTKERN_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"BERTKERN_BACKEND={name!r}: allowed are {', '.join(BACKENDS)}")
    return name


@functools.cache
def native() -> tuple[ModuleType | None, str | None]:
    """The compiled extension, or None and the reason."""
    try:
        return importlib.import_module("bertkern._C"), None
    except ImportError as error:
        return None, f"the compiled extension bertkern._C cannot be imported ({error})"


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 before the first
    import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unusable(name: str, device_type: str) -> str | None:
    """Why a backend cannot work on tensors of a device type in this process; None when it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if device_type != "cpu":
            return f"its kernels work on cpu tensors, not {device_type}"
        return native()[1]
    if name == "triton":
        if device_type != "cuda" and not (device_type == "cpu" and triton_interpreted()):
            return (
                f"Triton has no {device_type} target; TRITON_INTERPRET=1 in the environment, set "
                "before Python starts, runs its kernels on cpu tensors in the interpreter"
            )
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        return None
    if device_type != "cuda":
        return f"its kernels work on cuda tensors, not {device_type}"
    extension, reason = native()
    if extension is None:
        return reason
    return extension.cuda_unusable()


def backends_of(op: str, device_type: str) -> list[str]:
    """Those that have the op and work here, in the order in which they are asked."""
    return [
        name
        for name in _PREFERENCE[device_type]
        if op in _OPS[name] and unusable(name, device_type) is None
    ]


def cannot(
    name: str,
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int = 0,
    columns: int = 0,
    aligned: bool = True,
) -> str | None:
    """Why a backend cannot compute this call; None when it can."""
    if op not in _OPS[name]:
        return f"it has no {op} kernel"
    reason = unusable(name, device.type)
    if reason is not None:
        return reason
    if name == "reference":
        return None
    if head_dim > _MAX_HEAD_DIM:
        return f"its head dim is at most {_MAX_HEAD_DIM}, not {head_dim}"
    if name == "triton" and triton_interpreted() and dtype == torch.bfloat16 and op in _PRODUCT_OPS:
        return "the Triton interpreter multiplies bfloat16 wrongly in tl.dot"
    if name == "triton" and columns > _MAX_TRITON_COLUMNS:
        return f"its rows have at most {_MAX_TRITON_COLUMNS} columns, not {columns}"
    if name == "cuda" and op == "attention":
        from . import _cuda_attention

        return _cuda_attention.cannot_attention(dtype, head_dim, aligned)
    if name == "cuda":
        from . import _cuda

        return _cuda.cannot_layer_norm(columns)
    return None


def _module(name: str, op: str) -> ModuleType:
    if name == "triton":
        return importlib.import_module(f"bertkern.kernels.{_TRITON_MODULE.get(op, op)}")
    if name == "reference":
        return importlib.import_module(f"bertkern.reference.{_TRITON_MODULE.get(op, op)}")
    if name == "cpu":
        return importlib.import_module(f"bertkern.ops.{_CPU_MODULE.get(op, '_cpu')}")
    return importlib.import_module(f"bertkern.ops.{_CUDA_MODULE.get(op, '_cuda')}")


@functools.cache
def _function(name: str, op: str, function: str) -> Callable[..., Any]:
    return getattr(_module(name, op), function)


def implementation(
    op: str,
    direction: str,
    x: Tensor,
    *,
    head_dim: int = 0,
    columns: int = 0,
    rows: tuple[Tensor, ...] = (),
) -> Callable[..., Any]:
    """The function that computes a call.

    Args:
        op: its name in `bertkern`.
        direction: "_fwd", "_bwd", or "" for an op that is its own backward.
        x: a tensor with the call's device and dtype.
        head_dim, columns: the sizes that decide what a kernel can hold; 0 where they do not apply.
        rows: tensors whose last dimension the CUDA kernels copy 16 bytes at a time.

    Raises:
        NotImplementedError: the forced backend cannot compute it; the message says why.
        ValueError: BERTKERN_BACKEND holds an unknown name.
    """
    forced = _forced or _environment_backend()
    aligned = not x.is_cuda or _aligned(rows)
    return _choose(op, direction, x.dtype, x.device, head_dim, columns, aligned, forced)


def _aligned(tensors: tuple[Tensor, ...]) -> bool:
    """Whether every row of each tensor starts on a multiple of 16 bytes."""
    for t in tensors:
        elements = _ALIGNMENT // t.element_size()
        if t.data_ptr() % _ALIGNMENT or any(stride % elements for stride in t.stride()[:-1]):
            return False
    return True


@functools.cache
def _slower(name: str, op: str, device: torch.device) -> bool:
    """Whether the next backend is asked first on this device, unless it was measured there.

    From compute capability 9 on attention is Triton's until the CUDA kernels for Hopper, which are
    asynchronous by hand, have passed the tests on such a device (docs/decisions.md).
    """
    if name != "cuda" or op != "attention" or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


MEASURED_HEAD_DIMS = (32, 64, 96, 128)  # a smaller one is computed as the next of these


def measured_row(function: str, head_dim: int) -> str:
    """The row of the user's tuning file that holds the backend of a 16-bit pass of attention."""
    return f"{function}/2/{next(d for d in MEASURED_HEAD_DIMS if head_dim <= d)}"


def _measured(function: str, head_dim: int) -> str | None:
    """The backend that `bertkern tune` found faster on this machine's GPU; None: not measured."""
    tuning_file = importlib.import_module("bertkern.kernels.tuning_file")
    name = tuning_file.rows_of_this_gpu().get(measured_row(function, head_dim))
    return name if name in ("cuda", "triton") else None


def forget_choices() -> None:
    """Choose anew at each op's next call: what is measured has changed."""
    _choose.cache_clear()


@functools.lru_cache(maxsize=4096)  # the rules cost more host time than the rest of an op's call
def _choose(
    op: str,
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    columns: int,
    aligned: bool,
    forced: str | None,
) -> Callable[..., Any]:
    function = op + direction
    if dtype not in KERNEL_DTYPES or device.type == "meta":
        return _function("reference", op, function)
    if forced is not None:
        reason = cannot(forced, op, dtype, device, head_dim, columns, aligned)
        if reason is not None:
            raise NotImplementedError(
                f"backend={forced!r} cannot compute {op} on {device.type} in {dtype}: {reason}"
            )
        return _function(forced, op, function)
    able = [
        name
        for name in _PREFERENCE.get(device.type, ("reference",))
        if cannot(name, op, dtype, device, head_dim, columns, aligned) is None
    ]
    first = able[0]
    if op == "attention" and able[:2] == ["cuda", "triton"]:
        first = _measured(function, head_dim) or able[_slower(first, op, device)]
    return _function(first, op, function)
