"""Dropout whose mask is a function of a seed and of logical coordinates, never of layout or
hardware.

    keep(seed, sequence, head, row, col) = bits16(…) >= round(p · 65536),   scale = 65536 / (65536 −
    round(p · 65536))

The generator is counter-based: 32-bit multiply-xorshift rounds (the mixer is C. Wellons'
"lowbias32"; the idea of counter-based bits is Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011). The four elements {row, row^8} × {col, col^8} share one state: they are the four
values that one thread holds in an mma accumulator, of S and of Sᵀ alike, so a kernel mixes once for
four scores.
Attention: row = query, col = key, both counted in their own sequence. Hidden dropout: sequence 0,
head HIDDEN_HEAD, row = the token's row in the padded layout, col = the feature.

Arithmetic modulo 2³² is done in int64 (torch has no complete uint32): products wrap modulo 2⁶⁴,
which keeps the low 32 bits right.
"""

import torch
from torch import Tensor

HIDDEN_HEAD = 0xFFFFFFFF
RESOLUTION = 65536  # p is rounded to a multiple of 1 / RESOLUTION

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_SECOND_START = 0x85EBCA6B
_MUL_A, _MUL_B, _MUL_C = 0x7FEB352D, 0x846CA68B, 0xC2B2AE35


def threshold_and_scale(dropout_p: float) -> tuple[int, float]:
    """The integer below which 16 random bits drop a value, and the factor on the kept ones.

    The factor is one over the keep probability really used, (RESOLUTION − threshold) / RESOLUTION.
    """
    threshold = round(dropout_p * RESOLUTION)
    scale = RESOLUTION / (RESOLUTION - threshold) if threshold < RESOLUTION else 0.0
    return threshold, scale


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * _MUL_A) & _MASK
    x = x ^ (x >> 15)
    x = (x * _MUL_B) & _MASK
    return x ^ (x >> 16)


def _group(index: Tensor) -> Tensor:
    """The index with bit 3 taken out."""
    return ((index >> 4) << 3) | (index & 7)


def random_bits(seed: Tensor, sequence: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """16 random bits for each coordinate.

    Args:
        seed: int64, one element.
        sequence, head, row, col: int64, of shapes that broadcast together; only their low 32 bits
            count.

    Returns:
        int64 in [0, 65536) of the broadcast shape.
    """
    seed = seed.reshape(())
    low, high = seed & _MASK, (seed >> 32) & _MASK
    sequence, head, row, col = (t & _MASK for t in (sequence, head, row, col))
    a = _mix(_mix(_mix(_mix((low + _GOLDEN) & _MASK) ^ high) ^ sequence) ^ head)
    b = _mix(_mix(_mix(_mix((high + _SECOND_START) & _MASK) ^ low) ^ head) ^ sequence)
    row_a = _mix(a ^ _group(row))
    row_b = _mix((b + _group(row) * _GOLDEN) & _MASK)
    x = (row_a + _group(col) * _GOLDEN) & _MASK
    x = x ^ (x >> 16)
    x = (x * _MUL_A) & _MASK
    x = x ^ (x >> 15) ^ row_b
    y = (x * torch.where((row >> 3) & 1 == 1, _MUL_C, _MUL_B)) & _MASK
    y = y ^ (y >> 16)
    return torch.where((col >> 3) & 1 == 1, y >> 16, y & 0xFFFF)


def hidden_mask(x: Tensor, dropout_p: float, seed: Tensor, rows: Tensor | None) -> Tensor:
    """The factor, 0 or scale, of each element of x [tokens, columns], in float32 (float64 for
    float64)."""
    threshold, scale = threshold_and_scale(dropout_p)
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    cols = torch.arange(x.shape[1], device=x.device)
    bits = random_bits(seed, zero, zero + HIDDEN_HEAD, rows.long()[:, None], cols[None, :])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (bits >= threshold).to(dtype) * scale


def dropout(
    x: Tensor, dropout_p: float, dropout_seed: Tensor, dropout_rows: Tensor | None
) -> Tensor:
    """Y = x · keep · scale for x [tokens, columns]; the same function is its own backward.

    Dropped values are 0 even where x is NaN or Inf, in every backend.
    """
    mask = hidden_mask(x, dropout_p, dropout_seed, dropout_rows)
    return torch.where(mask > 0, x * mask, 0.0).to(x.dtype)
