"""How `bertkern tune` compares the backends of attention: Triton's kernels in its interpreter,
CUDA's on the emulator, and a clock that does not run."""

import contextlib
from unittest import mock

import pytest
import torch
from emulator import emulated

pytest.importorskip("triton")

import triton

from bertkern.ops import _backend, _cuda_attention, _tuning


@pytest.fixture
def measure(monkeypatch):
    """BackendsOnGpu on a CPU, with sequences of 9 and 20 tokens and one head."""
    monkeypatch.setattr(_tuning, "_DEVICE", "cpu")
    monkeypatch.setattr(_tuning, "_TOKENS", 40)
    monkeypatch.setattr(_tuning, "_COLUMNS", 32)
    monkeypatch.setattr(_tuning, "_LENGTHS", (9, 20))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton.testing, "do_bench", lambda work, return_mode: 0.003)
    with emulated.emulated(0, 2, capability=90):
        yield _tuning.BackendsOnGpu(torch.device("cpu"))


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_both_backends_agree_and_the_times_of_all_lengths_are_added(measure, direction):
    assert measure("triton", direction, 32) == pytest.approx(6)
    assert measure("cuda", direction, 32) == pytest.approx(6)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_wrong_result_is_rejected(measure, direction):
    measure("triton", direction, 32)
    find = _backend._function

    def find_wrong(name, op, function):
        right = find(name, op, function)

        def wrong(*arguments):
            first, *others = right(*arguments)
            return first * 1.1, *others

        return wrong if function.endswith(direction) else right

    _backend._choose.cache_clear()
    with (
        mock.patch.object(_backend, "_function", find_wrong),
        pytest.raises(_tuning.Rejected, match="differs from Triton's at 9 tokens"),
    ):
        measure("cuda", direction, 32)


def test_a_launch_that_fails_is_rejected(measure):
    measure("triton", "fwd", 32)
    with (
        mock.patch.object(_cuda_attention._C, "cuda_attention_fwd", side_effect=RuntimeError("no")),
        pytest.raises(_tuning.Rejected, match="RuntimeError: no"),
    ):
        measure("cuda", "fwd", 32)
