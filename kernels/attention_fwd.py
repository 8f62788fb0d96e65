"""Forward kernel of attention: out = dropout(softmax(scale * q kᵀ)) v and lse.   (Dao 2023,
FlashAttention-2)

Legend in attention.py. One program owns BLOCK_M queries of one head, walks over its keys and keeps
a running softmax (Milakov & Gimelshein 2018): with m the maximum so far and l = sum exp(s - m), a
new block with maximum m' rescales what is there by exp(m - max(m, m')).
"""

import triton
import triton.language as tl

from .attention_tile import (
    LN2,
    NOT_SPECIALIZED,
    diagonal_of,
    load_rows,
    load_whole_rows,
    sequence_of,
    store_rows,
    zero_slack,
)
from .dropout import keep_mask, row_keys, stream_keys


@triton.jit
def _fwd_step(acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, stride_k, stride_v, start_n, keys_end, rows,
              diagonal,
              scale_log2, row_a, row_b, threshold,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
              CAUSAL: tl.constexpr,
              DROPOUT: tl.constexpr, FOLD_SCALE: tl.constexpr, MASKED: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """One block of keys: the running maximum m (in units of log2), sum l and unnormalised output
    acc."""
    cols = start_n + tl.arange(0, BLOCK_N)
    if MASKED:
        k_ND = load_rows(k_ptr, stride_k, cols, 0, keys_end, HEAD_DIM, BLOCK_D)
    else:
        k_ND = load_whole_rows(k_ptr, stride_k, cols, HEAD_DIM, BLOCK_D)
    s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
    factor = scale_log2
    if not FOLD_SCALE:
        # max(scale * s) = scale * max(s) only for scale > 0, and 0 * -inf = NaN: scale before
        # masking.
        s_MN = s_MN * scale_log2
        factor = 1.0
    if MASKED:
        allowed = (cols < keys_end)[None, :]
        if CAUSAL != 0:
            allowed = allowed & (cols[None, :] <= (rows + diagonal)[:, None])
        s_MN = tl.where(allowed, s_MN, -float("inf"))
    m_new = tl.maximum(m_M, tl.max(s_MN, 1) * factor)
    # Nothing seen yet: exp2(-inf - 0) = 0, where exp2(-inf + inf) is NaN.
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    p_MN = tl.exp2(s_MN * factor - m_safe[:, None])
    rescale_M = tl.exp2(m_M - m_safe)
    l_M = l_M * rescale_M + tl.sum(p_MN, 1)
    if DROPOUT:  # after the sum: the softmax is normalised before dropout
        keep = keep_mask(row_a[:, None], row_b[:, None], rows[:, None], cols[None, :], threshold)
        p_MN = tl.where(keep, p_MN, 0.0)
    if MASKED:
        v_ND = load_rows(v_ptr, stride_v, cols, 0, keys_end, HEAD_DIM, BLOCK_D)
    else:
        v_ND = load_whole_rows(v_ptr, stride_v, cols, HEAD_DIM, BLOCK_D)
    acc_MD = acc_MD * rescale_M[:, None]
    acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision=PRECISION)
    return acc_MD, m_new, l_M


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr,
    seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    batch, heads, seqlen_q, seqlen_k, total_q, q_blocks, sequence_offset, scale_log2, threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, KEY_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head. Grid: query blocks (fastest) x heads x batch, all
    on axis 0.

    In varlen one more "sequence" follows the last: the tokens past cu_seqlens[-1], which get zeros.
    """
    pid = tl.program_id(0)
    q_block = pid % q_blocks
    head = (pid // q_blocks) % heads
    b = pid // q_blocks // heads
    out_ptr += head.to(tl.int64) * stride_oh
    lse_ptr += head.to(tl.int64) * stride_lh
    if VARLEN:  # noqa: SIM102 (compile time first: cu_seqlens is None otherwise)
        if b == batch:
            first = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
            zero_slack(
                out_ptr, stride_os, first, total_q, q_block, q_blocks, HEAD_DIM, BLOCK_D, BLOCK_M
            )
            start = first + q_block.to(tl.int64) * BLOCK_M
            while start < total_q:
                tokens = start + tl.arange(0, BLOCK_M)
                tl.store(
                    lse_ptr + tokens,
                    tl.full([BLOCK_M], -float("inf"), tl.float32),
                    mask=tokens < total_q,
                )
                start += q_blocks * BLOCK_M
            return
    start_q, start_k, len_q, len_k = sequence_of(
        b,
        cu_seqlens_q_ptr,
        cu_seqlens_k_ptr,
        key_lengths_ptr,
        seqlen_q,
        seqlen_k,
        VARLEN,
        KEY_LENGTHS,
    )
    if CAUSAL != 0:
        q_block = tl.cdiv(len_q, BLOCK_M) - 1 - q_block  # the longest rows first
        if q_block < 0:
            return
    start_m = q_block * BLOCK_M
    if start_m >= len_q:
        return
    diagonal = diagonal_of(len_q, len_k, seqlen_q, seqlen_k, CAUSAL, VARLEN)
    bl, hl = b.to(tl.int64), head.to(tl.int64)
    q_ptr += bl * stride_qb + hl * stride_qh + start_q * stride_qs
    k_ptr += bl * stride_kb + hl * stride_kh + start_k * stride_ks
    v_ptr += bl * stride_vb + hl * stride_vh + start_k * stride_vs
    out_ptr += bl * stride_ob + start_q * stride_os
    lse_ptr += bl * stride_lb + start_q

    # Keys [0, whole) are seen by every query of the tile, keys [whole, keys_end) by some.
    keys_end = len_k
    whole = len_k
    if CAUSAL != 0:
        last_row = tl.minimum(start_m + BLOCK_M, len_q) - 1
        keys_end = tl.minimum(len_k, tl.maximum(last_row + diagonal + 1, 0))
        whole = tl.minimum(len_k, tl.maximum(start_m + diagonal + 1, 0))
    whole = whole // BLOCK_N * BLOCK_N

    rows = start_m + tl.arange(0, BLOCK_M)
    q_MD = load_rows(q_ptr, stride_qs, rows, 0, len_q, HEAD_DIM, BLOCK_D)
    row_a, row_b = rows, rows
    if DROPOUT:
        a, b_key = stream_keys(seed_ptr, b + sequence_offset, head)
        row_a, row_b = row_keys(a, b_key, rows)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, whole, BLOCK_N):
        acc_MD, m_M, l_M = _fwd_step(
            acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, stride_ks, stride_vs, start_n, keys_end, rows,
            diagonal,
            scale_log2, row_a, row_b, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, DROPOUT, FOLD_SCALE, False, PRECISION)  # fmt: skip
    for start_n in range(whole, keys_end, BLOCK_N):
        acc_MD, m_M, l_M = _fwd_step(
            acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, stride_ks, stride_vs, start_n, keys_end, rows,
            diagonal,
            scale_log2, row_a, row_b, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, DROPOUT, FOLD_SCALE, True, PRECISION)  # fmt: skip

    # A query without keys is known by its index, not by l = 0: scores that are all -inf must give
    # NaN, as torch does.
    empty = (rows + diagonal < 0) | (len_k == 0) if CAUSAL != 0 else (rows < 0) | (len_k == 0)
    l_M = tl.where(empty, 1.0, l_M)
    normalise = keep_scale if DROPOUT else 1.0
    out_MD = acc_MD * (normalise / l_M)[:, None]
    lse_M = (m_M + tl.log2(l_M)) * LN2  # empty: -inf + 0
    store_rows(out_ptr, stride_os, out_MD, rows, len_q, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + rows, lse_M, mask=rows < len_q)
