"""A score over held-out examples with its 95 % interval.

Examples of one document resemble each other, and some share a sentence, so whole documents are
drawn with replacement (the cluster bootstrap; Efron and Tibshirani 1993, Field and Welsh 2007):

    score = sum of the drawn documents' points / sum of their examples
    interval = the 2.5 % and 97.5 % quantiles of the score over DRAWS draws
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Score:
    """A mean over examples, in 0..1, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


def score(points: Sequence[float], documents: Sequence[int], seed: int = 0) -> Score:
    """The mean of the examples' points and its interval.

    Args:
        points: of each example, in 0..1.
        documents: which document each example is from.
        seed: of the draws.

    Raises:
        ValueError: no example, or not as many documents as points.
    """
    if not points or len(points) != len(documents):
        raise ValueError(
            f"{len(points)} points and {len(documents)} documents: as many, at least 1"
        )
    _, group = np.unique(np.asarray(documents), return_inverse=True)
    sums = np.bincount(group, weights=np.asarray(points, dtype=np.float64))
    counts = np.bincount(group)
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=DRAWS)
    low, high = np.quantile((weights @ sums) / (weights @ counts), (0.025, 0.975))
    return Score(float(np.mean(points)), float(low), float(high))
