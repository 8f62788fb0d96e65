"""What a launch needs to know of the device: its architecture, its guard, its fp32 precision."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton

INTERPRETER = "interpreter"


@lru_cache(maxsize=64)
def _capability(index: int) -> str:
    major, _ = torch.cuda.get_device_capability(index)
    return "sm90" if major >= 9 else "sm80"


def architecture(x: torch.Tensor) -> str:
    """Which rows of the tuning table serve `x`: "sm80", "sm90" or "interpreter".

    The interpreter is chosen by TRITON_INTERPRET=1 when this package is imported, whatever the
    device.
    """
    if triton.knobs.runtime.interpret or not x.is_cuda:
        return INTERPRETER
    return _capability(x.device.index)


def guard(x: torch.Tensor) -> AbstractContextManager:
    """Launches go to the tensor's device, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of fp32 products: "tf32" where torch's own setting asks for it, else "ieee".

    16-bit products are exact in fp32 whatever this says; "ieee" is then only a fixed value.
    """
    if dtype != torch.float32:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision
    return "tf32" if setting == "tf32" else "ieee"
