"""Backward of attention, where the bias owns its gradient: dbias = ds, summed over whatever
dimension the bias was broadcast over.

Legend in attention.py, equations in attention_bwd_dq.py. Each program owns one tile of dbias and
walks in a fixed order over the sequences, heads and blocks that share it, recomputing ds: no
atomics, no memory of the size of the scores beyond dbias itself.
"""

import triton
import triton.language as tl

from .attention_tile import (
    NOT_SPECIALIZED,
    band_of,
    in_band,
    load_lse,
    load_rows,
    probability,
    seen_keys,
    sequence_of,
)
from .dropout import keep_mask, row_keys, stream_keys


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, dbias_ptr, keys_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_keys,
    stride_db, stride_dh, stride_dq, stride_dk,
    batch, heads, group, seqlen_q, seqlen_k, bias_heads, q_blocks, k_blocks,
    window_left, window_right, sequence_offset, scale, softcap, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VARLEN: tl.constexpr,
    KEY_LENGTHS: tl.constexpr, KEY_PADDING: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SUM_BATCH: tl.constexpr, SUM_HEADS: tl.constexpr,
    SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dbias. Grid: key blocks (fastest; 1 if SUM_KEYS) x query blocks (1 if SUM_QUERIES)
    x heads and batch of the bias.

    q_blocks and k_blocks count the blocks of the longest sequence: those that a program walks over
    where it sums, else those of the grid.
    """
    pid = tl.program_id(0)
    k_block = pid * 0
    if not SUM_KEYS:
        k_block = pid % k_blocks
        pid = pid // k_blocks
    q_block = pid * 0
    if not SUM_QUERIES:
        q_block = pid % q_blocks
        pid = pid // q_blocks
    bias_head = pid % bias_heads
    bias_batch = pid // bias_heads
    over_k, over_q, over_h, over_b = 1, 1, 1, 1
    if SUM_KEYS:
        over_k = k_blocks
    if SUM_QUERIES:
        over_q = q_blocks
    if SUM_HEADS:
        over_h = heads
    if SUM_BATCH:
        over_b = batch

    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, over_b * over_h * over_q * over_k):
        start_n = (k_block + step % over_k) * BLOCK_N
        start_m = (q_block + step // over_k % over_q) * BLOCK_M
        head = bias_head + step // over_k // over_q % over_h
        b = bias_batch + step // over_k // over_q // over_h
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
        low, high = band_of(
            len_q, len_k, seqlen_q, seqlen_k, window_left, window_right, ALIGN, VARLEN
        )
        meets = (start_m < len_q) & (start_n < len_k)
        if HIGH:
            meets = meets & (start_n <= start_m + BLOCK_M - 1 + high)
        if LOW:
            meets = meets & (start_n + BLOCK_N - 1 >= start_m + low)
        if meets:
            bl, hl, hk = b.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
            at_q = bl * stride_qb + hl * stride_qh + start_q * stride_qs
            at_k = bl * stride_kb + hk * stride_kh + start_k * stride_ks
            at_v = bl * stride_vb + hk * stride_vh + start_k * stride_vs
            at_g = bl * stride_gb + hl * stride_gh + start_q * stride_gs
            at_l = bl * stride_lb + hl * stride_lh + start_q
            rows = start_m + tl.arange(0, BLOCK_M)
            cols = start_n + tl.arange(0, BLOCK_N)
            lse_M = load_lse(lse_ptr + at_l, rows, rows < len_q)
            seen = lse_M != float("inf")
            inside = seen_keys(
                keys_ptr + bl * stride_keys if KEY_PADDING else keys_ptr,
                cols, 0, len_k, KEY_PADDING)  # fmt: skip
            q_MD = load_rows(q_ptr + at_q, stride_qs, rows, seen, HEAD_DIM, BLOCK_D)
            k_ND = load_rows(k_ptr + at_k, stride_ks, cols, inside, HEAD_DIM, BLOCK_D)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
            p_MN, _ = probability(
                s_MN, lse_M[:, None], bias_ptr + bl * stride_bb + hl * stride_bh, stride_bq,
                stride_bk, rows[:, None], cols[None, :], len_q, len_k, scale, softcap, SOFTCAP, 1,
                False)  # fmt: skip
            dout_MD = load_rows(dout_ptr + at_g, stride_gs, rows, seen, HEAD_DIM, BLOCK_D)
            v_ND = load_rows(v_ptr + at_v, stride_vs, cols, inside, HEAD_DIM, BLOCK_D)
            dp_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision=PRECISION)
            if DROPOUT:
                a, b_key = stream_keys(seed_ptr, b + sequence_offset, head)
                row_a, row_b = row_keys(a, b_key, rows)
                keep = keep_mask(
                    row_a[:, None], row_b[:, None], rows[:, None], cols[None, :], threshold
                )
                dp_MN = tl.where(keep, dp_MN * keep_scale, 0.0)
            delta_M = tl.load(delta_ptr + at_l + rows, mask=seen, other=0.0)
            allowed = seen[:, None] & inside[None, :]
            allowed = allowed & in_band(rows[:, None], cols[None, :], low, high, LOW, HIGH)
            acc_MN += tl.where(allowed, p_MN * (dp_MN - delta_M[:, None]), 0.0)

    rows = q_block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = k_block * BLOCK_N + tl.arange(0, BLOCK_N)
    dbias_ptr += bias_batch.to(tl.int64) * stride_db + bias_head.to(tl.int64) * stride_dh
    if SUM_QUERIES:
        acc_MN = tl.broadcast_to(tl.sum(acc_MN, 0)[None, :], [BLOCK_M, BLOCK_N])
    if SUM_KEYS:
        acc_MN = tl.broadcast_to(tl.sum(acc_MN, 1)[:, None], [BLOCK_M, BLOCK_N])
    last_row = 1 if SUM_QUERIES else seqlen_q
    last_col = 1 if SUM_KEYS else seqlen_k
    tl.store(
        dbias_ptr + rows[:, None].to(tl.int64) * stride_dq + cols[None, :] * stride_dk,
        acc_MN.to(dbias_ptr.dtype.element_ty),
        mask=(rows < last_row)[:, None] & (cols < last_col)[None, :],
    )
