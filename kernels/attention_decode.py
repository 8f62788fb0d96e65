"""Attention of one query per sequence over a key/value cache, split over the keys.

    s_j = softcap tanh(scale q k_j / softcap) + bias_j,  lse = log sum_j exp(s_j),
    out = sum_j exp(s_j - lse) v_j

(Dao et al. 2023, "Flash-Decoding", for the split; Ainslie et al. 2023 for grouped heads.)

Legend: B batch, S keys that the cache has room for, H query heads, Hk key heads, GROUP = H / Hk,
D head dim; G, N, C, D as suffixes: query heads of one key head, keys, splits, columns; m maximum of
the scores, total the sum of exp(s - m), acc that of exp(s - m) v; "slot" a place for the partial
result of one split. m is kept in natural units: in those of log2 a large lse is rounded twice more.

One query shares a key with nothing but its own group: every key and value is read once for GROUP
multiply-adds an element, so memory is the limit and what matters is to have enough loads in flight.
So one program takes one split of KEYS keys as one tile, without a loop: it asks for its whole tile
of k and of v and computes what comes. Programs past the sequence's own end return at once. Where
the cache has room for more than one split, each leaves (m, total, acc) in float32, and a second
kernel combines the splits of each head in their order.

GROUP = 1 multiplies and adds on fp32 lanes. A tensor core would waste 15 of its 16 rows, and want k
and v in shared memory first, for nothing: at D = 64 and 16 bits a tile of 64 KB takes 860
instructions of 8 warps, 1,700 clocks of an SM's four schedulers (read from the machine code for
sm_90), while an SM's share of an H100's 3.35 TB/s brings 64 KB in 4,500. GROUP > 1 puts the query
heads of one key head on the rows of a product, 16 at a time, so that a key is read once for them.

KEYS depends on head dim, dtype and architecture only, and splits are counted from key 0: a
sequence's result is the same bits in every batch and every size of cache, and one split alone is
combined to the bits that it would have written directly (its weight is exp2(0) = 1).

Masks: what lies outside the sequence's own keys is loaded as 0 (0 * NaN = NaN) and its score is
-inf; a query that sees nothing has m = -inf, whose exponent is taken against 0 (-inf - (-inf) =
NaN); its total is 0, and it gets out 0, lse -inf. Offsets are int64.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .attention_tile import LOG2E
from .device import architecture, dot_precision, guard
from .tanh import tanh

HEADS = tl.constexpr(16)  # rows of one mma
SLOTS = tl.constexpr(16)  # partial results that the second kernel reads at once
UNLIMITED = 2**31 - 1  # window_left that reaches back over every int32 length

# Arguments that change with the batch: one compiled kernel serves them all.
NOT_SPECIALIZED = ("room", "slots", "window_left")


@triton.jit
def _keys_of(cache_lengths_ptr, b, room, window_left):
    """(first, end): sequence b's query sees keys first .. end - 1; a length is at most the room."""
    end = tl.minimum(tl.maximum(tl.load(cache_lengths_ptr + b), 0), room)
    return tl.maximum(end - 1 - window_left, 0), end


@triton.jit
def _logits(s, seen, bias_ptr, at, scale, softcap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr):
    """Scores from products q k; -inf where a key is not seen.

    SOFTCAP: `scale` has 1 / softcap in it. BIAS: None, "add" or "mask", found at bias_ptr + at.
    """
    s = s * scale
    if SOFTCAP:
        s = softcap * tanh(s)
    if BIAS == "add":
        s += tl.load(bias_ptr + at, mask=seen, other=0.0).to(tl.float32)
    if BIAS == "mask":
        seen = seen & (tl.load(bias_ptr + at, mask=seen, other=0) != 0)
    return tl.where(seen, s, -float("inf"))


@triton.jit
def _exp_from(s, m):
    """exp(s - m); 0 where nothing was seen and both are -inf."""
    return tl.exp2((s - tl.where(m == -float("inf"), 0.0, m)) * LOG2E)


@triton.jit
def _lse(m, total):
    """log sum exp(s); the sum is 0 only where nothing was seen (NaN != 0)."""
    nothing = total == 0.0
    return tl.where(nothing, -float("inf"), m + tl.log(tl.where(nothing, 1.0, total)))


@triton.jit
def _divide(acc, total):
    """acc / total; 0 where nothing was seen, whatever the values there hold."""
    nothing = total == 0.0
    return tl.where(nothing, 0.0, acc / tl.where(nothing, 1.0, total))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, cache_lengths_ptr, out_ptr, lse_ptr, partial_ptr, stats_ptr,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_bb, stride_bh, stride_bs,
    key_heads, room, slots, window_left, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    DIRECT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one sequence, for the (first 16, next 16 ...) heads of one key head.

    Grid: slots (fastest) x query head blocks x key heads x batch, all on axis 0. DIRECT: there is
    one slot; writes out [B, H, D] and lse [B, H]. Else writes partial [B, H, slots, D] and stats
    [2, B, H, slots], maxima and totals.
    """
    slot = tl.program_id(0) % slots
    pid = tl.program_id(0) // slots
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    head_k = pid // blocks % key_heads
    b = pid // blocks // key_heads
    first, end = _keys_of(cache_lengths_ptr, b, room, window_left)
    start = (first // KEYS + slot) * KEYS
    if not DIRECT:  # noqa: SIM102 (compile time first)
        if start >= end:
            return
    first_in_group = pid % blocks * HEADS
    first_head = head_k * GROUP + first_in_group
    bl, hkl, hl = b.to(tl.int64), head_k.to(tl.int64), first_head.to(tl.int64)
    q_ptr += bl * stride_qb + hl * stride_qh
    k_ptr += bl * stride_kb + hkl * stride_kh
    v_ptr += bl * stride_vb + hkl * stride_vh
    if BIAS is not None:
        bias_ptr += bl * stride_bb + hl * stride_bh
    row = (bl * key_heads * GROUP + hl) * slots + slot  # of [B, H, slots]
    all_slots = tl.num_programs(0).to(tl.int64) // blocks * GROUP  # elements of [B, H, slots]

    dims = tl.arange(0, BLOCK_D)
    keys = start + tl.arange(0, KEYS)
    seen_N = (keys >= first) & (keys < end)
    inside = seen_N[:, None] & (dims < HEAD_DIM)[None, :]
    at = keys[:, None].to(tl.int64)
    k_ND = tl.load(k_ptr + at * stride_ks + dims[None, :], mask=inside, other=0.0)
    v_ND = tl.load(v_ptr + at * stride_vs + dims[None, :], mask=inside, other=0.0)
    bias_N = keys.to(tl.int64) * stride_bs
    if GROUP == 1:
        q_D = tl.load(q_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        s_N = tl.sum(k_ND.to(tl.float32) * q_D[None, :], 1)
        s_N = _logits(s_N, seen_N, bias_ptr, bias_N, scale, softcap, SOFTCAP, BIAS)
        m = tl.max(s_N, 0)
        p_N = _exp_from(s_N, m)
        total = tl.sum(p_N, 0)
        acc_D = tl.sum(p_N[:, None] * v_ND.to(tl.float32), 0)
        if DIRECT:
            tl.store(lse_ptr + row, _lse(m, total))
            out_D = _divide(acc_D, total).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * HEAD_DIM + dims, out_D, mask=dims < HEAD_DIM)
        else:
            tl.store(stats_ptr + row, m)
            tl.store(stats_ptr + all_slots + row, total)
            tl.store(partial_ptr + row * HEAD_DIM + dims, acc_D, mask=dims < HEAD_DIM)
    else:
        heads = tl.arange(0, HEADS)
        valid_G = heads < GROUP - first_in_group
        stored = valid_G[:, None] & (dims < HEAD_DIM)[None, :]
        hl_G = heads.to(tl.int64)
        q_GD = tl.load(q_ptr + hl_G[:, None] * stride_qh + dims[None, :], mask=stored, other=0.0)
        s_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision=PRECISION)
        seen = valid_G[:, None] & seen_N[None, :]
        bias_GN = hl_G[:, None] * stride_bh + bias_N[None, :]
        s_GN = _logits(s_GN, seen, bias_ptr, bias_GN, scale, softcap, SOFTCAP, BIAS)
        m_G = tl.max(s_GN, 1)
        p_GN = _exp_from(s_GN, m_G[:, None])
        total_G = tl.sum(p_GN, 1)
        acc_GD = tl.dot(p_GN.to(v_ND.dtype), v_ND, input_precision=PRECISION)
        rows = row + hl_G * slots
        if DIRECT:
            tl.store(lse_ptr + rows, _lse(m_G, total_G), mask=valid_G)
            out_GD = _divide(acc_GD, total_G[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], out_GD, mask=stored)
        else:
            tl.store(stats_ptr + rows, m_G, mask=valid_G)
            tl.store(stats_ptr + all_slots + rows, total_G, mask=valid_G)
            tl.store(partial_ptr + rows[:, None] * HEAD_DIM + dims[None, :], acc_GD, mask=stored)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_decode_combine_kernel(
    partial_ptr, stats_ptr, cache_lengths_ptr, out_ptr, lse_ptr, heads, room, slots, window_left,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out and lse of one head of one sequence from its splits, 16 at a time. Grid: B x H."""
    pid = tl.program_id(0)
    first, end = _keys_of(cache_lengths_ptr, pid // heads, room, window_left)
    used = tl.cdiv(end, KEYS) - first // KEYS  # 0 for length 0
    row = pid.to(tl.int64) * slots
    totals_ptr = stats_ptr + tl.num_programs(0).to(tl.int64) * slots
    dims = tl.arange(0, BLOCK_D)
    m = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc_D = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, used, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        written = slot < used
        m_C = tl.load(stats_ptr + row + slot, mask=written, other=-float("inf"))
        total_C = tl.load(totals_ptr + row + slot, mask=written, other=0.0)
        acc_CD = tl.load(
            partial_ptr + (row + slot)[:, None] * HEAD_DIM + dims[None, :],
            mask=written[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        m_new = tl.maximum(m, tl.max(m_C, 0))
        w_C = _exp_from(m_C, m_new)
        rescale = _exp_from(m, m_new)
        total = total * rescale + tl.sum(total_C * w_C, 0)
        acc_D = acc_D * rescale + tl.sum(acc_CD * w_C[:, None], 0)
        m = m_new
    tl.store(lse_ptr + pid, _lse(m, total))
    out_D = _divide(acc_D, total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid.to(tl.int64) * HEAD_DIM + dims, out_D, mask=dims < HEAD_DIM)


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    bias: torch.Tensor | None,
    window_left: int,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, D] in q's dtype, lse fp32 [B, H]); one launch where the keys fit one split."""
    batch, heads, head_dim = q.shape
    room, key_heads = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group = heads // key_heads
    kind = "vector" if group == 1 else "group"
    tile = tuning.attention_decode(kind, head_dim, q.element_size(), architecture(q))
    reach = UNLIMITED if window_left < 0 else min(window_left, UNLIMITED)
    # A query sees at most reach + 1 keys, of which the first may be the last of its split.
    slots = max(1, min(triton.cdiv(room, tile.keys), triton.cdiv(reach, tile.keys) + 1))
    partial = stats = None
    if slots > 1:
        partial, stats = (
            torch.empty(shape, dtype=torch.float32, device=q.device)
            for shape in ((batch, heads, slots, head_dim), (2, batch, heads, slots))
        )
    bias_strides, mode = (0, 0, 0), None
    if bias is not None:
        mode = "mask" if bias.dtype == torch.bool else "add"
        bias = bias.view(torch.uint8) if mode == "mask" else bias
        bias_strides = bias[:, :, 0].expand(batch, heads, room).stride()
    sizes = dict(HEAD_DIM=head_dim, BLOCK_D=tuning.block_d(head_dim), KEYS=tile.keys)
    with guard(q):
        attention_decode_kernel[(slots * triton.cdiv(group, HEADS.value) * key_heads * batch,)](
            q, k_cache, v_cache, bias, cache_lengths, out, lse, partial, stats,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *bias_strides,
            key_heads, room, slots, reach, scale / softcap if softcap else scale, softcap,
            GROUP=group, DIRECT=slots == 1, SOFTCAP=softcap != 0, BIAS=mode,
            PRECISION=dot_precision(q.dtype), num_warps=tile.warps, num_stages=1, **sizes,
        )  # fmt: skip
        if slots > 1:
            attention_decode_combine_kernel[(batch * heads,)](
                partial, stats, cache_lengths, out, lse, heads, room, slots, reach,
                num_warps=4, **sizes,
            )  # fmt: skip
    return out, lse
