"""The generator of dropout bits against an independent definition in numpy, bit for bit."""

import numpy as np
import pytest
import torch
from bertkern.kernels import dropout as kernels

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

GOLDEN, SECOND = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B)
SEEDS = (0, 1, 12345678901234, -7)


def mix(x):
    x = np.asarray(x, np.uint32)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def group(i):
    return ((i >> np.uint32(4)) << np.uint32(3)) | (i & np.uint32(7))


def bits(seed, sequence, head, rows, cols):
    """16 random bits of every (row, col)."""
    word = np.array([seed & 0xFFFFFFFF], np.uint32), np.array([seed >> 32 & 0xFFFFFFFF], np.uint32)
    sequence, head = np.array([sequence], np.uint32), np.array([head], np.uint32)
    low, high = word
    a = mix(mix(mix(mix(low + GOLDEN) ^ high) ^ sequence) ^ head)
    b = mix(mix(mix(mix(high + SECOND) ^ low) ^ head) ^ sequence)
    row, col = np.asarray(rows, np.uint32)[:, None], np.asarray(cols, np.uint32)[None, :]
    x = mix(a ^ group(row)) + group(col) * GOLDEN
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15)) ^ mix(b + group(row) * GOLDEN)
    high_row = (row >> np.uint32(3)) & np.uint32(1) == 1
    y = x * np.where(high_row, np.uint32(0xC2B2AE35), np.uint32(0x846CA68B))
    y = y ^ (y >> np.uint32(16))
    return np.where(
        (col >> np.uint32(3)) & np.uint32(1) == 1, y >> np.uint32(16), y & np.uint32(0xFFFF)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_is_the_formula(device, seed, p):
    x = torch.randn(37, 70, device=device)
    rows = torch.randint(0, 2**33, (37,), device=device)  # more than 32 bits: the low ones count
    y = kernels.dropout(x, p, torch.tensor([seed], device=device), rows)
    threshold, scale = round(p * 65536), 65536 / (65536 - round(p * 65536))
    names = (rows.cpu().numpy() & 0xFFFFFFFF).astype(np.uint32)
    keep = torch.from_numpy(bits(seed, 0, 0xFFFFFFFF, names, np.arange(70)) >= threshold).to(device)
    assert torch.equal(y, torch.where(keep, x * np.float32(scale), 0.0))


def test_rows_default_to_their_index(device):
    x, seed = torch.randn(20, 33, device=device), torch.tensor([3], device=device)
    index = torch.arange(20, device=device)
    assert torch.equal(kernels.dropout(x, 0.3, seed, None), kernels.dropout(x, 0.3, seed, index))


def test_row_stride_and_fp16(device):
    wide, seed = torch.randn(9, 50, device=device).half(), torch.tensor([3], device=device)
    x = wide[:, :31]
    y = kernels.dropout(x, 0.3, seed, None)
    assert y.is_contiguous()
    assert torch.equal(y, kernels.dropout(x.contiguous(), 0.3, seed, None))


def test_all_dropped_and_dropped_nan(device):
    x, seed = torch.full((4, 40), float("nan"), device=device), torch.tensor([3], device=device)
    assert torch.equal(kernels.dropout(x, 1.0, seed, None), torch.zeros_like(x))
    y = kernels.dropout(x, 0.5, seed, None)
    assert ((y == 0) | y.isnan()).all()
    assert (y == 0).any()


def test_empty(device):
    seed = torch.tensor([3], device=device)
    for shape in ((0, 5), (5, 0)):
        assert kernels.dropout(torch.zeros(shape, device=device), 0.5, seed, None).shape == shape
