"""The generator: its definition, written a second time in numpy, and its statistics.

`dropout_statistics.numpy_bits` is the second writing; the statistics are of it, for its speed.
"""

import functools

import dropout_statistics as statistics
import numpy as np
import pytest
import torch
from dropout_statistics import numpy_bits

from bertkern.reference.dropout import random_bits, threshold_and_scale


def bits(seed, sequence, head, rows, cols):
    return random_bits(
        torch.tensor([seed]),
        torch.tensor(sequence),
        torch.tensor(head),
        torch.arange(rows)[:, None],
        torch.arange(cols)[None],
    )


@pytest.mark.parametrize("seed", [0, 1, -1, 0x1234_5678_9ABC_DEF0, -(2**63)])
@pytest.mark.parametrize(("sequence", "head"), [(0, 0), (3, 11), (70_000, 0xFFFFFFFF)])
def test_definition(seed, sequence, head):
    expected = numpy_bits(seed, sequence, head, range(40), range(70))
    assert (bits(seed, sequence, head, 40, 70).numpy() == expected).all()


KNOWN = ([[55074, 27527, 21893, 13448]], [13259, 26296, 58493, 29767])


def test_known_values():
    """Written down once: a change of the generator changes every user's masks."""
    assert bits(0, 0, 0, 1, 4).tolist() == KNOWN[0]
    assert bits(42, 1, 2, 9, 10)[8, 6:].tolist() == KNOWN[1]


def test_large_coordinates():
    """Only the low 32 bits of a coordinate count, and all of them do."""
    far = [0, 9, 1 << 16, (1 << 31) + 8, (1 << 32) - 1]
    row, col = torch.tensor(far)[:, None], torch.tensor(far)[None]
    zero = torch.tensor(0)
    got = random_bits(torch.tensor([7]), zero, zero, row, col)
    assert (got.numpy() == numpy_bits(7, 0, 0, far, far)).all()
    assert torch.equal(random_bits(torch.tensor([7]), zero, zero, row + (1 << 32), col), got)


@pytest.fixture(scope="module")
def values():
    return statistics.sample(numpy_bits)


def worst(name, bits, values):
    """(largest score, limit) of a family."""
    family = statistics.FAMILIES[name]
    scores = family.scores(bits if family.of_generator else values)
    assert np.isfinite(scores).all()
    return abs(scores).max(), statistics.limit(scores.size)


@pytest.mark.parametrize("name", statistics.FAMILIES)
def test_statistics(name, values):
    """Over 10.5 million values; the limit for n scores is passed by true random bits once in a
    thousand samples."""
    score, limit = worst(name, numpy_bits, values)
    assert score < limit


@pytest.mark.parametrize(
    ("weakness", "names"),
    [
        ("no mixing of the stream", ["bytes", "streams", "runs"]),
        ("no row_b", ["repeats"]),
        ("no first mixing", ["avalanche"]),
        ("no second mixing", ["lags", "partners", "shared states", "rows, columns"]),
        ("no last fold", ["pairs of bytes", "avalanche"]),
        ("one multiplier for both rows", ["pairs of bytes", "lags", "partners", "shared states"]),
        ("keeps too much", ["keep rate"]),
    ],
)
def test_statistics_refuse_weaker_generators(weakness, names):
    """Every family refuses some generator, and every part of the generator is needed."""

    def keeps_too_much(*coordinates):  # one value in 65 that should be dropped at p = 0.1 is not
        bits = numpy_bits(*coordinates)
        return np.where(bits < 100, bits + np.uint16(6500), bits)

    bits = functools.partial(numpy_bits, weakness=weakness)
    if weakness not in statistics.WEAKNESSES:
        bits = keeps_too_much
    families = [statistics.FAMILIES[name] for name in names]
    values = None if all(f.of_generator for f in families) else statistics.sample(bits)
    for name in names:
        score, limit = worst(name, bits, values)
        assert score > limit, name


def test_probability_is_the_one_really_used():
    for p in (0.1, 0.5, 1 / 3, 1e-4):
        threshold, scale = threshold_and_scale(p)
        assert abs(threshold / 65536 - p) <= 0.5 / 65536
        assert scale == pytest.approx(1 / (1 - threshold / 65536), rel=1e-12)
    assert threshold_and_scale(1.0) == (65536, 0.0)
    assert threshold_and_scale(0.0) == (0, 1.0)
