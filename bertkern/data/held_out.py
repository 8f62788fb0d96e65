"""A random part of the examples that is not trained on, where a file of its own is missing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def hold_out(
    groups: Sequence[Hashable], share: float = 0.1, seed: int = 0
) -> tuple[list[int], list[int]]:
    """(training, held-out) examples, by number, in their order.

    Args:
        groups: one for each example. Examples of a group, as the questions on one text, stay
            together, so that nothing of what is held out is seen in training.
        share: part of the groups that is held out, at least one of them.
        seed: of the choice.

    Raises:
        ValueError: share is not in 0..1, or there are fewer than two groups.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out must be between 0 and 1, not {share}")
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise ValueError(
            f"{len(groups)} example(s) of {len(names)} text(s): a held-out part needs two texts"
        )
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    held_out = {names[i] for i in chosen}
    sides: tuple[list[int], list[int]] = ([], [])
    for number, group in enumerate(groups):
        sides[group in held_out].append(number)
    return sides
