"""Parametrizes the fuzz tests: which case numbers, and the command that runs one of them alone.

BERTKERN_FUZZ_CASES   cases of each op (`make test-all`: 500); a small sample without it
BERTKERN_FUZZ_OPS     only these ops, their names joined by commas
BERTKERN_FUZZ_BACKEND the backend that is tested: "triton" (default), or another that works here
"""

import contextlib
import os
from collections.abc import Callable

import pytest
import torch
from emulator import emulated

from bertkern.ops import _backend

from .case import BACKEND, Case, check
from .draw import Draw

Generator = Callable[[Draw], Case]


def cases(generators: dict[Generator, int]) -> pytest.MarkDecorator:
    """One test for each case of each generator; the numbers are the sample of `make test`."""
    asked, ops = os.environ.get("BERTKERN_FUZZ_CASES"), os.environ.get("BERTKERN_FUZZ_OPS")
    return pytest.mark.parametrize(
        ("generator", "number"),
        [
            pytest.param(generator, number, id=f"{generator.__name__}-{number}")
            for generator, sample in generators.items()
            if not ops or generator.__name__ in ops.split(",")
            for number in range(int(asked) if asked else sample)
        ],
    )


def run_case(file: str, generator: Generator, number: int, device: str) -> None:
    """Draws and checks one case; where there is no GPU the CUDA kernels run on the emulator, those
    for Ampere and those for Hopper in turn."""
    emulate = BACKEND == "cuda" and device == "cpu"
    reason = emulated.unusable() if emulate else _backend.unusable(BACKEND, device)
    if reason is not None:
        pytest.skip(f"backend {BACKEND}: {reason}")
    name = generator.__name__
    rerun = (
        f"BERTKERN_FUZZ_CASES={number + 1} BERTKERN_FUZZ_BACKEND={BACKEND} python -m pytest "
        f"'tests/fuzz/{file}::test_case[{name}-{number}]'"
    )

    def make(attempt: int) -> Case:
        return generator(Draw(name, number, device, attempt, cuda=BACKEND == "cuda"))

    with contextlib.ExitStack() as stack:
        # An op that draws its own seed takes it from torch's generator.
        stack.enter_context(torch.random.fork_rng())
        if emulate:
            stack.enter_context(emulated.emulated(seed=number, capability=(80, 90)[number % 2]))
        check(make, rerun)
