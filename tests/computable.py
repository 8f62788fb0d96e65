"""Which calls a backend computes, and the dtypes that tests of exact equality use."""

import pytest
import torch

from bertkern.ops import _backend


def skip_unless_computable(
    op: str, backend: str, dtype: torch.dtype, device: str, head_dim: int = 16
) -> None:
    """Skips, with the reason, a test of a call that `backend` cannot compute."""
    reason = _backend.cannot(backend, op, dtype, torch.device(device), head_dim)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


def finest_dtype(backend: str) -> torch.dtype:
    """The dtype of most digits that attention takes on a backend."""
    return torch.float16 if backend == "cuda" else torch.float32
