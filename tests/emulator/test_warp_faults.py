"""stmatrix and elect.sync (csrc/ptx/store_matrix.cuh, tma.cuh): layout, and every mistake."""

import pytest
import torch
from emulator import emulated, faults
from emulator.faults import Case

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

WARP = {"threads": 32}
MATRICES = ("matrices_stored", "matrices_stored_transposed")
PARTED = "threads 0-8, 10-31 .* wait at .*thread 9 .* has ended"
CASES = [
    *(Case(kernel, 1, "not aligned to 16", how=WARP) for kernel in MATRICES),
    *(Case(kernel, 2, "thread 9 .*out of bounds", how=WARP) for kernel in MATRICES),
    *(Case(kernel, 3, PARTED, how=WARP) for kernel in MATRICES),
    *(Case(kernel, 4, "a warp has parted", how=WARP) for kernel in MATRICES),
    *(Case(kernel, 5, "a race on them with", how=WARP) for kernel in MATRICES),
    *(Case(kernel, 6, "a race on them with", how=WARP) for kernel in MATRICES),
    Case("elected", 1, "threads 32-39, 41-63 .* wait at elect_one", ("elects",)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case):
    case.check_found()


@pytest.mark.parametrize("transposed", [False, True])
def test_layout(transposed):
    """Lane l gives elements 2 (l % 4) and the next of row, or column, l / 4 of each matrix."""
    elements = torch.randperm(512 * 2).to(torch.int16)
    words = elements.view(512, 2)[:128].reshape(32, 4, 2)  # [lane, matrix, two elements]
    expected = torch.zeros(4, 8, 8, dtype=torch.int16)
    for lane in range(32):
        for matrix in range(4):
            for i in range(2):
                row, column = lane // 4, 2 * (lane % 4) + i
                if transposed:
                    row, column = column, row
                expected[matrix, row, column] = words[lane, matrix, i]
    x = elements.view(torch.float32)
    for seed in faults.SEEDS:
        _, y = faults.run(MATRICES[transposed], seed=seed, x=x, **WARP)
        assert torch.equal(y.view(torch.int16).view(4, 8, 8), expected)


def test_one_lane_is_elected():
    for seed in faults.SEEDS:
        _, y = faults.run("elected", seed=seed)
        assert torch.equal(y.view(4, 32).sum(1), torch.ones(4))
        assert set(y.tolist()) == {0, 1}
