"""The generator: its definition, written a second time in numpy, and its statistics."""

import numpy as np
import pytest
import torch

from bertkern.reference.dropout import random_bits, threshold_and_scale

U32 = np.uint32


def numpy_bits(seed, sequence, head, rows, cols):
    """The definition in uint32, for rows × cols."""

    def mix(x):
        x = x ^ (x >> U32(16))
        x = x * U32(0x7FEB352D)
        x = x ^ (x >> U32(15))
        x = x * U32(0x846CA68B)
        return x ^ (x >> U32(16))

    def group(i):
        return ((i >> U32(4)) << U32(3)) | (i & U32(7))

    golden = U32(0x9E3779B9)
    one = lambda value: np.array([value & 0xFFFFFFFF], dtype=U32)  # noqa: E731
    low, high, sequence, head = one(seed), one(seed >> 32), one(sequence), one(head)
    row, col = np.asarray(rows, dtype=U32)[:, None], np.asarray(cols, dtype=U32)[None]
    a = mix(mix(mix(mix(low + golden) ^ high) ^ sequence) ^ head)
    b = mix(mix(mix(mix(high + U32(0x85EBCA6B)) ^ low) ^ head) ^ sequence)
    row_a, row_b = mix(a ^ group(row)), mix(b + group(row) * golden)
    x = row_a + group(col) * golden
    x = x ^ (x >> U32(16))
    x = x * U32(0x7FEB352D)
    x = x ^ (x >> U32(15)) ^ row_b
    y = x * np.where((row >> U32(3)) & U32(1) == 1, U32(0xC2B2AE35), U32(0x846CA68B))
    y = y ^ (y >> U32(16))
    return np.where((col >> U32(3)) & U32(1) == 1, y >> U32(16), y & U32(0xFFFF)).astype(np.int64)


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
    with np.errstate(over="ignore"):
        expected = numpy_bits(seed, sequence, head, range(40), range(70))
    assert (bits(seed, sequence, head, 40, 70).numpy() == expected).all()


KNOWN = ([[55074, 27527, 21893, 13448]], [13259, 26296, 58493, 29767])


def test_known_values():
    """Written down once: a change of the generator changes every user's masks."""
    assert bits(0, 0, 0, 1, 4).tolist() == KNOWN[0]
    assert bits(42, 1, 2, 9, 10)[8, 6:].tolist() == KNOWN[1]


def test_statistics():
    """Keep rate, neighbours at mma distances, rows, columns, heads, sequences and seeds:
    z-scores."""
    p = 0.1
    threshold, _ = threshold_and_scale(p)
    size = 512
    q = threshold / 65536
    streams = [(s, i, h) for s in (0, 1, -1, 1 << 32) for i in (0, 1) for h in (0, 1)]
    dropped = torch.stack(
        [(bits(*stream, size, size) < threshold).double() - q for stream in streams]
    )
    variance = q * (1 - q)
    z = [dropped.sum() / (dropped.numel() * variance) ** 0.5]
    for rows, cols in [
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 8),
        (8, 0),
        (8, 8),
        (0, 16),
        (16, 0),
        (1, 8),
        (8, 1),
    ]:
        product = dropped[:, : size - rows, : size - cols] * dropped[:, rows:, cols:]
        z.append(product.sum() / (product.numel() ** 0.5 * variance))
    for i in range(len(streams)):
        for j in range(i):
            z.append((dropped[i] * dropped[j]).sum() / (size * variance))
    for dim in (1, 2):
        chi_square = (dropped.sum(dim) ** 2 / (size * variance)).sum()
        count = len(streams) * size
        z.append((chi_square - count) / (2 * count) ** 0.5)
    z = torch.stack(z).abs()
    assert z.max() < 4.5, z  # 134 scores: above 4.5 by chance once in a thousand generators


def test_probability_is_the_one_really_used():
    for p in (0.1, 0.5, 1 / 3, 1e-4):
        threshold, scale = threshold_and_scale(p)
        assert abs(threshold / 65536 - p) <= 0.5 / 65536
        assert scale == pytest.approx(1 / (1 - threshold / 65536), rel=1e-12)
    assert threshold_and_scale(1.0) == (65536, 0.0)
    assert threshold_and_scale(0.0) == (0, 1.0)
