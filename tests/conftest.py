"""Fixtures that every room's tests share.

Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before the
first import of triton; so this file does it before anything of bertkern is imported.
"""

import contextlib
import os
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from emulator import emulated

from bertkern.ops import _backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def own_random_numbers(request) -> None:
    """A test's numbers depend on its name alone, not on the tests that ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def device() -> str:
    """The device that the kernels are tested on here."""
    return DEVICE


@pytest.fixture(params=_backend.BACKENDS)
def backend(request):
    """Every backend; skipped, with the reason, where it cannot be used on this machine.

    Without a GPU the CUDA kernels run on the emulator, their threads in an order that the test's
    name chooses.
    """
    reason = _backend.unusable(request.param, DEVICE)
    with contextlib.ExitStack() as stack:
        if request.param == "cuda" and DEVICE == "cpu":
            reason = emulated.unusable()
            if reason is None:
                seed = zlib.crc32(request.node.nodeid.encode())
                stack.enter_context(emulated.emulated(seed))
        if reason is not None:
            pytest.skip(f"backend {request.param}: {reason}")
        yield request.param


@pytest.fixture
def nan_filled_memory():
    """Memory that torch hands out uninitialised is full of NaN, so that an output nobody wrote
    shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
