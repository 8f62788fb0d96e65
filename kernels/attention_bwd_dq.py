"""Backward of attention, where queries own dq; and the equations of all its kernels.

Legend in attention.py. All recompute the probabilities p = exp(s - lse) from q, k and lse. With P =
keep * keep_scale, the factors of dropout, x = scale q kᵀ and s = softcap tanh(x / softcap) + bias:

    out = (p P) v            so  dv = (p P)ᵀ dout   and   dp = (dout vᵀ) P
    p = softmax(s)           so  ds = p (dp - sum_j p dp);  sum_j p_ij dp_ij = sum_d dout_id out_id
    lse = log sum exp(s)     so  ds += p dlse, which delta = sum_d dout out - dlse contains
    bias is added to s       so  dbias = ds, summed over what it was broadcast over
    tanh' = 1 - tanh²        so  dx = ds (1 - tanh²(x / softcap))
    x = scale q kᵀ           so  dq = scale dx k,  dk = scale dxᵀ q

No atomics: a sequence whose keys fit one tile takes attention_bwd_short_kernel, with dq, dk and dv
in one launch; others take two, the kernel of dq here, which also writes delta, and then that of dk
and dv (both in attention_bwd_dkdv.py). Where one block holds all keys that a block of queries sees,
delta = sum_j p dp - dlse of that very dp: for few keys dp and delta are almost equal, and two sums
rounded apart would leave nothing of their difference. The gradient of a bias has a kernel of its
own (attention_bwd_dbias.py), because it is summed over programs of the others.
"""

import triton
import triton.language as tl

from .attention_tile import (
    NOT_SPECIALIZED,
    band_of,
    in_band,
    load_lse,
    load_rows,
    load_whole_rows,
    normalised,
    probability,
    seen_keys,
    sequence_of,
    store_rows,
    zero_rows,
)
from .dropout import keep_mask, row_keys, stream_keys


@triton.jit
def _keys_step(dq_MD, q_MD, dout_MD, lse_M, delta_M, dlse_M, k_ptr, v_ptr, bias_ptr, keys_ptr,
               stride_k, stride_v, stride_bq, stride_bk, start_n, rows, len_q, keys_start, keys_end,
               low, high, scale, softcap, row_a, row_b, threshold, keep_scale,
               HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
               LOW: tl.constexpr, HIGH: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
               KEY_PADDING: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
               MASKED: tl.constexpr, ALL_KEYS: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """dq / scale += dx k over one block of keys; with ALL_KEYS it is the only one, and gives
    delta."""
    cols = start_n + tl.arange(0, BLOCK_N)
    inside = seen_keys(keys_ptr, cols, keys_start, keys_end, KEY_PADDING)
    if MASKED:
        k_ND = load_rows(k_ptr, stride_k, cols, inside, HEAD_DIM, BLOCK_D)
        v_ND = load_rows(v_ptr, stride_v, cols, inside, HEAD_DIM, BLOCK_D)
    else:
        k_ND = load_whole_rows(k_ptr, stride_k, cols, HEAD_DIM, BLOCK_D)
        v_ND = load_whole_rows(v_ptr, stride_v, cols, HEAD_DIM, BLOCK_D)
    s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
    p_MN, tanh_MN = probability(
        s_MN, lse_M[:, None], bias_ptr, stride_bq, stride_bk, rows[:, None], cols[None, :], len_q,
        keys_end, scale, softcap, SOFTCAP, BIAS, FOLD)  # fmt: skip
    dp_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision=PRECISION)
    if DROPOUT:
        keep = keep_mask(row_a[:, None], row_b[:, None], rows[:, None], cols[None, :], threshold)
        dp_MN = tl.where(keep, dp_MN * keep_scale, 0.0)
    if MASKED:
        # k = 0 past the end gives p = exp(0 - lse), which may be inf; inf * 0 = NaN.
        allowed = inside[None, :] & in_band(rows[:, None], cols[None, :], low, high, LOW, HIGH)
        p_MN = tl.where(allowed, p_MN, 0.0)
        dp_MN = tl.where(allowed, dp_MN, 0.0)
    if ALL_KEYS:
        if not FOLD:
            p_MN = normalised(p_MN, 1)
        delta_M = tl.sum(p_MN * dp_MN, 1) - dlse_M
    dx_MN = p_MN * (dp_MN - delta_M[:, None])
    if SOFTCAP:
        dx_MN *= 1 - tanh_MN * tanh_MN
    dq_MD = tl.dot(dx_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD, delta_M


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, bias_ptr,
    keys_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_dqb,
    stride_dqs, stride_dqh, stride_lb, stride_lh, stride_dlb, stride_dls, stride_dlh,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_keys,
    batch, heads, group, seqlen_q, seqlen_k, total_q, q_blocks, least_keys,
    window_left, window_right, sequence_offset, scale, softcap, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VARLEN: tl.constexpr,
    KEY_LENGTHS: tl.constexpr, KEY_PADDING: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr, DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and their delta for the kernel of dk and dv. Grid as in
    the forward; serves the sequences with len_k >= least_keys."""
    pid = tl.program_id(0)
    q_block = pid % q_blocks
    head = (pid // q_blocks) % heads
    b = pid // q_blocks // heads
    dq_ptr += head.to(tl.int64) * stride_dqh
    if VARLEN:  # noqa: SIM102 (compile time first: cu_seqlens is None otherwise)
        if b == batch:
            first = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
            zero_rows(dq_ptr, stride_dqs, first, total_q, q_block.to(tl.int64), q_blocks,
                      HEAD_DIM, BLOCK_D, BLOCK_M)  # fmt: skip
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
    if len_k < least_keys:
        return
    if HIGH:
        q_block = tl.cdiv(len_q, BLOCK_M) - 1 - q_block
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
    out_ptr += bl * stride_ob + hl * stride_oh + start_q * stride_os
    dout_ptr += bl * stride_gb + hl * stride_gh + start_q * stride_gs
    lse_ptr += bl * stride_lb + hl * stride_lh + start_q
    delta_ptr += bl * stride_lb + hl * stride_lh + start_q
    if BIAS != 0:
        bias_ptr += bl * stride_bb + hl * stride_bh
    if KEY_PADDING:
        keys_ptr += bl * stride_keys

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
    lse_M = load_lse(lse_ptr, rows, rows < len_q)
    seen = lse_M != float("inf")  # a query that sees nothing may hold NaN
    q_MD = load_rows(q_ptr, stride_qs, rows, seen, HEAD_DIM, BLOCK_D)
    dout_MD = load_rows(dout_ptr, stride_gs, rows, seen, HEAD_DIM, BLOCK_D)
    out_MD = load_rows(out_ptr, stride_os, rows, seen, HEAD_DIM, BLOCK_D)
    dlse_M = tl.zeros([BLOCK_M], tl.float32)
    if DLSE:
        dlse_ptr += bl * stride_dlb + hl * stride_dlh + start_q * stride_dls
        dlse_M = tl.load(dlse_ptr + rows.to(tl.int64) * stride_dls, mask=seen, other=0.0)
    delta_M = tl.sum(dout_MD.to(tl.float32) * out_MD.to(tl.float32), 1) - dlse_M
    row_a, row_b = rows, rows
    if DROPOUT:
        a, b_key = stream_keys(seed_ptr, b + sequence_offset, head)
        row_a, row_b = row_keys(a, b_key, rows)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    few_keys = keys_end - first_block <= BLOCK_N
    if BLOCK_D > 128:  # whose registers do not suffice for a branch more
        few_keys = tl.full((), 0, tl.int1)
    if few_keys:
        # A loop for its loads, which so go through shared memory and hold no registers.
        for start_n in range(first_block, keys_end, BLOCK_N):
            dq_MD, delta_M = _keys_step(
                dq_MD, q_MD, dout_MD, lse_M, delta_M, dlse_M, k_ptr, v_ptr, bias_ptr, keys_ptr,
                stride_ks, stride_vs, stride_bq, stride_bk, start_n, rows, len_q, keys_start,
                keys_end, low, high, scale, softcap, row_a, row_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, LOW, HIGH, SOFTCAP, BIAS, KEY_PADDING, DROPOUT, FOLD,
                True, True, PRECISION)  # fmt: skip
    else:
        for start_n in range(first_block, whole, BLOCK_N):
            dq_MD, delta_M = _keys_step(
                dq_MD, q_MD, dout_MD, lse_M, delta_M, dlse_M, k_ptr, v_ptr, bias_ptr, keys_ptr,
                stride_ks, stride_vs, stride_bq, stride_bk, start_n, rows, len_q, keys_start,
                keys_end, low, high, scale, softcap, row_a, row_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, LOW, HIGH, SOFTCAP, BIAS, KEY_PADDING, DROPOUT, FOLD,
                False, False, PRECISION)  # fmt: skip
        for start_n in range(whole, keys_end, BLOCK_N):
            dq_MD, delta_M = _keys_step(
                dq_MD, q_MD, dout_MD, lse_M, delta_M, dlse_M, k_ptr, v_ptr, bias_ptr, keys_ptr,
                stride_ks, stride_vs, stride_bq, stride_bk, start_n, rows, len_q, keys_start,
                keys_end, low, high, scale, softcap, row_a, row_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, LOW, HIGH, SOFTCAP, BIAS, KEY_PADDING, DROPOUT, FOLD,
                True, False, PRECISION)  # fmt: skip
    tl.store(delta_ptr + rows, delta_M, mask=rows < len_q)
    dq_ptr += bl * stride_dqb + start_q * stride_dqs
    store_rows(dq_ptr, stride_dqs, dq_MD * scale, rows, len_q, HEAD_DIM, BLOCK_D)
