"""Backward kernels of attention, without atomics: one owns queries (dq), one owns keys (dk, dv).

Legend in attention.py. Both recompute the probabilities p = exp(s - lse) from q, k and lse. With P
= keep * keep_scale, the factors of dropout:

    out = (p P) v            so  dv = (p P)ᵀ dout   and   dp = (dout vᵀ) P
    p = softmax(s)           so  ds = p (dp - sum_j p dp);  sum_j p_ij dp_ij = sum_d dout_id out_id
    lse = log sum exp(s)     so  ds += p dlse, which delta = sum_d dout out - dlse contains
    s = scale q kᵀ           so  dq = scale ds k,  dk = scale dsᵀ q

The kernel of dq runs first: it also writes delta, which the other one reads. Where one block holds
all keys that a block of queries sees, delta = sum_j p dp - dlse of that very dp: for few keys dp
and delta are almost equal, and two sums rounded apart would leave nothing of their difference.
"""

import triton
import triton.language as tl

from .attention_tile import (
    LOG2E,
    NOT_SPECIALIZED,
    diagonal_of,
    load_rows,
    load_whole_rows,
    sequence_of,
    store_rows,
    zero_slack,
)
from .dropout import keep_mask, row_keys, stream_keys


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_dqb, stride_dqs,
    stride_dqh,
    stride_lb, stride_lh, stride_dlb, stride_dls, stride_dlh,
    batch, heads, seqlen_q, seqlen_k, total_q, q_blocks, sequence_offset, scale, threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, KEY_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    DLSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and their delta for the kernel of dk and dv. Grid as in
    the forward."""
    pid = tl.program_id(0)
    q_block = pid % q_blocks
    head = (pid // q_blocks) % heads
    b = pid // q_blocks // heads
    dq_ptr += head.to(tl.int64) * stride_dqh
    if VARLEN:  # noqa: SIM102 (compile time first: cu_seqlens is None otherwise)
        if b == batch:
            first = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
            zero_slack(
                dq_ptr, stride_dqs, first, total_q, q_block, q_blocks, HEAD_DIM, BLOCK_D, BLOCK_M
            )
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
        q_block = tl.cdiv(len_q, BLOCK_M) - 1 - q_block
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
    out_ptr += bl * stride_ob + hl * stride_oh + start_q * stride_os
    dout_ptr += bl * stride_gb + hl * stride_gh + start_q * stride_gs
    dq_ptr += bl * stride_dqb + start_q * stride_dqs
    lse_ptr += bl * stride_lb + hl * stride_lh + start_q
    delta_ptr += bl * stride_lb + hl * stride_lh + start_q

    keys_end = len_k
    whole = len_k
    if CAUSAL != 0:
        last_row = tl.minimum(start_m + BLOCK_M, len_q) - 1
        keys_end = tl.minimum(len_k, tl.maximum(last_row + diagonal + 1, 0))
        whole = tl.minimum(len_k, tl.maximum(start_m + diagonal + 1, 0))
    whole = whole // BLOCK_N * BLOCK_N

    rows = start_m + tl.arange(0, BLOCK_M)
    q_MD = load_rows(q_ptr, stride_qs, rows, 0, len_q, HEAD_DIM, BLOCK_D)
    dout_MD = load_rows(dout_ptr, stride_gs, rows, 0, len_q, HEAD_DIM, BLOCK_D)
    out_MD = load_rows(out_ptr, stride_os, rows, 0, len_q, HEAD_DIM, BLOCK_D)
    dlse_M = tl.zeros([BLOCK_M], tl.float32)
    if DLSE:
        dlse_ptr += bl * stride_dlb + hl * stride_dlh + start_q * stride_dls
        dlse_M = tl.load(dlse_ptr + rows.to(tl.int64) * stride_dls, mask=rows < len_q, other=0.0)
    delta_M = tl.sum(dout_MD.to(tl.float32) * out_MD.to(tl.float32), 1) - dlse_M
    lse_log2_M = tl.load(lse_ptr + rows, mask=rows < len_q, other=float("inf")) * LOG2E
    row_a, row_b = rows, rows
    if DROPOUT:
        a, b_key = stream_keys(seed_ptr, b + sequence_offset, head)
        row_a, row_b = row_keys(a, b_key, rows)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if keys_end <= BLOCK_N:
        dq_MD, delta_M = _bwd_dq_step(
            dq_MD, q_MD, dout_MD, lse_log2_M, delta_M, dlse_M, k_ptr, v_ptr, stride_ks,
            stride_vs, 0, keys_end,
            rows, diagonal, scale, row_a, row_b, threshold, keep_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, DROPOUT, True, True, PRECISION)  # fmt: skip
    else:
        for start_n in range(0, whole, BLOCK_N):
            dq_MD, delta_M = _bwd_dq_step(
                dq_MD, q_MD, dout_MD, lse_log2_M, delta_M, dlse_M, k_ptr, v_ptr, stride_ks,
                stride_vs, start_n, keys_end,
                rows, diagonal, scale, row_a, row_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, DROPOUT, False, False, PRECISION)  # fmt: skip
        for start_n in range(whole, keys_end, BLOCK_N):
            dq_MD, delta_M = _bwd_dq_step(
                dq_MD, q_MD, dout_MD, lse_log2_M, delta_M, dlse_M, k_ptr, v_ptr, stride_ks,
                stride_vs, start_n, keys_end,
                rows, diagonal, scale, row_a, row_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, DROPOUT, True, False, PRECISION)  # fmt: skip
    tl.store(delta_ptr + rows, delta_M, mask=rows < len_q)
    store_rows(dq_ptr, stride_dqs, dq_MD * scale, rows, len_q, HEAD_DIM, BLOCK_D)


@triton.jit
def _bwd_dq_step(dq_MD, q_MD, dout_MD, lse_log2_M, delta_M, dlse_M, k_ptr, v_ptr, stride_k,
                 stride_v, start_n, keys_end,
                 rows, diagonal, scale, row_a, row_b, threshold, keep_scale,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                 CAUSAL: tl.constexpr,
                 DROPOUT: tl.constexpr, MASKED: tl.constexpr, ALL_KEYS: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """dq / scale += ds k over one block of keys; with ALL_KEYS it is the only one, and gives
    delta."""
    cols = start_n + tl.arange(0, BLOCK_N)
    if MASKED:
        k_ND = load_rows(k_ptr, stride_k, cols, 0, keys_end, HEAD_DIM, BLOCK_D)
        v_ND = load_rows(v_ptr, stride_v, cols, 0, keys_end, HEAD_DIM, BLOCK_D)
    else:
        k_ND = load_whole_rows(k_ptr, stride_k, cols, HEAD_DIM, BLOCK_D)
        v_ND = load_whole_rows(v_ptr, stride_v, cols, HEAD_DIM, BLOCK_D)
    s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
    p_MN = tl.exp2(s_MN * (scale * LOG2E) - lse_log2_M[:, None])
    dp_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision=PRECISION)
    if DROPOUT:
        keep = keep_mask(row_a[:, None], row_b[:, None], rows[:, None], cols[None, :], threshold)
        dp_MN = tl.where(keep, dp_MN * keep_scale, 0.0)
    if MASKED:
        # k = 0 past the end gives p = exp(0 - lse), which may be inf; inf * 0 = NaN.
        allowed = (cols < keys_end)[None, :]
        if CAUSAL != 0:
            allowed = allowed & (cols[None, :] <= (rows + diagonal)[:, None])
        p_MN = tl.where(allowed, p_MN, 0.0)
        dp_MN = tl.where(allowed, dp_MN, 0.0)
    if ALL_KEYS:
        delta_M = tl.sum(p_MN * dp_MN, 1) - dlse_M
    ds_MN = p_MN * (dp_MN - delta_M[:, None])
    dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD, delta_M


@triton.jit
def _bwd_dkdv_step(dk_ND, dv_ND, k_ND, v_ND, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_q,
                   stride_g, start_m, first, len_q,
                   cols, diagonal, scale, key_a, key_b, threshold, keep_scale,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                   DROPOUT: tl.constexpr, DIAGONAL: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """dk / scale += dsᵀ q and dv / keep_scale += pᵀ dout over one block of queries, with transposed
    scores [N, M].

    Queries outside [first, len_q) are loaded as q = dout = delta = 0 and lse = inf, so p = ds = 0
    without a mask on the scores; on the diagonal they are masked all the same, because there a key
    may be seen by no query at all, and its NaN must not reach its gradient (NaN * 0 = NaN). Keys
    past the end need no mask: they only reach their own rows of dk and dv.
    """
    rows = start_m + tl.arange(0, BLOCK_M)
    inside = (rows >= first) & (rows < len_q)
    q_MD = load_rows(q_ptr, stride_q, rows, first, len_q, HEAD_DIM, BLOCK_D)
    lse_log2_M = tl.load(lse_ptr + rows, mask=inside, other=float("inf")) * LOG2E
    s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION)
    p_NM = tl.exp2(s_NM * (scale * LOG2E) - lse_log2_M[None, :])
    if DIAGONAL:
        allowed = (cols[:, None] <= (rows + diagonal)[None, :]) & (rows < len_q)[None, :]
        p_NM = tl.where(allowed, p_NM, 0.0)
    dout_MD = load_rows(dout_ptr, stride_g, rows, first, len_q, HEAD_DIM, BLOCK_D)
    dp_NM = tl.dot(v_ND, tl.trans(dout_MD), input_precision=PRECISION)
    delta_M = tl.load(delta_ptr + rows, mask=inside, other=0.0)
    kept_NM = p_NM
    if DROPOUT:
        row_a, row_b = row_keys(key_a, key_b, rows)
        keep = keep_mask(row_a[None, :], row_b[None, :], rows[None, :], cols[:, None], threshold)
        kept_NM = tl.where(keep, p_NM, 0.0)
        dp_NM = tl.where(keep, dp_NM * keep_scale, 0.0)
    dv_ND = tl.dot(kept_NM.to(dout_MD.dtype), dout_MD, dv_ND, input_precision=PRECISION)
    ds_NM = p_NM * (dp_NM - delta_M[None, :])
    if DIAGONAL:
        ds_NM = tl.where(allowed, ds_NM, 0.0)
    dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_ND


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh,
    stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh, stride_lb, stride_lh,
    batch, heads, seqlen_q, seqlen_k, total_k, k_blocks, sequence_offset, scale, threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, KEY_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head. Grid: key blocks (fastest) x heads x batch, all on
    axis 0.

    dk and dv share their strides. Rows of keys past key_lengths, and in varlen past cu_seqlens[-1],
    get zeros.
    """
    pid = tl.program_id(0)
    k_block = pid % k_blocks
    head = (pid // k_blocks) % heads
    b = pid // k_blocks // heads
    dk_ptr += head.to(tl.int64) * stride_dkh
    dv_ptr += head.to(tl.int64) * stride_dkh
    if VARLEN:  # noqa: SIM102 (compile time first: cu_seqlens is None otherwise)
        if b == batch:
            tail = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
            zero_slack(
                dk_ptr, stride_dks, tail, total_k, k_block, k_blocks, HEAD_DIM, BLOCK_D, BLOCK_N
            )
            zero_slack(
                dv_ptr, stride_dks, tail, total_k, k_block, k_blocks, HEAD_DIM, BLOCK_D, BLOCK_N
            )
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
    start_n = k_block * BLOCK_N
    rows_end = len_k  # rows of dk and dv that are this sequence's own
    if not VARLEN:
        rows_end = seqlen_k
    if start_n >= rows_end:
        return
    diagonal = diagonal_of(len_q, len_k, seqlen_q, seqlen_k, CAUSAL, VARLEN)
    bl, hl = b.to(tl.int64), head.to(tl.int64)
    q_ptr += bl * stride_qb + hl * stride_qh + start_q * stride_qs
    k_ptr += bl * stride_kb + hl * stride_kh + start_k * stride_ks
    v_ptr += bl * stride_vb + hl * stride_vh + start_k * stride_vs
    dout_ptr += bl * stride_gb + hl * stride_gh + start_q * stride_gs
    dk_ptr += bl * stride_dkb + start_k * stride_dks
    dv_ptr += bl * stride_dkb + start_k * stride_dks
    lse_ptr += bl * stride_lb + hl * stride_lh + start_q
    delta_ptr += bl * stride_lb + hl * stride_lh + start_q

    # Queries [first, below) see some keys of this block, queries [below, len_q) all of them.
    first = len_q * 0
    below = len_q * 0
    if CAUSAL != 0:
        first = tl.maximum(-diagonal, 0)
        last_key = tl.minimum(start_n + BLOCK_N, len_k) - 1
        below = tl.minimum(tl.cdiv(tl.maximum(last_key - diagonal, 0), BLOCK_M) * BLOCK_M, len_q)
    start = tl.maximum(start_n - diagonal, 0) // BLOCK_M * BLOCK_M if CAUSAL != 0 else first
    end = tl.where(start_n < len_k, len_q, 0)  # no key of this block is inside: no query

    cols = start_n + tl.arange(0, BLOCK_N)
    k_ND = load_rows(k_ptr, stride_ks, cols, 0, len_k, HEAD_DIM, BLOCK_D)
    v_ND = load_rows(v_ptr, stride_vs, cols, 0, len_k, HEAD_DIM, BLOCK_D)
    key_a, key_b = start_n, start_n
    if DROPOUT:
        key_a, key_b = stream_keys(seed_ptr, b + sequence_offset, head)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if CAUSAL != 0:
        for start_m in range(start, tl.minimum(below, end), BLOCK_M):
            dk_ND, dv_ND = _bwd_dkdv_step(
                dk_ND, dv_ND, k_ND, v_ND, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qs,
                stride_gs, start_m, first, len_q,
                cols, diagonal, scale, key_a, key_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_M, DROPOUT, True, PRECISION)  # fmt: skip
    for start_m in range(tl.maximum(start, below), end, BLOCK_M):
        dk_ND, dv_ND = _bwd_dkdv_step(
            dk_ND, dv_ND, k_ND, v_ND, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qs, stride_gs,
            start_m, first, len_q,
            cols, diagonal, scale, key_a, key_b, threshold, keep_scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, DROPOUT, False, PRECISION)  # fmt: skip
    # Keys past the end have p = exp(0 - lse) != 0: their rows are garbage until here.
    own = (cols < len_k)[:, None]
    if DROPOUT:
        dv_ND = dv_ND * keep_scale
    store_rows(
        dk_ptr, stride_dks, tl.where(own, dk_ND * scale, 0.0), cols, rows_end, HEAD_DIM, BLOCK_D
    )
    store_rows(dv_ptr, stride_dks, tl.where(own, dv_ND, 0.0), cols, rows_end, HEAD_DIM, BLOCK_D)
