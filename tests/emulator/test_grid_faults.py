"""Blocks that hand work and values to each other (csrc/ptx/grid.cuh): order and its lack."""

import pytest
import torch
from emulator import emulated, faults
from emulator.faults import Case

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

RACE = "a race on them with"
BOTH = ("first", "second")
ONE_WARP = {"threads": 32, "blocks": 4, "counters": True}
TWO_WARPS = {**ONE_WARP, "threads": 64}
FOUR_WARPS = {**ONE_WARP, "threads": 128, "y_is_written": True}
PAIRS = {**TWO_WARPS, "cluster": 2}
CASES = [
    Case("handed_out_work", 1, RACE, BOTH, {**ONE_WARP, "y_is_written": True}),
    *(Case("turns", fault, RACE, ("sum",), TWO_WARPS) for fault in (1, 2, 3, 4)),
    Case("turns", 5, RACE, ("turn",), TWO_WARPS),
    *(Case("last_block", fault, RACE, BOTH, TWO_WARPS) for fault in (1, 2, 3)),
    *(Case("loaded_by_another_block", n, RACE, BOTH, ONE_WARP) for n in (1, 2, 3)),
    *(Case("stored_by_another_block", n, RACE, BOTH, FOUR_WARPS) for n in (1, 2)),
    *(Case("turns", fault, RACE, ("sum",), PAIRS) for fault in (1, 2, 3, 4)),
    *(Case("last_block", fault, RACE, BOTH, PAIRS) for fault in (1, 2, 3)),
    *(Case("flag", fault, RACE, BOTH, ONE_WARP) for fault in (1, 2)),
    *(Case("waits_for_others", n, "for ever", ("waits",), ONE_WARP) for n in (1, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case):
    case.check_found()


RIGHT = {case.kernel: case.how for case in CASES}


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("resident_blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", RIGHT)
def test_without_the_fault_it_passes(kernel, resident_blocks, cluster):
    """However many blocks there are at a time: those of smaller indices start first."""
    how = {**RIGHT[kernel], "resident_blocks": resident_blocks, "cluster": cluster}
    faults.check_right(kernel, range(5), **how)


def test_results_of_what_is_right():
    for seed in faults.SEEDS:
        x, y = faults.run("handed_out_work", seed=seed, **ONE_WARP)
        assert torch.equal(y, torch.arange(128.0))
        assert x[0] == 128 + 4 * 32
        x, _ = faults.run("turns", seed=seed, **TWO_WARPS)
        assert (x[64:128] == 2 * (2 * (2 * 0 + 1) + 2) + 3).all()
        assert x[0] == 4
        _, y = faults.run("last_block", seed=seed, **TWO_WARPS)
        assert torch.equal(y[:64], 4 * torch.arange(64.0) + 6)
        _, y = faults.run("flag", seed=seed, **ONE_WARP)
        assert (y[:96] == 7).all()
        _, y = faults.run("loaded_by_another_block", seed=seed, **ONE_WARP)
        assert torch.equal(y[:32], 3 * torch.arange(32.0))
        x, _ = faults.run("stored_by_another_block", seed=seed, **FOUR_WARPS)
        assert torch.equal(x[128:256], 5 * torch.arange(128).flip(0).int())


def test_work_is_handed_out_in_different_orders():
    """Which block is the last varies with the seed."""
    said = set()
    for seed in faults.SEEDS:
        with pytest.raises(RuntimeError) as raised:
            faults.run("last_block", 1, seed=seed, resident_blocks=4, **TWO_WARPS)
        said.add(str(raised.value))
    assert len(said) > 5
