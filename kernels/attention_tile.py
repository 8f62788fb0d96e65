"""Device functions that the forward and the backward of attention share: lengths, rows, zeros.

The legend and the masks' reasons stand in attention.py. Offsets of rows are int64: T * H * D passes
2^31.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E): exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that change with the batch: one compiled kernel serves them all.
NOT_SPECIALIZED = (
    "batch", "seqlen_q", "seqlen_k", "total_q", "total_k", "q_blocks", "k_blocks",
    "sequence_offset", "threshold",
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
def diagonal_of(len_q, len_k, seqlen_q, seqlen_k, CAUSAL: tl.constexpr, VARLEN: tl.constexpr):
    """Query i sees keys j <= i + diagonal. Batched: of the whole matrix, key_lengths only take keys
    away."""
    diagonal = len_q * 0
    if CAUSAL == 1:
        diagonal = len_k - len_q if VARLEN else seqlen_k - seqlen_q
    return diagonal


@triton.jit
def load_rows(ptr, stride, rows, first, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [first, end) of a tile [rows, BLOCK_D]; the others, and columns past HEAD_DIM, are 0."""
    cols = tl.arange(0, BLOCK_D)
    mask = ((rows >= first) & (rows < end))[:, None]
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
def zero_slack(ptr, stride, first, end, block, blocks,
                HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Zeros in rows [first, end): tokens of a fixed budget that belong to no sequence. Shared by
    `blocks` programs."""
    zero = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    start = first + block.to(tl.int64) * BLOCK
    step = blocks * BLOCK
    while start < end:
        store_rows(ptr, stride, zero, start + tl.arange(0, BLOCK), end, HEAD_DIM, BLOCK_D)
        start += step
