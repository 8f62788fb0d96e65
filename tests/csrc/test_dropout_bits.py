"""The native generator against the formula in numpy, bit for bit."""

import numpy as np
import pytest
import torch

from csrc import native

U = np.uint32
G, G2 = 0x9E3779B9, 0x85EBCA6B


def mix(x):
    x = np.asarray(x, dtype=U)
    x = x ^ (x >> U(16))
    x = x * U(0x7FEB352D)
    x = x ^ (x >> U(15))
    x = x * U(0x846CA68B)
    return x ^ (x >> U(16))


def group(i):
    return ((i >> U(4)) << U(3)) | (i & U(7))


def bits(seed, sequence, head, rows, cols):
    """16 random bits of each element [len(rows), len(cols)]."""
    lo, hi = np.array([seed & 0xFFFFFFFF], U), np.array([(seed >> 32) & 0xFFFFFFFF], U)
    sequence, head = np.array([sequence], U), np.array([head], U)
    a = mix(mix(mix(mix(lo + U(G)) ^ hi) ^ sequence) ^ head)
    b = mix(mix(mix(mix(hi + U(G2)) ^ lo) ^ head) ^ sequence)
    q, k = np.asarray(rows, U)[:, None], np.asarray(cols, U)[None]
    row_a, row_b = mix(a ^ group(q)), mix(b + group(q) * U(G))
    x = row_a + group(k) * U(G)
    x = x ^ (x >> U(16))
    x = x * U(0x7FEB352D)
    x = x ^ (x >> U(15)) ^ row_b
    y = x * np.where((q >> U(3)) & U(1) == 1, U(0xC2B2AE35), U(0x846CA68B))
    y = y ^ (y >> U(16))
    return np.where((k >> U(3)) & U(1) == 1, y >> U(16), y & U(0xFFFF)).astype(np.int64)


@pytest.mark.parametrize("seed", [0, 1, 12345678901234, -7])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("cols", [1, 15, 40, 700])
def test_hidden_dropout(isa, seed, p, cols):
    threshold, scale, _ = native.dropout(p, seed)
    rows = torch.tensor([0, 3, 8, 9, 70000, 17])
    with np.errstate(over="ignore"):
        keep = bits(seed & (2**64 - 1), 0, 0xFFFFFFFF, rows.numpy(), np.arange(cols)) >= threshold
    y = native.hidden_dropout(torch.ones(6, cols), native.dropout(p, seed), rows=rows)
    assert torch.equal(y, torch.from_numpy(keep).float() * torch.tensor(scale, dtype=torch.float32))


def test_attention_dropout(isa):
    """With v the identity matrix, out is the dropped probabilities themselves."""
    seed, sequence_offset, heads, queries, keys = 987654321987, 5, 2, 30, 45
    q, k = torch.zeros(2, queries, heads, keys), torch.zeros(2, keys, heads, keys)
    v = torch.eye(keys)[None, :, None].expand(2, keys, heads, keys)
    drop = native.dropout(0.3, seed)
    out, _ = native.attention_fwd(q, k, v, drop=drop, offset=sequence_offset)
    for b in range(2):
        for h in range(heads):
            with np.errstate(over="ignore"):
                random = bits(seed, b + sequence_offset, h, np.arange(queries), np.arange(keys))
            assert np.array_equal(out[b, :, h].numpy() != 0, random >= drop[0])
            kept = out[b, :, h][out[b, :, h] != 0]
            torch.testing.assert_close(kept, torch.full_like(kept, drop[1] / keys))
