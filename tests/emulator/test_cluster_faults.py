"""Clusters (csrc/ptx/cluster.cuh): blocks reach each other, and every mistake with it is found."""

import pytest
import torch
from emulator import emulated, faults
from emulator.faults import Case

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

RACE = "a race on them with"
BOTH = ("first", "second")
PAIRS = {"threads": 32, "blocks": 4, "cluster": 2}
CASES = [
    Case("written_by_others", 1, "start", ("first",), PAIRS),
    Case("written_by_others", 2, RACE, BOTH, PAIRS),
    Case("written_by_others", 3, "rank 2", ("place",), PAIRS),
    Case("written_by_others", 4, "that block has ended|ends while", (), {**PAIRS, "blocks": 2}),
    Case("written_by_others", 5, "for ever.*cluster_wait", ("waits",), PAIRS),
    Case("written_by_others", 6, "cluster_arrive", (), PAIRS),
    Case("written_by_others", 7, "cluster_wait", ("early",), PAIRS),
    Case("written_by_others", 8, f"{RACE}|end", ("first",), PAIRS),
    Case("read_by_others", 1, f"start|{RACE}", ("second",), PAIRS),
    Case("read_by_others", 2, "end|exit", (), PAIRS),
    Case("read_by_others", 3, f"start|{RACE}", ("second",), PAIRS),
    Case("read_by_others", 4, RACE, ("third",), PAIRS),
    *(Case("arrivals_of_others", fault, RACE, BOTH, PAIRS) for fault in (1, 2, 3)),
    Case("arrivals_of_others", 4, "init", ("used",), PAIRS),
    Case("copied_to_others", 1, RACE, BOTH, PAIRS),
    Case("copied_to_others", 2, RACE, ("second", "third"), PAIRS),
    Case("copied_to_others", 3, "barrier", ("second",), PAIRS),
    Case("copied_to_others", 4, RACE, ("second", "fourth"), PAIRS),
    Case("copied_to_others", 5, "out of bounds", ("second",), PAIRS),
    Case("copied_to_others", 6, "end|exit", (), PAIRS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case):
    case.check_found()


RIGHT = ("ranks", *dict.fromkeys(case.kernel for case in CASES))


@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("kernel", RIGHT)
def test_without_the_fault_it_passes(kernel, cluster):
    faults.check_right(kernel, **{**PAIRS, "cluster": cluster})


@pytest.mark.parametrize("resident_blocks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_clusters_are_there_as_a_whole(cluster, resident_blocks):
    """However few blocks the machine is told to run at a time."""
    how = {**PAIRS, "cluster": cluster, "resident_blocks": resident_blocks}
    block, t = torch.arange(128) // 32, torch.arange(128) % 32
    rank, before = block % cluster, (block - 1) % cluster
    for seed in range(5):
        _, y = faults.run("ranks", seed=seed, **how)
        assert torch.equal(y, (10 * rank + cluster).float())
        _, y = faults.run("written_by_others", seed=seed, **how)
        assert torch.equal(y, ((t + 1) % 32 + before).float())
        _, y = faults.run("arrivals_of_others", seed=seed, **how)
        assert torch.equal(y, ((t + 1) % 32 + before).float())
        _, y = faults.run("copied_to_others", seed=seed, **how)
        assert torch.equal(y, (t + 100 * before).float())
        _, y = faults.run("read_by_others", seed=seed, **how)
        after = (block + 1) % cluster
        last = (4 * t + 3 + after).float().view(torch.int32) >> 24
        assert torch.equal(y, 2.0 * (t + after) + last)


def test_a_grid_is_of_whole_clusters():
    with pytest.raises(ValueError, match="cluster"):
        faults.run("ranks", threads=32, blocks=3, cluster=2)
