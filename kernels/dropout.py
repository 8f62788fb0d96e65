"""Dropout bits as a function of (seed, sequence, head, row, column), and elementwise dropout.

    keep = bits16(seed, sequence, head, row, column) >= t,   t = round(p * 65536)
    y = keep ? x * 65536 / (65536 - t) : 0

A counter-based generator (the idea of Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3"): nothing is stored, and the mask does not depend on tile size, layout or device. The mixing
function is C. Wellons' "lowbias32" (2018). All arithmetic is on uint32 and wraps.

The cost lies in the mixing, so it is shared: with bit 3 taken out of an index ("its group"), the
four elements

    {row, row ^ 8} x {column, column ^ 8}

have one mixed state `x`. The row's bit 3 chooses the last multiplier and the column's bit 3 the
half of the product: two multiplications per four elements for the state and one for each row of
two. These are the four elements that one thread holds in an mma accumulator, of S and of S^T alike,
so that the compiler finds the common state in its own registers.

    attention:  row = query, column = key, both counted in their own sequence; sequence = index +
    sequence_offset hidden:     sequence = 0, head = 0xFFFFFFFF, row = the token's row in the padded
    layout, column = feature
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .device import architecture, guard

RESOLUTION = 65536  # values of 16 bits

_GOLDEN = tl.constexpr(0x9E3779B9)
_SECOND_START = tl.constexpr(0x85EBCA6B)
_MUL_FIRST = tl.constexpr(0x7FEB352D)
_MUL_LOW_ROW = tl.constexpr(
    0x846CA68B
)  # rows with bit 3 clear; also the second multiplier of the mixer
_MUL_HIGH_ROW = tl.constexpr(0xC2B2AE35)  # rows with bit 3 set
_HIDDEN_HEAD = tl.constexpr(0xFFFFFFFF)


def threshold_and_scale(p: float) -> tuple[int, float]:
    """The integer that 16 random bits must reach to be kept, and the factor of what is kept (p = 1:
    0)."""
    threshold = round(p * RESOLUTION)
    kept = RESOLUTION - threshold
    return threshold, RESOLUTION / kept if kept else 0.0


@triton.jit
def mix(x):
    """lowbias32: a bijection of uint32 in which each input bit flips each output bit with odds near
    1/2."""
    x ^= x >> 16
    x *= _MUL_FIRST
    x ^= x >> 15
    x *= _MUL_LOW_ROW
    return x ^ (x >> 16)


@triton.jit
def stream_keys(seed_ptr, sequence, head):
    """Two keys of the stream (seed, sequence, head); seed is one int64 in memory."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    sequence = sequence.to(tl.uint32)
    head = head.to(tl.uint32)
    a = mix(mix(mix(mix(low + _GOLDEN) ^ high) ^ sequence) ^ head)
    b = mix(mix(mix(mix(high + _SECOND_START) ^ low) ^ head) ^ sequence)
    return a, b


@triton.jit
def hidden_keys(seed_ptr):
    """The stream of hidden dropout."""
    return stream_keys(seed_ptr, tl.full((), 0, tl.uint32), tl.full((), _HIDDEN_HEAD, tl.uint32))


@triton.jit
def index_group(i):
    """The index with its bit 3 taken out: equal for i and i ^ 8."""
    return ((i >> 4) << 3) | (i & 7)


@triton.jit
def row_keys(a, b, rows):
    """Two keys for each row's group, from the keys of the stream."""
    group = index_group(rows.to(tl.uint32))
    return mix(a ^ group), mix(b + group * _GOLDEN)


@triton.jit
def keep_mask(row_a, row_b, rows, cols, threshold):
    """Which elements of a tile are kept. row_a, row_b, rows [.., 1] and cols [1, ..], or all
    transposed."""
    rows = rows.to(tl.uint32)
    cols = cols.to(tl.uint32)
    # One state for each {row, row ^ 8} x {col, col ^ 8}.
    x = row_a + index_group(cols) * _GOLDEN
    x ^= x >> 16
    x *= _MUL_FIRST
    x = x ^ (x >> 15) ^ row_b
    # Bit 3 of the row chooses the multiplier, bit 3 of the column the half.
    y = x * tl.where((rows & 8) != 0, _MUL_HIGH_ROW, _MUL_LOW_ROW)
    y ^= y >> 16
    bits = tl.where((cols & 8) != 0, y >> 16, y & 0xFFFF)
    return bits.to(tl.int32) >= threshold


@triton.jit
def hidden_row_keys(seed_ptr, dropout_rows_ptr, rows, rows_total, DROPOUT_ROWS: tl.constexpr):
    """(row, row_a, row_b) of each token of hidden dropout; dropout_rows renames rows, if given."""
    if DROPOUT_ROWS:
        rows = tl.load(dropout_rows_ptr + rows, mask=rows < rows_total, other=0)
    a, b = hidden_keys(seed_ptr)
    row_a, row_b = row_keys(a, b, rows)
    return rows, row_a, row_b


@triton.jit
def hidden_keep_mask(
    seed_ptr, dropout_rows_ptr, rows, rows_total, cols, threshold, DROPOUT_ROWS: tl.constexpr
):
    """The mask of a tile [rows, cols] of hidden dropout."""
    rows, row_a, row_b = hidden_row_keys(seed_ptr, dropout_rows_ptr, rows, rows_total, DROPOUT_ROWS)
    return keep_mask(row_a[:, None], row_b[:, None], rows[:, None], cols[None, :], threshold)


@triton.jit(do_not_specialize=["rows_total"])
def dropout_kernel(
    x_ptr, y_ptr, seed_ptr, dropout_rows_ptr,
    stride_x, stride_y, rows_total, cols_total, threshold, keep_scale,
    DROPOUT_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_R, BLOCK_C] of y = keep ? x * keep_scale : 0."""
    col_blocks = tl.cdiv(cols_total, BLOCK_C)
    pid = tl.program_id(0)
    rows = (pid // col_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = (pid % col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < rows_total)[:, None] & (cols < cols_total)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0)
    keep = hidden_keep_mask(
        seed_ptr, dropout_rows_ptr, rows, rows_total, cols, threshold, DROPOUT_ROWS
    )
    # Chosen, not multiplied: a dropped NaN or Inf must give 0.
    y = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0)
    tl.store(
        y_ptr + rows[:, None] * stride_y + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside
    )


def dropout(
    x: torch.Tensor, dropout_p: float, dropout_seed: torch.Tensor, dropout_rows: torch.Tensor | None
) -> torch.Tensor:
    """y [rows, cols] = keep ? x / (1 - p) : 0; its backward is itself on the gradient.

    x is [rows, cols] with last stride 1; dropout_seed one int64; dropout_rows int64 [rows] or None.
    """
    rows, cols = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    tile = tuning.elementwise(cols, architecture(x))
    threshold, scale = threshold_and_scale(dropout_p)
    with guard(x):
        dropout_kernel[(triton.cdiv(rows, tile.block_r) * triton.cdiv(cols, tile.block_c),)](
            x, y, dropout_seed, dropout_rows,
            x.stride(0), y.stride(0), rows, cols, threshold, scale,
            DROPOUT_ROWS=dropout_rows is not None, BLOCK_R=tile.block_r, BLOCK_C=tile.block_c,
            num_warps=tile.warps,
        )  # fmt: skip
    return y
