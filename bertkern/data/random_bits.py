"""Random numbers that are a function of what they are for, not of when they are drawn.

    key = derive(derive(seed, epoch), document); uniform(derive(key, 3)) is its third number

`derive` adds to the key a multiple of 2^64 divided by the golden ratio and mixes: for numbers
0, 1, 2, ... these are the states and outputs of the generator SplitMix64 (Steele, Lea and Flood
2014). So examples do not depend on which process makes them, nor on what was made before.
All are arrays of uint64, and of one shape or broadcastable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bits = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.int64)


def derive(key: ArrayLike, number: ArrayLike) -> Bits:
    """The key, or the 64 random bits, with this number (0 or more) below a key."""
    keys = np.atleast_1d(np.asarray(key, dtype=np.uint64))
    numbers = np.atleast_1d(np.asarray(number)).astype(np.uint64)
    bits = keys + (numbers + np.uint64(1)) * _STEP
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


def uniform(bits: Bits) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2^-53."""
    return (bits >> np.uint64(11)) * 2.0**-53


def below(bits: Bits, limit: ArrayLike) -> NDArray[np.int64]:
    """Whole numbers in 0 .. limit - 1, each as likely as the others (to limit / 2^53)."""
    return (uniform(bits) * np.asarray(limit)).astype(np.int64)


def heads(bits: Bits, tosses: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of some tosses of a coin show heads: binomial(tosses, 1/2).

    Args:
        bits: one key for each count.
        tosses: [N], 0 or more.
    """
    words = (tosses + 63) // 64
    owner = np.repeat(np.arange(len(tosses)), words)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(words) - words, words)
    coins = derive(bits[owner], number)
    unused = np.maximum(64 * (number + 1) - tosses[owner], 0)
    coins >>= unused.astype(np.uint64)
    ones = _ONES[coins.view(np.uint8)].reshape(-1, 8).sum(axis=1)
    return np.bincount(owner, weights=ones, minlength=len(tosses)).astype(np.int64)
