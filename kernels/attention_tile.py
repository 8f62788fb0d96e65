"""Device functions that the forward and the backward of attention share: which sequence, which
keys, which rows, what score.

The legend and the masks' reasons stand in attention.py. Offsets of rows are int64: T * H * D passes
2^31. A tile of scores is [M, N] or, where keys are its rows, [N, M]: `rows` and `cols` come as
[M, 1] and [1, N] or as [1, M] and [N, 1].
"""

import triton
import triton.language as tl

from .tanh import tanh

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E): exp2 is one instruction

# Arguments that change with the batch: one compiled kernel serves them all.
NOT_SPECIALIZED = (
    "batch", "seqlen_q", "seqlen_k", "total_q", "total_k", "q_blocks", "k_blocks",
    "least_keys", "most_keys", "window_left", "window_right", "sequence_offset", "threshold",
)  # fmt: skip


@triton.jit
def sequence_of(b, cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seqlen_q, seqlen_k,
              VARLEN: tl.constexpr, KEY_LENGTHS: tl.constexpr):  # fmt: skip
    """(first query row, first key row, len_q, len_k) of sequence b; the rows are 0 in the batched
    layout."""
    start_q = tl.full((), 0, tl.int64)
    start_k = tl.full((), 0, tl.int64)
    len_q = seqlen_q
    len_k = seqlen_k
    if VARLEN:
        start_q = tl.load(cu_seqlens_q_ptr + b).to(tl.int64)
        start_k = tl.load(cu_seqlens_k_ptr + b).to(tl.int64)
        len_q = (tl.load(cu_seqlens_q_ptr + b + 1) - start_q).to(tl.int32)
        len_k = (tl.load(cu_seqlens_k_ptr + b + 1) - start_k).to(tl.int32)
    if KEY_LENGTHS:
        len_k = tl.load(key_lengths_ptr + b).to(tl.int32)
    return start_q, start_k, len_q, len_k


@triton.jit
def band_of(len_q, len_k, seqlen_q, seqlen_k, window_left, window_right,
            ALIGN: tl.constexpr, VARLEN: tl.constexpr):  # fmt: skip
    """(low, high): query i sees keys i + low <= j <= i + high, where the kernel masks that side.

    ALIGN 1 (bottom right): of the sequence in varlen, of the whole matrix in the batched layout,
    where key_lengths only take keys away. ALIGN 0: top left.
    """
    diagonal = len_q * 0
    if ALIGN == 1:
        diagonal = len_k - len_q if VARLEN else seqlen_k - seqlen_q
    return diagonal - window_left, diagonal + window_right


@triton.jit
def in_band(rows, cols, low, high, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Which scores of a tile lie in the band, broadcast to the tile."""
    inside = (rows >= 0) & (cols >= 0)
    if HIGH:
        inside = inside & (cols <= rows + high)
    if LOW:
        inside = inside & (cols >= rows + low)
    return inside


@triton.jit
def seen_keys(keys_ptr, cols, first, end, KEY_PADDING: tl.constexpr):
    """Which keys count: those of [first, end) that are not padding by the sequence's row of
    key_padding_mask."""
    inside = (cols >= first) & (cols < end)
    if KEY_PADDING:
        inside = tl.load(keys_ptr + cols, mask=inside, other=0) != 0
    return inside


@triton.jit
def score(s, bias_ptr, stride_q, stride_k, rows, cols, len_q, len_k, scale, softcap,
          SOFTCAP: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """(score, tanh) of a tile of q kᵀ: softcap * tanh(scale * s / softcap) + bias in natural units.

    BIAS 1: added; 2: bool, False is -inf. bias_ptr is the head's own matrix. tanh is what the
    derivative of the cap needs.
    """
    x = s * scale
    t = x
    if SOFTCAP:
        t = tanh(x / softcap)
        x = t * softcap
    if BIAS != 0:
        offsets = rows.to(tl.int64) * stride_q + cols.to(tl.int64) * stride_k
        inside = (rows < len_q) & (cols < len_k)
        if BIAS == 1:
            x += tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            kept = tl.load(bias_ptr + offsets, mask=inside, other=0) != 0
            x = tl.where(kept, x, -float("inf"))
    return x, t


@triton.jit
def probability(s, lse, bias_ptr, stride_q, stride_k, rows, cols, len_q, len_k, scale, softcap,
                SOFTCAP: tl.constexpr, BIAS: tl.constexpr, FOLD: tl.constexpr):  # fmt: skip
    """(p, tanh) with p = exp(score - lse), for the backward. lse [M, 1] or [1, M].

    FOLD: one multiplication by scale * log2(e) and one subtraction a score, exact enough for 16-bit
    inputs. Without, the difference is taken first, in natural units: rounding scale * log2(e) would
    cost fp32 digits where scores are large, and a bias of the lowest float would overflow.
    """
    if FOLD:
        t = s
        p = tl.exp2(s * (scale * LOG2E) - lse * LOG2E)
    else:
        x, t = score(s, bias_ptr, stride_q, stride_k, rows, cols, len_q, len_k, scale, softcap,
                     SOFTCAP, BIAS)  # fmt: skip
        p = tl.exp2((x - lse) * LOG2E)
    return p, t


@triton.jit
def normalised(p, AXIS: tl.constexpr):
    """p of all keys of a query, divided by its sum over AXIS, the keys; 0 stays 0.

    p = exp(s - lse) carries the rounding of lse, and of a product that the forward may have summed
    in another order: one factor for a whole row, and over one key, where p should be 1 and ds 0,
    all that would be left. fp32 shows it.
    """
    total = tl.expand_dims(tl.sum(p, AXIS), AXIS)
    return p / tl.where(total == 0, 1.0, total)


@triton.jit
def load_lse(lse_ptr, rows, inside):
    """lse, with +inf for rows outside and for queries that see nothing: exp(s - inf) = 0."""
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def load_rows(ptr, stride, rows, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile [rows, BLOCK_D]; rows that are not inside, and columns past HEAD_DIM, are 0."""
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (cols < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_whole_rows(ptr, stride, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile whose rows are all inside the sequence."""
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    if HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(cols < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(ptr, stride, tile, rows, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [0, end) of a tile, cast to the tensor's dtype."""
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < end)[:, None] & (cols < HEAD_DIM)[None, :]
    ptrs = ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(ptr, stride, first, end, block, blocks,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Zeros in rows [first, end), shared by `blocks` programs: tokens of a fixed budget that belong
    to no sequence, keys past a sequence's length."""
    zero = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    start = first + block * BLOCK
    while start < end:
        store_rows(ptr, stride, zero, start + tl.arange(0, BLOCK), end, HEAD_DIM, BLOCK_D)
        start += blocks * BLOCK
