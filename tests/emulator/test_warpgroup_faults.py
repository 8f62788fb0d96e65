"""wgmma and setmaxnreg (csrc/ptx/wgmma.cuh, registers.cuh): every mistake with them is found."""

import pytest
import torch
from emulator import emulated, faults
from emulator.faults import Case

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

RACE = "a race on them with"
BOTH = ("first", "second")
FIVE_WARPS, THREE_GROUPS = {"threads": 160}, {"threads": 384}
CASES = [
    *(Case("product_of_tiles", fault, RACE, BOTH) for fault in (1, 2)),
    Case("product_of_tiles", 3, "for ever.*ended|parted", ("second",)),
    Case("product_of_tiles", 4, "descriptor", ("second",)),
    Case("product_of_tiles", 5, "out of bounds", ("second",)),
    Case("product_of_tiles", 6, "fence", ("second",)),
    Case("product_of_tiles", 7, "fence", ("second",)),
    Case("product_of_tiles", 8, ""),
    Case("product_of_tiles", 9, RACE, ("second", "third")),
    Case("product_of_tiles", 10, "", ("second",)),
    Case("product_of_tiles", 11, "ends", ("second",)),
    Case("product_of_tiles", 12, "", ("second",)),
    Case("product_of_tiles", 13, "", ("second",)),
    Case("warps_of_a_product", 1, "warpgroup", (), FIVE_WARPS),
    Case("product_of_registers", 1, "fence"),
    Case("product_of_registers", 2, ""),
    Case("product_of_registers", 3, "fence"),
    Case("two_groups", 2, "fence", ("second",)),
    Case("products_of_loads", 1, RACE, BOTH, FIVE_WARPS),
    # Or the loading thread waits for a phase that is long over.
    Case("products_of_loads", 2, f"{RACE}|for ever", (), FIVE_WARPS),
    Case("divided_registers", 1, "from 168 to 176", ("lowers",), THREE_GROUPS),
    Case("divided_registers", 2, "from 168 to 160", ("lowers",), THREE_GROUPS),
    Case("divided_registers", 3, "for ever.*registers", ("raises",), THREE_GROUPS),
    Case("product_of_tiles", 15, "aligned to 256"),  # describe_tile of such a place
    Case("product_of_tiles", 17, "a warpgroup has parted: .* wgmma_wait"),  # at two places
    Case("product_of_tiles", 16, "registers"),  # wgmma_wait without those of the product
    Case("divided_registers", 6, "for ever.*registers", ("raises",), THREE_GROUPS),
    Case("divided_registers", 4, "for ever.*registers", ("raises",), THREE_GROUPS),
    Case("divided_registers", 5, "for ever.*ended|parted", ("raises",), THREE_GROUPS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case):
    case.check_found()


RIGHT = {case.kernel: case.how for case in CASES}


@pytest.mark.parametrize("kernel", RIGHT)
def test_without_the_fault_it_passes(kernel):
    faults.check_right(kernel, **RIGHT[kernel])


def tiles():
    """a [64, 16] and b [32, 16] as the kernels write them."""
    rows = (torch.arange(96 * 16) % 13).float().view(96, 16)
    return rows[:64], rows[64:]


def sums_of_threads(d):
    """[128]: of the elements of d [64, 32] that a thread has."""
    t, n = torch.arange(128)[:, None], torch.arange(4).repeat_interleave(2)
    rows = t // 32 * 16 + t % 32 // 4 + torch.tensor([0, 8])
    columns = 8 * n + 2 * (t % 4) + torch.tensor([0, 1]).repeat(4)
    return d[rows[:, :, None], columns[:, None, :]].sum(dim=(1, 2))


def test_results_of_what_is_right():
    a, b = tiles()
    d = a @ b.T
    _, y = faults.run("product_of_tiles")
    assert torch.equal(y, sums_of_threads(d) + sum(range(16)))
    _, y = faults.run("warps_of_a_product", **FIVE_WARPS)
    assert torch.equal(y, sums_of_threads(d))
    _, y = faults.run("two_groups")
    assert torch.equal(y, sums_of_threads(2 * d + (3 * d + 1) + d))


@pytest.mark.parametrize(
    ("kernel", "fault"), [("product_of_tiles", 14), ("two_groups", 1)], ids=["early", "other group"]
)
def test_accumulators_are_nothing_before_the_wait(kernel, fault):
    for seed in faults.SEEDS:
        _, y = faults.run(kernel, fault, seed=seed)
        assert y.isnan().all()


@pytest.mark.parametrize(
    ("threads", "keeps", "keeps_too_many"), [(128, 4, 1), (256, 4, 1), (384, 5, 2), (512, 6, 3)]
)
def test_registers_at_the_start(threads, keeps, keeps_too_many):
    faults.run("registers_at_the_start", keeps, threads=threads)
    with pytest.raises(RuntimeError, match="lower_registers does not raise"):
        faults.run("registers_at_the_start", keeps_too_many, threads=threads)
