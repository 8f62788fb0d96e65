"""Sinusoidal positions against the equation."""

import math

import pytest

from bertkern.nn import sinusoidal_positions


def test_positions():
    """Of any length; sine and cosine interleaved, as the paper's equation."""
    table = sinusoidal_positions(100_001, 6)
    for p in (0, 1, 77, 100_000):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sinusoidal_positions(3, 5).shape == (3, 5)
