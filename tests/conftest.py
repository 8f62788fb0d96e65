"""Fixtures that every room's tests share.

Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before the
first import of triton; so this file does it before anything of bertkern is imported.
"""

import contextlib
import importlib.util
import os
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dtypes_in_turn
from emulator import emulated

from bertkern.ops import _backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import quick_interpreter

    quick_interpreter.install()


def pytest_configure(config) -> None:
    """Markers of every room."""
    config.addinivalue_line("markers", dtypes_in_turn.MARKER)


def pytest_report_header() -> list[str]:
    """What is left out, said before what is run."""
    which = "every dtype" if dtypes_in_turn.ALL else "one dtype in turn; BERTKERN_DTYPES=all: every"
    return [f"grids of backends and dtypes: each case on each backend in {which}"]


def pytest_collection_modifyitems(config, items) -> None:
    """Leaves out what only `make test-all` runs."""
    left_out = dtypes_in_turn.choose(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def own_random_numbers(request) -> None:
    """A test's numbers depend on its name alone, not on the tests that ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def device() -> str:
    """The device that the kernels are tested on here."""
    return DEVICE


def pytest_generate_tests(metafunc) -> None:
    """The values of the fixture `backend`. Where it computes on the emulator, "cuda" comes once for
    each of the module's CUDA_CAPABILITIES: 80, unless ops have kernels of their own for others."""
    if "backend" not in metafunc.fixturenames:
        return
    capabilities = getattr(metafunc.module, "CUDA_CAPABILITIES", (80,))
    others = capabilities[1:] if DEVICE == "cpu" else ()
    metafunc.parametrize(
        "backend",
        [
            *(pytest.param((name, capabilities[0]), id=name) for name in _backend.BACKENDS),
            *(pytest.param(("cuda", other), id=f"cuda_sm{other}") for other in others),
        ],
        indirect=True,
    )


@pytest.fixture
def backend(request):
    """Every backend; skipped, with the reason, where it cannot be used on this machine.

    Without a GPU the CUDA kernels run on the emulator, their threads in an order that the test's
    name chooses.
    """
    name, capability = request.param
    reason = _backend.unusable(name, DEVICE)
    with contextlib.ExitStack() as stack:
        if name == "cuda" and DEVICE == "cpu":
            reason = emulated.unusable()
            if reason is None:
                seed = zlib.crc32(request.node.nodeid.encode())
                stack.enter_context(emulated.emulated(seed, capability=capability))
        if reason is not None:
            pytest.skip(f"backend {name}: {reason}")
        yield name


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
