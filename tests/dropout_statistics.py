"""Statistics of the dropout generator (`bertkern/reference/dropout.py`), and the generator a second
time, in numpy.

Every statistic is a score that true random bits would draw from the normal distribution N(0, 1).
FAMILIES lists them; a family of n scores is refused when one of them is beyond limit(n), which true
random bits do with odds FALSE_ALARM for the whole family (Bonferroni).

`python tests/dropout_statistics.py` prints the tables of docs/numerics.md (some minutes: it walks
through all 2^32 mixed states).

Legend: values uint16 [streams, SIZE, SIZE], one stream for each (seed, sequence, head); dropped =
value < threshold, with probability q. The four elements {row, row ^ 8} x {col, col ^ 8} have one
mixed state.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

U32 = np.uint32
Bits = Callable[..., NDArray[np.uint16]]

SIZE = 512
SEEDS = (0, 1, -1, 1 << 32, 0x1234_5678_9ABC_DEF0)
STREAMS = [(seed, i, h) for seed in SEEDS for i in (0, 1) for h in (0, 1, 2, 3)]  # 10.5e6 values
PROBABILITIES = (0.01, 0.1, 0.5)
SHIFTS = (0, 1, 2, 4, 8, 16, 64, 128)  # of rows and columns; cyclic, so below SIZE / 2
FALSE_ALARM = 1e-3

_GOLDEN, _SECOND_START = U32(0x9E3779B9), U32(0x85EBCA6B)
_MUL_A, _MUL_B, _MUL_C = U32(0x7FEB352D), U32(0x846CA68B), U32(0xC2B2AE35)


def _mix(x):
    x = x ^ (x >> U32(16))
    x = x * _MUL_A
    x = x ^ (x >> U32(15))
    x = x * _MUL_B
    return x ^ (x >> U32(16))


def _group(i):
    return ((i >> U32(4)) << U32(3)) | (i & U32(7))


def numpy_bits(seed, sequence, head, rows, cols, weakness=""):
    """The definition in uint32, for rows × cols; `weakness` leaves one part of it out."""
    one = lambda value: np.array([value & 0xFFFFFFFF], dtype=U32)  # noqa: E731
    low, high, sequence, head = one(seed), one(seed >> 32), one(sequence), one(head)
    row, col = np.asarray(rows, dtype=U32)[:, None], np.asarray(cols, dtype=U32)[None]
    if weakness == "no mixing of the stream":
        a, b = _mix(low ^ high ^ sequence ^ head), _mix(low + high + sequence + head)
    else:
        a = _mix(_mix(_mix(_mix(low + _GOLDEN) ^ high) ^ sequence) ^ head)
        b = _mix(_mix(_mix(_mix(high + _SECOND_START) ^ low) ^ head) ^ sequence)
    row_a, row_b = _mix(a ^ _group(row)), _mix(b + _group(row) * _GOLDEN)
    if weakness == "no row_b":
        row_b = U32(0)
    x = row_a + _group(col) * _GOLDEN
    if weakness != "no first mixing":
        x ^= x >> U32(16)
        x *= _MUL_A
        x ^= x >> U32(15)
    x = x ^ row_b
    if weakness == "one multiplier for both rows":
        x = x * _MUL_B
    elif weakness != "no second mixing":
        x = x * np.where((row >> U32(3)) & U32(1) == 1, _MUL_C, _MUL_B)
    if weakness != "no last fold":
        x ^= x >> U32(16)
    high_half = (col >> U32(3)) & U32(1) == 1
    return np.where(high_half, x >> U32(16), x & U32(0xFFFF)).astype(np.uint16)


WEAKNESSES = (
    "no mixing of the stream",
    "no row_b",
    "no first mixing",
    "no second mixing",
    "no last fold",
    "one multiplier for both rows",
)


def limit(count: int) -> float:
    """What one of `count` scores exceeds in absolute value with odds FALSE_ALARM."""
    return -NormalDist().inv_cdf(FALSE_ALARM / (2 * count))


def sample(bits: Bits) -> NDArray[np.uint16]:
    """values of all STREAMS."""
    return np.stack([bits(*stream, range(SIZE), range(SIZE)) for stream in STREAMS])


def threshold(p: float) -> int:
    """The value below which an element is dropped."""
    return round(p * 65536)


def _chi_square_score(observed, expected):
    """Of counts whose sum is known (Wilson and Hilferty 1931); along the last dimension. Cells that
    expect fewer than ten are one cell."""
    small = expected < 10
    if small.any():
        observed, expected = (
            np.append(t[..., ~small], t[..., small].sum(-1, keepdims=True), -1)
            for t in (observed, expected)
        )
    freedom = expected.shape[-1] - 1
    chi_square = ((observed - expected) ** 2 / expected).sum(-1)
    middle = 2 / (9 * freedom)
    return np.atleast_1d(((chi_square / freedom) ** (1 / 3) - (1 - middle)) / middle**0.5)


def _product_score(both, first, second, count, q):
    """Score of sum (d - q)(d' - q) over `count` pairs, from the numbers of pairs in which both, the
    first and the second are dropped; the skewness of a sum of few drops is taken off (Cornish and
    Fisher 1938)."""
    variance = q * (1 - q)
    z = (both - q * (first + second) + q * q * count) / (variance * count**0.5)
    skewness = (1 - 2 * q) ** 2 / variance / count**0.5
    return z - skewness / 6 * (z * z - 1)


def keep_rate(values):
    """Number of dropped elements of all streams and of each."""
    scores = []
    for p in PROBABILITIES:
        q = threshold(p) / 65536
        counts = np.count_nonzero(values < threshold(p), axis=(1, 2))
        variance = values[0].size * q * (1 - q)
        scores.append((counts - values[0].size * q) / variance**0.5)
        scores.append([(counts.sum() - values.size * q) / (variance * len(values)) ** 0.5])
    return np.concatenate(scores)


def value_bytes(values):
    """Low and high byte of each stream, 256 cells each; and all 65,536 values, over all streams."""
    counts = np.stack([np.bincount(v.ravel(), minlength=65536) for v in values])
    table = counts.reshape(len(values), 256, 256)
    expected = np.full(256, values[0].size / 256)
    both = [_chi_square_score(table.sum(dim), expected) for dim in (1, 2)]
    whole = _chi_square_score(counts.sum(0), np.full(65536, values.size / 65536))
    return np.concatenate([*both, whole])


def byte_pairs(values):
    """The high bytes of an element and of a partner in 65,536 cells."""
    scores = []
    high = (values >> 8).astype(np.uint16)
    for rows, cols in ((0, 1), (1, 0), (0, 8), (8, 0), (8, 8)):
        index = np.arange(SIZE)
        partner = high[:, index ^ rows][:, :, index ^ cols]
        first = (index & rows == 0)[:, None] & ((index & cols == 0) | (rows > 0))[None]
        pairs = (high[:, first] << 8) | partner[:, first]
        counts = np.bincount(pairs.ravel(), minlength=65536)
        scores.append(_chi_square_score(counts, np.full(65536, pairs.size / 65536)))
    return np.concatenate(scores)


def rows_and_columns(values):
    """Sums of rows and of columns: sum of their squares."""
    scores = []
    for p in PROBABILITIES:
        q = threshold(p) / 65536
        variance = q * (1 - q)
        for dim in (1, 2):
            sums = np.count_nonzero(values < threshold(p), axis=dim) - SIZE * q
            excess = (1 / variance - 6) / SIZE  # a binomial's fourth moment, beyond the normal's 3
            chi_square = (sums**2).sum() / (SIZE * variance)
            scores.append((chi_square - sums.size) / ((2 + excess) * sums.size) ** 0.5)
    return np.array(scores)


def _partner_scores(values, move, share):
    """Products with partners that `move(array, shift, axis)` brings; a pair is met 1 / share
    times."""
    scores = []
    for p in PROBABILITIES:
        dropped, q = values < threshold(p), threshold(p) / 65536
        total, count = np.count_nonzero(dropped), dropped.size * share
        for cols in SHIFTS:
            moved = move(dropped, cols, 2)
            for rows in SHIFTS:
                if rows or cols:
                    both = np.count_nonzero(dropped & move(moved, rows, 1)) * share
                    scores.append(_product_score(both, total * share, total * share, count, q))
    return np.array(scores)


def lags(values):
    """Elements (row, col) and (row + r, col + c), for r and c in SHIFTS."""
    return _partner_scores(values, lambda t, shift, axis: np.roll(t, -shift, axis), 1)


def partners(values):
    """Elements (row, col) and (row ^ r, col ^ c), for r and c in SHIFTS."""
    index = np.arange(SIZE)
    return _partner_scores(values, lambda t, shift, axis: t.take(index ^ shift, axis), 0.5)


def states(values):
    """Which of the four elements of a state are dropped: 16 outcomes."""
    scores = []
    low = np.flatnonzero(np.arange(SIZE) & 8 == 0)
    number = np.array([bin(outcome).count("1") for outcome in range(16)])
    for p in PROBABILITIES:
        q = threshold(p) / 65536
        dropped = (values < threshold(p)).astype(np.uint8)
        outcome = sum(
            dropped[:, low + r][:, :, low + c] << np.uint8(r // 4 + c // 8)
            for r in (0, 8)
            for c in (0, 8)
        )
        counts = np.bincount(outcome.ravel(), minlength=16)
        expected = outcome.size * q**number * (1 - q) ** (4 - number)
        scores.append(_chi_square_score(counts, expected))
    return np.concatenate(scores)


def streams(values):
    """Every two streams (heads, sequences, seeds), at four lags between them."""
    scores = []
    for p in PROBABILITIES:
        dropped, q = values < threshold(p), threshold(p) / 65536
        flat = dropped.reshape(len(values), -1).astype(np.float32)
        totals, count = flat.sum(1), flat.shape[1]
        for lag in ((0, 0), (0, 1), (1, 0), (8, 8)):
            moved = np.roll(dropped, lag, (1, 2)).reshape(flat.shape).astype(np.float32)
            both = flat @ moved.T  # whole numbers below 2^24
            z = _product_score(both.astype(float), totals[:, None], totals[None], count, q)
            different = np.tri(len(values), k=-1, dtype=bool)
            scores.append(z[different] if lag == (0, 0) else z[different | different.T])
    return np.concatenate(scores)


def runs(values):
    """Distances from one dropped element to the next, along rows and along columns."""
    scores = []
    for p in PROBABILITIES:
        q = threshold(p) / 65536
        for order in (values, values.transpose(0, 2, 1)):
            gaps = np.diff(np.flatnonzero(order.ravel() < threshold(p)))
            longest = int(np.log(10 / len(gaps)) / np.log(1 - q))
            counts = np.bincount(np.minimum(gaps, longest), minlength=longest + 1)[1:]
            expected = len(gaps) * q * (1 - q) ** np.arange(longest)
            expected[-1] = len(gaps) * (1 - q) ** (longest - 1)  # this long or longer
            scores.append(_chi_square_score(counts, expected))
    return np.concatenate(scores)


def avalanche(bits: Bits):
    """Each bit of each input flipped alone: how often each of the 16 output bits flips."""
    side = np.arange(128)
    scores = []
    for base in ((0, 0, 0), (-(2**63) + 12345, 7, 3)):
        before = bits(*base, side, side)
        inputs = [*base, side, side]
        for i, width in enumerate((64, 32, 32, 32, 32)):
            for k in range(width):
                flipped = inputs.copy()
                flipped[i] = inputs[i] ^ (1 << k)
                changed = (before ^ bits(*flipped)).ravel()
                counts = np.array([np.count_nonzero(changed & (1 << bit)) for bit in range(16)])
                # A row or column whose partner lies in the tile too: every pair is met twice.
                times = 2 if i > 2 and 1 << k < side.size else 1
                scores.append((counts - changed.size / 2) / (times * changed.size / 4) ** 0.5)
    return np.concatenate(scores)


def repeats(bits: Bits):
    """Stretches of 64 bits that occur twice among 2^20: random bits give one in 3e7 such samples.

    Rows whose first keys lie on the same stretch of the sequence of col * golden would give
    hundreds.
    """
    rows = np.arange(1 << 15)
    rows = rows[rows & 8 == 0]
    cols = np.arange(130 + 16)
    v = bits(3, 0, 0, rows, cols).astype(np.uint64)
    low = cols[(cols & 8 == 0) & (cols < 128)]
    following = np.where(low & 7 == 7, low + 9, low + 1)  # the next group
    word = sum(v[:, c] << np.uint64(16 * i) for i, c in enumerate((low, low ^ 8)))
    word |= sum(v[:, c] << np.uint64(32 + 16 * i) for i, c in enumerate((following, following ^ 8)))
    word = np.sort(word, axis=None)
    return np.array([float(np.count_nonzero(word[1:] == word[:-1]))])


def state_outcomes():
    """How many of the 2^32 states drop which of their four elements: counts [probability, 16].

    Exact, where `states` is a sample: with every state equally likely, all that the multipliers
    and halves do.
    """
    counts = np.zeros((len(PROBABILITIES), 16), dtype=np.int64)
    low_half = U32(0xFFFF)
    for start in range(0, 1 << 32, 1 << 20):
        x = np.arange(start, start + (1 << 20), dtype=U32)
        elements = []
        for multiplier in (_MUL_B, _MUL_C):
            y = x * multiplier
            y ^= y >> U32(16)
            elements += [(y & low_half).astype(np.uint16), (y >> U32(16)).astype(np.uint16)]
        for i, p in enumerate(PROBABILITIES):
            outcome = np.zeros(x.size, dtype=np.uint8)
            for k, element in enumerate(elements):
                outcome |= (element < threshold(p)).view(np.uint8) << np.uint8(k)
            counts[i] += np.bincount(outcome, minlength=16)
    return counts


def state_correlations(counts, p):
    """The largest correlation of two, three and four elements of a state, in absolute value."""
    q = threshold(p) / 65536
    largest = dict.fromkeys((2, 3, 4), 0.0)
    for subset in range(16):
        members = [k for k in range(4) if subset >> k & 1]
        if len(members) > 1:
            product = sum(
                int(counts[outcome]) * np.prod([(outcome >> k & 1) - q for k in members])
                for outcome in range(16)
            )
            size = abs(product / counts.sum() / (q * (1 - q)) ** (len(members) / 2))
            largest[len(members)] = max(largest[len(members)], size)
    return largest


class Family(NamedTuple):
    """A statistic of one kind: what it is computed from, and what it says in the table."""

    scores: Callable[..., NDArray[np.float64]]
    of_generator: bool  # of the generator itself, not of `sample`
    what: str


FAMILIES = {
    "keep rate": Family(keep_rate, False, "all streams together and each alone"),
    "bytes": Family(value_bytes, False, "chi-square of low and high byte, and of all 16 bits"),
    "pairs of bytes": Family(byte_pairs, False, "chi-square over 65,536 cells"),
    "rows, columns": Family(rows_and_columns, False, "squares of the sums"),
    "lags": Family(lags, False, "row + r, col + c; r, c in 0, 1, 2, 4, 8, 16, 64, 128"),
    "partners": Family(partners, False, "row ^ r, col ^ c; the same r, c"),
    "shared states": Family(states, False, "16 outcomes of {row, row ^ 8} x {col, col ^ 8}"),
    "streams": Family(streams, False, "every two of seeds, sequences, heads, at 4 lags"),
    "runs": Family(runs, False, "distances between dropped elements"),
    "avalanche": Family(avalanche, True, "each input bit against each output bit"),
    "repeats": Family(repeats, True, "64-bit stretches that occur twice among 2²⁰"),
}


def main() -> None:
    """Print the tables."""
    values = sample(numpy_bits)
    print(f"{values.size:,} values\n")
    print("| statistic | scores | largest | limit | of |\n|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        scores = family.scores(numpy_bits if family.of_generator else values)
        print(
            f"| {name} | {scores.size:,} | {abs(scores).max():.2f} | {limit(scores.size):.2f} "
            f"| {family.what} |",
            flush=True,
        )
    print("\n| p | two | three | four |\n|---|---|---|---|")
    for p, counts in zip(PROBABILITIES, state_outcomes(), strict=True):
        correlations = state_correlations(counts, p)
        print(f"| {p} | " + " | ".join(f"{correlations[k]:.1e}" for k in (2, 3, 4)) + " |")


if __name__ == "__main__":
    main()
