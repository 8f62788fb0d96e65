"""mbarriers (csrc/ptx/mbarrier.cuh): phases, bytes, and every mistake with them is found."""

import pytest
import torch
from emulator import emulated, faults
from emulator.faults import Case

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

RACE = "a race on them with"
FOR_EVER = "wait for ever.*barrier_wait"
BOTH = ("first", "second")
WARP, TWO_WARPS, THREE_WARPS = ({"threads": 32 * n} for n in (1, 2, 3))
CASES = [
    *(Case("arrive_and_wait", fault, RACE, BOTH) for fault in (1, 2, 3, 4)),
    Case("arrive_and_wait", 5, FOR_EVER, ("waits",)),
    Case("try_wait", 1, RACE, BOTH),
    # What is seen first depends on who runs ahead: the race, the phase that passed, the deadlock.
    Case("roles_of_warps", 1, f"{RACE}|phase|for ever"),
    Case("roles_of_warps", 2, FOR_EVER, ("waits",)),
    Case("roles_of_warps", 3, FOR_EVER, ("waits",)),
    Case("roles_of_warps", 4, f"{RACE}|phase|for ever"),
    Case("missed_phase", 2, FOR_EVER, ("waits",), TWO_WARPS),
    *(Case("handed_on", fault, RACE, BOTH, THREE_WARPS) for fault in (1, 2)),
    Case("roles_and_named_barriers", 1, RACE, ("written", "first")),
    Case("roles_and_named_barriers", 2, FOR_EVER, ("waits",)),
    Case("roles_and_named_barriers", 3, RACE, BOTH),
    Case("life_of_a_barrier", 1, "fence", ("init",)),
    Case("life_of_a_barrier", 2, "init", ("used",)),
    Case("life_of_a_barrier", 3, "init", ("used",)),
    Case("life_of_a_barrier", 4, "", ("init",)),
    Case("life_of_a_barrier", 5, "init", ("late",)),
    Case("life_of_a_barrier", 7, "barrier", ("again",)),
    Case("barrier_arguments", 1, "0 arrivals.*1 to 1048575", how=WARP),
    Case("barrier_arguments", 2, "1048576 arrivals.*1 to 1048575", how=WARP),
    Case("barrier_arguments", 3, "-1 bytes.*0 to 1048575", how=WARP),
    Case("barrier_arguments", 4, "1048576 bytes.*0 to 1048575", how=WARP),
    Case("barrier_arguments", 5, "aligned to 8", how=WARP),
    Case("barrier_arguments", 6, "x [+] 0 .*out of bounds", how=WARP),
    Case("barrier_arguments", 7, "parity 2.*0 (and|or) 1", how=WARP),
    Case("barrier_arguments", 8, "out of bounds", how=WARP),
    Case("life_of_a_barrier", 6, "barrier", ("words",)),  # its bytes used without an invalidate
    Case("overwritten_barrier", 1, "a barrier is there", (), TWO_WARPS),
    Case("overwritten_barrier", 2, "barrier", how=TWO_WARPS),
    Case("expected_bytes", 1, FOR_EVER, ("waits",)),
    Case("expected_bytes", 2, FOR_EVER, ("waits",)),
    Case("expected_bytes", 3, RACE, BOTH),
    Case("expected_bytes", 4, RACE, BOTH),
    Case("expected_bytes", 5, "copy|load", ("first",)),
    Case("expected_bytes", 6, RACE, BOTH),
    Case("expected_bytes", 7, RACE, BOTH),
    Case("too_many_arrivals", 1, "arriv", ("first",), WARP),
    Case("expecting_orders_nothing", 1, RACE, BOTH, TWO_WARPS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case):
    case.check_found()


RIGHT = {"bytes_in_parts": TWO_WARPS, **{case.kernel: case.how for case in CASES}}


@pytest.mark.parametrize("kernel", RIGHT)
def test_without_the_fault_it_passes(kernel):
    faults.check_right(kernel, **RIGHT[kernel])


def test_results_of_what_is_right():
    """The values that arrivals, waits and copies hand over."""
    x, t = torch.arange(512.0), torch.arange(128)
    _, y = faults.run("arrive_and_wait")
    assert torch.equal(y, 3 * x[(t + 40) % 128] + 3)
    _, y = faults.run("roles_of_warps")
    assert torch.equal(y[32:], (5 * x[(t % 32 + t // 32) % 32] + 10)[32:])
    _, y = faults.run("handed_on", **THREE_WARPS)
    assert (y[64:96] == 1).all()
    _, y = faults.run("roles_and_named_barriers")
    own = x[:64] + x[64:128]
    assert torch.equal(y[96:], own[:32] + own[32:])
    _, y = faults.run("expected_bytes")
    assert torch.equal(y, x[4 * t + 1])
    _, y = faults.run("bytes_in_parts", **TWO_WARPS)
    assert torch.equal(y[:64], x[:64] + x[128:192])


def test_a_phase_that_passes_unseen():
    """Whether a thread sees the phase that it waits for in time is luck; that it waited and did not
    is found, though the end of another phase lets it go on."""
    said = []
    for seed in range(100):
        try:
            faults.run("missed_phase", 1, seed=seed, **TWO_WARPS)
        except RuntimeError as error:
            said.append(str(error))
    assert len(said) > 10
    assert all("it could miss it" in text for text in said)
