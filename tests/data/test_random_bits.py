"""Random numbers by their purpose: known values, distributions, independence of neighbours."""

import numpy as np
import pytest
from scipy import stats

from bertkern.data.random_bits import below, derive, heads, uniform

COUNT = 200_000


def test_known_values():
    """The published first outputs of SplitMix64 with the state 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert derive(1234567, np.arange(3)).tolist() == expected


@pytest.mark.parametrize(
    "bits",
    [derive(7, np.arange(COUNT)), derive(derive(np.arange(COUNT), 3), 0), derive(derive(1, 2), 0)],
    ids=["below one key", "below many keys", "one"],
)
def test_uniform(bits):
    numbers = uniform(bits)
    assert ((numbers >= 0) & (numbers < 1)).all()
    if len(bits) > 1:
        assert stats.kstest(numbers, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / np.sqrt(COUNT)
        assert len(np.unique(bits)) == COUNT


def test_below():
    limits = np.tile([1, 2, 7], COUNT // 3)
    drawn = below(derive(5, np.arange(len(limits))), limits)
    for limit in (1, 2, 7):
        counts = np.bincount(drawn[limits == limit], minlength=limit)
        assert len(counts) == limit
        assert limit == 1 or stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("tosses", [0, 1, 5, 63, 64, 65, 200])
def test_heads(tosses):
    counts = heads(derive(9, np.arange(20_000)), np.full(20_000, tosses))
    assert counts.min() >= 0
    assert counts.max() <= tosses
    if tosses:
        levels = np.arange(tosses + 1)
        expected = stats.binom.pmf(levels, tosses, 0.5) * len(counts)
        often = expected > 5
        observed = np.bincount(counts, minlength=tosses + 1)
        rest = observed[~often].sum(), expected[~often].sum()
        found = np.append(observed[often], rest[0]) if rest[1] > 0 else observed
        wanted = np.append(expected[often], rest[1]) if rest[1] > 0 else expected
        assert stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > 1e-4


def test_heads_of_different_numbers_of_tosses_do_not_mix():
    keys, tosses = derive(3, np.arange(5)), np.array([0, 100, 0, 64, 1])
    alone = [int(heads(keys[i : i + 1], tosses[i : i + 1])[0]) for i in range(5)]
    assert heads(keys, tosses).tolist() == alone
