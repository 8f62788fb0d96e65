"""Native CPU linear of few rows against float64, with each instruction set."""

import math

import pytest
import torch
from csrc.test_rows import ACTIVATIONS
from torch.nn import functional as F

from bertkern import _C
from bertkern.reference.tolerance import assert_close
from csrc import native

# Every width of a tile's edge, vectors that are cut, and depths of one stretch and of several.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 100]
COLUMNS = [1, 2, 3, 7, 8, 12, 13, 47, 48, 49, 200]
# From so many rows on, the columns of a panel, x is packed: other sums, which again know no batch.
PACKED_ROWS = {"baseline": 8, "neon": 8, "avx2": 16, "avx512": 32}
DEPTHS = [1, 3, 4, 7, 8, 9, 16, 17, 768, 1023, 1024, 1025, 1040, 3072, 3083]


def matrix(rows: int, cols: int, room: int = 0) -> torch.Tensor:
    """Random, with rows that are `room` elements apart, NaN between them."""
    whole = torch.full((rows, cols + room), math.nan)
    whole[:, :cols] = torch.randn(rows, cols)
    return whole[:, :cols]


@pytest.mark.parametrize("rows", [7, 64, 100])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_against_float64(isa, depth, activation, rows):
    torch.manual_seed(depth)
    x, w = matrix(rows, depth, depth % 3), matrix(200, depth, depth % 2)
    bias = torch.randn(200) if depth % 4 else None
    y, z = native.linear_fwd(x, w, bias, activation, save_z=depth % 2 == 0, threads=1 + depth % 3)
    z64, z_same = (F.linear(x.to(t), w.to(t)) for t in (torch.float64, torch.float32))
    if bias is not None:
        z64, z_same = z64 + bias, z_same + bias
    apply = ACTIVATIONS[activation]
    assert_close(y, apply(z64), apply(z_same), name="y")
    if z is not None:
        assert_close(z, z64, z_same, name="z")


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_element_does_not_feel_its_neighbours(isa, depth):
    """The same bits in every batch that is packed, or is not; in every cut of the columns; on any
    number of threads."""
    torch.manual_seed(depth)
    x, w, bias = matrix(100, depth), matrix(200, depth), torch.randn(200)
    packed = PACKED_ROWS[isa]
    whole, _ = native.linear_fwd(x, w, bias, _C.Activation.GELU, threads=2)
    few, _ = native.linear_fwd(x[101 - packed :], w, bias, _C.Activation.GELU, threads=2)
    for rows in ROWS:
        for cols in COLUMNS:
            part, _ = native.linear_fwd(
                x[100 - rows :], w[200 - cols :], bias[200 - cols :], _C.Activation.GELU, threads=3
            )
            expected = few if rows < packed else whole
            assert torch.equal(part, expected[len(expected) - rows :, 200 - cols :]), (rows, cols)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [6, 40])
def test_what_is_not_finite_goes_where_it_belongs(isa, bad, rows):
    torch.manual_seed(0)
    x, w = matrix(rows, 40), matrix(30, 40)
    x[4, 39] = bad
    w[7, 3] = bad
    y, _ = native.linear_fwd(x, w, None, _C.Activation.NONE)
    expected = F.linear(x.double(), w.double())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[expected.isinf()], expected[expected.isinf()].float())
    assert not expected[:4, :7].isnan().any()
