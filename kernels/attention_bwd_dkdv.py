"""Backward of attention, where keys own dk and dv; and for few keys dq, dk and dv in one launch.

Legend in attention.py, equations in attention_bwd_dq.py.
"""

import triton
import triton.language as tl

from .attention_tile import (
    NOT_SPECIALIZED,
    band_of,
    in_band,
    load_lse,
    load_rows,
    normalised,
    probability,
    seen_keys,
    sequence_of,
    store_rows,
    zero_rows,
)
from .dropout import keep_mask, row_keys, stream_keys


@triton.jit
def _queries_step(dk_ND, dv_ND, k_ND, v_ND, q_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
                  bias_ptr, stride_q, stride_g, stride_dls, stride_dq, stride_bq, stride_bk,
                  start_m, first, last, len_q, cols, key_inside, len_k, low, high, scale, softcap,
                  stream_a, stream_b, threshold, keep_scale,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  LOW: tl.constexpr, HIGH: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
                  KEY_PADDING: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
                  DLSE: tl.constexpr, MASKED: tl.constexpr, ALL_KEYS: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """dk / scale += dxᵀ q and dv / keep_scale += pᵀ dout over one block of queries, with transposed
    scores [N, M]; with ALL_KEYS the tile holds all keys, and gives delta and dq too.

    Queries outside [first, last) see nothing: q = dout = delta = 0 and lse = inf, so p = dx = 0
    but for a key that is infinite, which gives NaN with q = 0: so p is masked. Where MASKED, dx is,
    too, because there a key may be seen by no query at all, and its NaN must not reach its
    gradient. Keys past the end need no mask unless they are summed over (ALL_KEYS): they only reach
    their own rows of dk and dv.
    """
    rows = start_m + tl.arange(0, BLOCK_M)
    inside = (rows >= first) & (rows < last)
    lse_M = load_lse(lse_ptr, rows, inside)
    if BIAS != 0 or KEY_PADDING:
        inside = inside & (lse_M != float("inf"))
    q_MD = load_rows(q_ptr, stride_q, rows, inside, HEAD_DIM, BLOCK_D)
    s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION)
    p_NM, tanh_NM = probability(
        s_NM, lse_M[None, :], bias_ptr, stride_bq, stride_bk, rows[None, :], cols[:, None], len_q,
        len_k, scale, softcap, SOFTCAP, BIAS, FOLD)  # fmt: skip
    dout_MD = load_rows(dout_ptr, stride_g, rows, inside, HEAD_DIM, BLOCK_D)
    dp_NM = tl.dot(v_ND, tl.trans(dout_MD), input_precision=PRECISION)
    allowed = inside[None, :]
    if MASKED:
        allowed = allowed & in_band(rows[None, :], cols[:, None], low, high, LOW, HIGH)
        if ALL_KEYS:
            allowed = allowed & key_inside[:, None]
    p_NM = tl.where(allowed, p_NM, 0.0)
    if ALL_KEYS and not FOLD:
        p_NM = normalised(p_NM, 0)
    kept_NM = p_NM
    if DROPOUT:
        row_a, row_b = row_keys(stream_a, stream_b, rows)
        keep = keep_mask(row_a[None, :], row_b[None, :], rows[None, :], cols[:, None], threshold)
        kept_NM = tl.where(keep, p_NM, 0.0)
        dp_NM = tl.where(keep, dp_NM * keep_scale, 0.0)
    dv_ND = tl.dot(kept_NM.to(dout_MD.dtype), dout_MD, dv_ND, input_precision=PRECISION)
    if ALL_KEYS:
        dp_NM = tl.where(allowed, dp_NM, 0.0)
        delta_M = tl.sum(p_NM * dp_NM, 0)
        if DLSE:
            delta_M -= tl.load(dlse_ptr + rows.to(tl.int64) * stride_dls, mask=inside, other=0.0)
    else:
        delta_M = tl.load(delta_ptr + rows, mask=inside, other=0.0)
    dx_NM = p_NM * (dp_NM - delta_M[None, :])
    if SOFTCAP:
        dx_NM *= 1 - tanh_NM * tanh_NM
    if MASKED:
        dx_NM = tl.where(allowed, dx_NM, 0.0)
    dx_NM = dx_NM.to(q_MD.dtype)
    dk_ND = tl.dot(dx_NM, q_MD, dk_ND, input_precision=PRECISION)
    if ALL_KEYS:
        dq_MD = tl.dot(tl.trans(dx_NM), k_ND, input_precision=PRECISION)
        store_rows(dq_ptr, stride_dq, dq_MD * scale, rows, len_q, HEAD_DIM, BLOCK_D)
        if BIAS != 0:  # the kernel of the bias gradient reads it
            tl.store(delta_ptr + rows, delta_M, mask=rows < len_q)
    return dk_ND, dv_ND


@triton.jit
def _store_key_grads(dk_ptr, dv_ptr, stride, dk_ND, dv_ND, cols, inside, rows_end, scale,
                     keep_scale, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    """dk and dv of a block of keys; 0 for those that are padding, whose sums are garbage until
    here: they have p = exp(0 - lse) != 0."""
    if DROPOUT:
        dv_ND = dv_ND * keep_scale
    dk_ND = tl.where(inside[:, None], dk_ND * scale, 0.0)
    dv_ND = tl.where(inside[:, None], dv_ND, 0.0)
    store_rows(dk_ptr, stride, dk_ND, cols, rows_end, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, stride, dv_ND, cols, rows_end, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, keys_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh,
    stride_lb, stride_lh, stride_bb, stride_bh, stride_bq, stride_bk, stride_keys,
    batch, key_heads, group, seqlen_q, seqlen_k, total_k, k_blocks, least_keys,
    window_left, window_right, sequence_offset, scale, softcap, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VARLEN: tl.constexpr,
    KEY_LENGTHS: tl.constexpr, KEY_PADDING: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, over the `group` query heads that read it. Grid:
    key blocks (fastest) x key heads x batch, all on axis 0; serves sequences with len_k >=
    least_keys.

    dk and dv share their strides. Rows of keys past key_lengths, and in varlen past cu_seqlens[-1],
    get zeros.
    """
    pid = tl.program_id(0)
    k_block = pid % k_blocks
    key_head = (pid // k_blocks) % key_heads
    b = pid // k_blocks // key_heads
    dk_ptr += key_head.to(tl.int64) * stride_dkh
    dv_ptr += key_head.to(tl.int64) * stride_dkh
    if VARLEN:  # noqa: SIM102 (compile time first: cu_seqlens is None otherwise)
        if b == batch:
            tail = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
            block = k_block.to(tl.int64)
            zero_rows(
                dk_ptr, stride_dks, tail, total_k, block, k_blocks, HEAD_DIM, BLOCK_D, BLOCK_N
            )
            zero_rows(
                dv_ptr, stride_dks, tail, total_k, block, k_blocks, HEAD_DIM, BLOCK_D, BLOCK_N
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
    if len_k < least_keys:
        return
    start_n = k_block * BLOCK_N
    rows_end = len_k  # rows of dk and dv that are this sequence's own
    if not VARLEN:
        rows_end = seqlen_k
    if start_n >= rows_end:
        return
    low, high = band_of(len_q, len_k, seqlen_q, seqlen_k, window_left, window_right, ALIGN, VARLEN)
    bl, hk = b.to(tl.int64), key_head.to(tl.int64)
    q_ptr += bl * stride_qb + start_q * stride_qs
    k_ptr += bl * stride_kb + hk * stride_kh + start_k * stride_ks
    v_ptr += bl * stride_vb + hk * stride_vh + start_k * stride_vs
    dout_ptr += bl * stride_gb + start_q * stride_gs
    dk_ptr += bl * stride_dkb + start_k * stride_dks
    dv_ptr += bl * stride_dkb + start_k * stride_dks
    lse_ptr += bl * stride_lb + start_q
    delta_ptr += bl * stride_lb + start_q
    if BIAS != 0:
        bias_ptr += bl * stride_bb
    if KEY_PADDING:
        keys_ptr += bl * stride_keys

    # Queries [first, last) see some key at all, [start, below) some keys of this block and
    # [below, end) all of them.
    first = len_q * 0
    last = len_q
    start = len_q * 0
    below = len_q * 0
    end = len_q
    last_key = tl.minimum(start_n + BLOCK_N, len_k) - 1
    if HIGH:
        first = tl.maximum(-high, 0)
        start = tl.maximum(start_n - high, 0) // BLOCK_M * BLOCK_M
        below = tl.minimum(tl.cdiv(tl.maximum(last_key - high, 0), BLOCK_M) * BLOCK_M, len_q)
    if LOW:
        last = tl.minimum(len_q, tl.maximum(len_k - low, 0))
        end = tl.minimum(len_q, tl.maximum(last_key - low + 1, 0))
        below = end
    end = tl.where(start_n < len_k, end, 0)  # no key of this block is inside: no query
    below = tl.minimum(below, end)

    cols = start_n + tl.arange(0, BLOCK_N)
    inside = seen_keys(keys_ptr, cols, 0, len_k, KEY_PADDING)
    k_ND = load_rows(k_ptr, stride_ks, cols, inside, HEAD_DIM, BLOCK_D)
    v_ND = load_rows(v_ptr, stride_vs, cols, inside, HEAD_DIM, BLOCK_D)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        hl = head.to(tl.int64)
        stream_a, stream_b = start_n, start_n
        if DROPOUT:
            stream_a, stream_b = stream_keys(seed_ptr, b + sequence_offset, head)
        if HIGH or LOW:
            for start_m in range(start, below, BLOCK_M):
                dk_ND, dv_ND = _queries_step(
                    dk_ND, dv_ND, k_ND, v_ND, q_ptr + hl * stride_qh, dout_ptr + hl * stride_gh,
                    lse_ptr + hl * stride_lh, lse_ptr, delta_ptr + hl * stride_lh, dk_ptr,
                    bias_ptr + hl * stride_bh if BIAS != 0 else bias_ptr,
                    stride_qs, stride_gs, 0, 0, stride_bq, stride_bk,
                    start_m, first, last, len_q, cols, inside, len_k, low, high, scale, softcap,
                    stream_a, stream_b, threshold, keep_scale,
                    HEAD_DIM, BLOCK_D, BLOCK_M, LOW, HIGH, SOFTCAP, BIAS, KEY_PADDING, DROPOUT,
                    FOLD, False, True, False, PRECISION)  # fmt: skip
        for start_m in range(tl.maximum(start, below), end, BLOCK_M):
            dk_ND, dv_ND = _queries_step(
                dk_ND, dv_ND, k_ND, v_ND, q_ptr + hl * stride_qh, dout_ptr + hl * stride_gh,
                lse_ptr + hl * stride_lh, lse_ptr, delta_ptr + hl * stride_lh, dk_ptr,
                bias_ptr + hl * stride_bh if BIAS != 0 else bias_ptr,
                stride_qs, stride_gs, 0, 0, stride_bq, stride_bk,
                start_m, first, last, len_q, cols, inside, len_k, low, high, scale, softcap,
                stream_a, stream_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_M, LOW, HIGH, SOFTCAP, BIAS, KEY_PADDING, DROPOUT,
                FOLD, False, False, False, PRECISION)  # fmt: skip
    _store_key_grads(dk_ptr, dv_ptr, stride_dks, dk_ND, dv_ND, cols, inside, rows_end, scale,
                     keep_scale, DROPOUT, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_short_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr,
    keys_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_lengths_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_gb, stride_gs, stride_gh, stride_dqb, stride_dqs, stride_dqh,
    stride_dkb, stride_dks, stride_dkh, stride_lb, stride_lh, stride_dlb, stride_dls, stride_dlh,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_keys,
    batch, key_heads, group, seqlen_q, seqlen_k, total_q, total_k,
    window_left, window_right, sequence_offset, scale, softcap, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VARLEN: tl.constexpr,
    KEY_LENGTHS: tl.constexpr, KEY_PADDING: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr, DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one key head of one sequence of at most BLOCK_N keys, over the `group` query
    heads that read it. Grid: key heads (fastest) x batch; sequences with more keys are passed over.

    Rows of keys past key_lengths, and in varlen of tokens past cu_seqlens[-1] (one more "sequence",
    where the grid has it), get zeros.
    """
    pid = tl.program_id(0)
    key_head = pid % key_heads
    b = pid // key_heads
    hk = key_head.to(tl.int64)
    dk_ptr += hk * stride_dkh
    dv_ptr += hk * stride_dkh
    if VARLEN:  # noqa: SIM102 (compile time first: cu_seqlens is None otherwise)
        if b == batch:
            tail = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
            zero_rows(dk_ptr, stride_dks, tail, total_k, 0, 1, HEAD_DIM, BLOCK_D, BLOCK_N)
            zero_rows(dv_ptr, stride_dks, tail, total_k, 0, 1, HEAD_DIM, BLOCK_D, BLOCK_N)
            tail = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
            for member in range(0, group):
                hl = hk * group + member
                zero_rows(dq_ptr + hl * stride_dqh, stride_dqs, tail, total_q, 0, 1,
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
    if len_k > BLOCK_N:
        return
    low, high = band_of(len_q, len_k, seqlen_q, seqlen_k, window_left, window_right, ALIGN, VARLEN)
    bl = b.to(tl.int64)
    q_ptr += bl * stride_qb + start_q * stride_qs
    k_ptr += bl * stride_kb + hk * stride_kh + start_k * stride_ks
    v_ptr += bl * stride_vb + hk * stride_vh + start_k * stride_vs
    dout_ptr += bl * stride_gb + start_q * stride_gs
    dq_ptr += bl * stride_dqb + start_q * stride_dqs
    dk_ptr += bl * stride_dkb + start_k * stride_dks
    dv_ptr += bl * stride_dkb + start_k * stride_dks
    lse_ptr += bl * stride_lb + start_q
    delta_ptr += bl * stride_lb + start_q
    if DLSE:
        dlse_ptr += bl * stride_dlb + start_q * stride_dls
    if BIAS != 0:
        bias_ptr += bl * stride_bb
    if KEY_PADDING:
        keys_ptr += bl * stride_keys
    # Queries [first, last) see some key, keys [first_key, end_key) are seen by some query: what the
    # others hold, NaN perhaps, must not meet the products.
    first = len_q * 0
    last = len_q
    first_key = len_k * 0
    end_key = len_k
    if HIGH:
        first = tl.maximum(-high, 0)
        end_key = tl.minimum(len_k, tl.maximum(len_q + high, 0))
    if LOW:
        last = tl.minimum(len_q, tl.maximum(len_k - low, 0))
        first_key = tl.maximum(low, 0)

    cols = tl.arange(0, BLOCK_N)
    inside = seen_keys(keys_ptr, cols, first_key, end_key, KEY_PADDING)
    k_ND = load_rows(k_ptr, stride_ks, cols, inside, HEAD_DIM, BLOCK_D)
    v_ND = load_rows(v_ptr, stride_vs, cols, inside, HEAD_DIM, BLOCK_D)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        hl = head.to(tl.int64)
        stream_a, stream_b = b, b
        if DROPOUT:
            stream_a, stream_b = stream_keys(seed_ptr, b + sequence_offset, head)
        for start_m in range(0, len_q, BLOCK_M):
            dk_ND, dv_ND = _queries_step(
                dk_ND, dv_ND, k_ND, v_ND, q_ptr + hl * stride_qh, dout_ptr + hl * stride_gh,
                lse_ptr + hl * stride_lh, dlse_ptr + hl * stride_dlh if DLSE else lse_ptr,
                delta_ptr + hl * stride_lh, dq_ptr + hl * stride_dqh,
                bias_ptr + hl * stride_bh if BIAS != 0 else bias_ptr,
                stride_qs, stride_gs, stride_dls, stride_dqs, stride_bq, stride_bk,
                start_m, first, last, len_q, cols, inside, len_k, low, high, scale, softcap,
                stream_a, stream_b, threshold, keep_scale,
                HEAD_DIM, BLOCK_D, BLOCK_M, LOW, HIGH, SOFTCAP, BIAS, KEY_PADDING, DROPOUT,
                FOLD, DLSE, True, True, PRECISION)  # fmt: skip
    rows_end = len_k
    if not VARLEN:
        rows_end = seqlen_k
        zero_rows(dk_ptr, stride_dks, BLOCK_N, rows_end, 0, 1, HEAD_DIM, BLOCK_D, BLOCK_N)
        zero_rows(dv_ptr, stride_dks, BLOCK_N, rows_end, 0, 1, HEAD_DIM, BLOCK_D, BLOCK_N)
    _store_key_grads(dk_ptr, dv_ptr, stride_dks, dk_ND, dv_ND, cols, inside, rows_end, scale,
                     keep_scale, DROPOUT, HEAD_DIM, BLOCK_D)  # fmt: skip
