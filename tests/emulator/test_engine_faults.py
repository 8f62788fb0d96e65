"""The copy engine (csrc/ptx/tma.cuh, fence.cuh): every mistake with its copies is found."""

import pytest
import torch
from emulator import emulated, faults
from emulator.faults import Case

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

RACE = "a race on them with"
BOTH = ("first", "second")
WARP = {"threads": 32}
CASES = [
    *(Case("loaded_over_writes", fault, RACE, BOTH) for fault in (1, 2, 3, 4)),
    *(Case("stages_of_loads", fault, RACE, BOTH) for fault in (1, 2)),
    # Or somebody runs ahead and waits for a phase that is long over.
    *(Case("stages_of_loads", fault, f"{RACE}|phase|for ever") for fault in (3, 4)),
    Case("written_over_loads", 1, RACE, BOTH),
    Case("loaded_twice", 1, RACE, how=WARP),
    *(Case("loaded_from_writes", fault, RACE, BOTH) for fault in (1, 2, 3)),
    Case("written_where_loaded_from", 1, RACE, BOTH),
    *(Case("loaded_over_copies", fault, RACE, BOTH) for fault in (1, 2)),
    *(Case("stored_tile", fault, RACE, BOTH) for fault in (1, 2)),
    *(Case("stored_tile", fault, RACE, ("second", "third")) for fault in (3, 4, 5, 6)),
    Case("stored_tile", 7, "ends", ("second",)),
    *(Case("stored_then_read", fault, RACE, BOTH, {"y_is_written": True}) for fault in (1, 2)),
    Case("stored_twice", 1, RACE, how=WARP),
    Case("load_arguments", 1, "not aligned to 128", ("box",), WARP),
    Case("load_arguments", 2, "not aligned to 1024", ("box",), WARP),
    Case("load_arguments", 3, "out of bounds", ("box",), WARP),
    Case("load_arguments", 4, "out of bounds", ("box",), WARP),
    Case("load_arguments", 5, "24 bytes.*multiple", ("row",), WARP),
    Case("load_arguments", 6, "multiple", ("row",), WARP),
    Case("load_arguments", 7, "multiple", ("row",), WARP),
    Case("load_arguments", 8, "x .*out of bounds", ("row",), WARP),
    Case("load_arguments", 9, "shared memory .*out of bounds", ("row",), WARP),
    Case("load_arguments", 10, "out of bounds", ("box",), WARP),
    Case("load_arguments", 11, "init", ("row",), WARP),
    Case("load_arguments", 12, "rank 2, the box 3", ("rank",), WARP),
    Case("store_arguments", 1, "not aligned to 128", ("box",), WARP),
    Case("store_arguments", 2, "out of bounds", ("box",), WARP),
    Case("store_arguments", 3, "out of bounds", ("box",), WARP),
    Case("store_arguments", 4, "nobody has written", ("box",), WARP),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case):
    case.check_found()


RIGHT = {case.kernel: case.how for case in CASES}


@pytest.mark.parametrize("kernel", RIGHT)
def test_without_the_fault_it_passes(kernel):
    faults.check_right(kernel, **RIGHT[kernel])


def test_results_of_what_is_right():
    """Copies bring, in the end, what the program says: x is 0, 1, ..."""
    x, t = torch.arange(512.0), torch.arange(128)
    assert torch.equal(faults.run("loaded_over_writes")[1], x[(4 * t + 40) % 512])
    loaded = x.view(4, 128).sum(0)
    assert torch.equal(faults.run("stages_of_loads")[1][32:], loaded[32:])
    assert torch.equal(faults.run("written_over_loads")[1], torch.ones(128))
    assert torch.equal(faults.run("loaded_from_writes")[1], 2 * x[:128].flip(0))
    assert torch.equal(faults.run("written_where_loaded_from")[1], x[:128])
    assert torch.equal(faults.run("loaded_over_copies")[1], x[256:384] + x[256:384])
    assert torch.equal(faults.run("stored_tile")[1], x[:128])
    after, y = faults.run("stored_then_read")
    assert torch.equal(y, x[:128])
    assert torch.equal(after[:128], x[:128].flip(0))
    assert torch.equal(faults.run("stored_twice", **WARP)[1], x[128:256])


def test_when_copies_arrive_varies():
    """Without the search for races, a missing wait shows in what comes out."""
    early = torch.stack(
        [
            faults.run("expected_bytes", 3, seed=seed, find_races=False)[1]
            == torch.arange(1.0, 512, 4)
            for seed in range(100)
        ]
    )
    assert 0.02 < early.float().mean() < 0.98
    late = torch.stack(
        [faults.run("stored_tile", 4, seed=seed, find_races=False)[1] == -1 for seed in range(100)]
    )
    assert 0.02 < late.float().mean() < 0.98
