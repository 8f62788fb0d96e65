"""Forward kernel of attention: out = dropout(softmax(score(q kᵀ))) v and lse.   (Dao 2023,
FlashAttention-2)

Legend in attention.py. One program owns BLOCK_M queries of one head, walks over its keys and keeps
a running softmax (Milakov & Gimelshein 2018): with m the maximum so far and l = sum exp(x - m), a
new block with maximum m' rescales what is there by exp(m - max(m, m')).
"""

import triton
import triton.language as tl

from .attention_tile import (
    LOG2E,
    NOT_SPECIALIZED,
    band_of,
    in_band,
    load_rows,
    load_whole_rows,
    score,
    seen_keys,
    sequence_of,
    store_rows,
    zero_rows,
)
from .dropout import keep_mask, row_keys, stream_keys


@triton.jit
def _fwd_step(acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, bias_ptr, keys_ptr, stride_k, stride_v,
              stride_bq, stride_bk, start_n, rows, len_q, keys_start, keys_end, low, high, scale,
              softcap,
              row_a, row_b, threshold,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
              LOW: tl.constexpr, HIGH: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
              KEY_PADDING: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
              MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of keys: the running maximum m of the scores x, sum l and unnormalised output acc.

    FOLD: x is q kᵀ and its factor to units of log2 is scale * log2(e), one FMA a score. Else x is
    the score in natural units and the maximum is taken off first (see probability in
    attention_tile.py).
    """
    cols = start_n + tl.arange(0, BLOCK_N)
    inside = seen_keys(keys_ptr, cols, keys_start, keys_end, KEY_PADDING)
    if MASKED:
        k_ND = load_rows(k_ptr, stride_k, cols, inside, HEAD_DIM, BLOCK_D)
    else:
        k_ND = load_whole_rows(k_ptr, stride_k, cols, HEAD_DIM, BLOCK_D)
    x_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
    if not FOLD:
        x_MN, _ = score(x_MN, bias_ptr, stride_bq, stride_bk, rows[:, None], cols[None, :],
                        len_q, keys_end, scale, softcap, SOFTCAP, BIAS)  # fmt: skip
    if MASKED:
        allowed = inside[None, :] & in_band(rows[:, None], cols[None, :], low, high, LOW, HIGH)
        x_MN = tl.where(allowed, x_MN, -float("inf"))
    m_new = tl.maximum(m_M, tl.max(x_MN, 1))
    # Nothing seen yet: exp2(-inf - 0) = 0, where exp2(-inf + inf) is NaN.
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    if FOLD:
        p_MN = tl.exp2(x_MN * (scale * LOG2E) - (m_safe * (scale * LOG2E))[:, None])
        rescale_M = tl.exp2((m_M - m_safe) * (scale * LOG2E))
    else:
        p_MN = tl.exp2((x_MN - m_safe[:, None]) * LOG2E)
        rescale_M = tl.exp2((m_M - m_safe) * LOG2E)
    l_M = l_M * rescale_M + tl.sum(p_MN, 1)
    if DROPOUT:  # after the sum: the softmax is normalised before dropout
        keep = keep_mask(row_a[:, None], row_b[:, None], rows[:, None], cols[None, :], threshold)
        p_MN = tl.where(keep, p_MN, 0.0)
    if MASKED:
        v_ND = load_rows(v_ptr, stride_v, cols, inside, HEAD_DIM, BLOCK_D)
    else:
        v_ND = load_whole_rows(v_ptr, stride_v, cols, HEAD_DIM, BLOCK_D)
    acc_MD = acc_MD * rescale_M[:, None]
    acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision=PRECISION)
    return acc_MD, m_new, l_M


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, keys_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_keys,
    batch, heads, group, seqlen_q, seqlen_k, total_q, q_blocks, least_keys, most_keys,
    window_left, window_right, sequence_offset, scale, softcap, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VARLEN: tl.constexpr,
    KEY_LENGTHS: tl.constexpr, KEY_PADDING: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr, SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head. Grid: query blocks (fastest) x heads x batch, all
    on axis 0.

    Serves the sequences with least_keys <= len_k <= most_keys; SHORT: they fit in BLOCK_N keys.
    In varlen one more "sequence" may follow the last: the tokens past cu_seqlens[-1], which get
    zeros.
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
            block = q_block.to(tl.int64)
            zero_rows(
                out_ptr, stride_os, first, total_q, block, q_blocks, HEAD_DIM, BLOCK_D, BLOCK_M
            )
            start = first + block * BLOCK_M
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
    if len_k < least_keys or len_k > most_keys:
        return
    if HIGH:
        q_block = tl.cdiv(len_q, BLOCK_M) - 1 - q_block  # the longest rows first
        if q_block < 0:
            return
    start_m = q_block * BLOCK_M
    if start_m >= len_q:
        return
    low, high = band_of(len_q, len_k, seqlen_q, seqlen_k, window_left, window_right, ALIGN, VARLEN)
    bl, hl, hk = b.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    q_ptr += bl * stride_qb + hl * stride_qh + start_q * stride_qs
    k_ptr += bl * stride_kb + hk * stride_kh + start_k * stride_ks
    v_ptr += bl * stride_vb + hk * stride_vh + start_k * stride_vs
    out_ptr += bl * stride_ob + start_q * stride_os
    lse_ptr += bl * stride_lb + start_q
    if BIAS != 0:
        bias_ptr += bl * stride_bb + hl * stride_bh
    if KEY_PADDING:
        keys_ptr += bl * stride_keys

    # Some query of the tile sees keys of [keys_start, keys_end); each one sees [keys_start, whole).
    keys_start = len_k * 0
    keys_end = len_k
    last_row = tl.minimum(start_m + BLOCK_M, len_q) - 1
    if HIGH:
        keys_end = tl.minimum(len_k, tl.maximum(last_row + high + 1, 0))
    if LOW:
        keys_start = tl.maximum(start_m + low, 0)
    first_block = keys_start // BLOCK_N * BLOCK_N
    whole = first_block
    if not LOW and not KEY_PADDING:
        whole = keys_end
        if HIGH:
            whole = tl.minimum(len_k, tl.maximum(start_m + high + 1, 0))
        whole = whole // BLOCK_N * BLOCK_N

    rows = start_m + tl.arange(0, BLOCK_M)
    q_MD = load_rows(q_ptr, stride_qs, rows, rows < len_q, HEAD_DIM, BLOCK_D)
    row_a, row_b = rows, rows
    if DROPOUT:
        a, b_key = stream_keys(seed_ptr, b + sequence_offset, head)
        row_a, row_b = row_keys(a, b_key, rows)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    if SHORT:
        acc_MD, m_M, l_M = _fwd_step(
            acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, bias_ptr, keys_ptr, stride_ks, stride_vs,
            stride_bq, stride_bk, 0, rows, len_q, keys_start, keys_end, low, high, scale, softcap,
            row_a, row_b, threshold, HEAD_DIM, BLOCK_D, BLOCK_N, LOW, HIGH, SOFTCAP, BIAS,
            KEY_PADDING, DROPOUT, FOLD, True, PRECISION)  # fmt: skip
    else:
        for start_n in range(first_block, whole, BLOCK_N):
            acc_MD, m_M, l_M = _fwd_step(
                acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, bias_ptr, keys_ptr, stride_ks, stride_vs,
                stride_bq, stride_bk, start_n, rows, len_q, keys_start, keys_end, low, high, scale,
                softcap, row_a, row_b, threshold, HEAD_DIM, BLOCK_D, BLOCK_N, LOW, HIGH, SOFTCAP,
                BIAS, KEY_PADDING, DROPOUT, FOLD, False, PRECISION)  # fmt: skip
        for start_n in range(whole, keys_end, BLOCK_N):
            acc_MD, m_M, l_M = _fwd_step(
                acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, bias_ptr, keys_ptr, stride_ks, stride_vs,
                stride_bq, stride_bk, start_n, rows, len_q, keys_start, keys_end, low, high, scale,
                softcap, row_a, row_b, threshold, HEAD_DIM, BLOCK_D, BLOCK_N, LOW, HIGH, SOFTCAP,
                BIAS, KEY_PADDING, DROPOUT, FOLD, True, PRECISION)  # fmt: skip

    # A query without keys is known by its index, not by l = 0: scores that are all -inf must give
    # NaN, as torch does. Under a mask of values it is known by its maximum, as torch knows it.
    if BIAS != 0 or KEY_PADDING:
        empty = m_M == -float("inf")
    else:
        empty = (rows < 0) | (len_k == 0)
        if HIGH:
            empty = empty | (rows + high < 0)
        if LOW:
            empty = empty | (rows + low >= len_k)
    l_M = tl.where(empty, 1.0, l_M)
    normalise = keep_scale if DROPOUT else 1.0
    out_MD = acc_MD * (normalise / l_M)[:, None]
    if FOLD:
        m_M = m_M * scale
    lse_M = m_M + tl.log(l_M)  # empty: -inf + 0; once a row, so not by log2, which rounds twice
    store_rows(out_ptr, stride_os, out_MD, rows, len_q, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + rows, lse_M, mask=rows < len_q)
