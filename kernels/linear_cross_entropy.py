"""Cross-entropy of a linear layer's logits, forward and backward, without holding the logits.

    z = x wᵀ + b,   m_t = max_v z_tv,   s_t = Σ_v exp(z_tv − m_t),   lse_t = m_t + log s_t
    loss_t = (1 − ε)(lse_t − z_t,target) + ε (lse_t − mean_v z_tv)

Legend: T rows (tokens), V classes (vocabulary), K input features; x [T, K], w [V, K], b [V], z
[T, V]; ε label smoothing; P vocabulary splits of tuning.VOCABULARY_SPLIT classes; C classes of one
chunk of the backward.

    forward   one product: each program walks one split of the classes for a block of rows and keeps
              m, s and Σ z of each row so far (Milakov & Gimelshein 2018)
              combine: the P partial results of a row, in the order of the splits -> loss, m, s
    backward  for each chunk of C classes:
              dz = dloss (exp(z − m)/s − (1 − ε)[v = target] − ε/V)   one product, z recomputed
              dw = dzᵀ x,  db = Σ_t dz                                 one product (linear.py)
              dx += dz w                                               one product, fp32 in memory

C bounds the memory and depends on T. No result does: dw and db of a class are summed in registers
within its chunk, and dx goes on from the stored fp32 sum exactly where the last chunk left it.

A row whose target is ignore_index: loss 0, dz 0, and x is read as 0 for dw (0 * NaN = NaN). A block
of such rows only is not computed. A target that is no class: loss and s NaN, and with s all of the
row's gradients.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .device import architecture, dot_precision, guard
from .linear import bwd_weight, load_tile, tile_of


@triton.jit
def _logits_tile(x_ptrs, w_ptr, b_ptr, stride_w, cols, classes, ins, BIAS: tl.constexpr,
                 PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """z [BLOCK_M, BLOCK_N] of the rows at x_ptrs [BLOCK_M, BLOCK_K]. Columns past the classes
    repeat the last one. EVEN: K is a multiple of BLOCK_K."""
    ks = tl.arange(0, BLOCK_K)
    safe_cols = tl.minimum(cols, classes - 1)
    w_ptrs = w_ptr + safe_cols[:, None].to(tl.int64) * stride_w + ks[None, :]
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, ins, BLOCK_K):
        inside = (ks < ins - start)[None, :]
        x_MK = load_tile(x_ptrs, inside, not EVEN)
        w_NK = load_tile(w_ptrs, inside, not EVEN)
        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if BIAS:
        acc_MN += tl.load(b_ptr + safe_cols).to(tl.float32)[None, :]
    return acc_MN


@triton.jit
def _load_target(target_ptr, rows, tokens, ignore_index):
    """(target [BLOCK_M], whether it counts); rows past the last one do not count."""
    target = tl.load(target_ptr + rows, mask=rows < tokens, other=ignore_index)
    return target, target != ignore_index


@triton.jit
def _column_of(target, first, count):
    """The target's column among `count` classes from `first` on, as int32; -1 where it is none."""
    column = target - first
    return tl.where((column >= 0) & (column < count), column, -1).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "ignore_index"])
def linear_cross_entropy_fwd_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, m_ptr, s_ptr, z_sum_ptr, z_target_ptr,
    stride_x, stride_w, tokens, classes, ins, ignore_index,
    BIAS: tl.constexpr, SMOOTHING: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One split of the classes for BLOCK_M rows -> m, s, and with SMOOTHING Σ z, each [P, T]; the
    split that holds a row's target stores z_target [T].

    Row blocks run fastest: programs that run at one time share their split of w in L2.
    """
    tl.static_assert(SPLIT % BLOCK_N == 0, "a split is whole column blocks")
    row_blocks = tl.cdiv(tokens, BLOCK_M)
    split = tl.program_id(0) // row_blocks
    rows = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target, kept = _load_target(target_ptr, rows, tokens, ignore_index)
    first = split * SPLIT
    count = tl.minimum(classes - first, SPLIT)
    target_col = _column_of(target, first, count)
    x_ptrs = x_ptr + tl.minimum(rows, tokens - 1)[:, None] * stride_x
    x_ptrs += tl.arange(0, BLOCK_K)[None, :]

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    z_sum, z_target = s, s
    stop = tl.where(tl.max(kept.to(tl.int32), 0) == 0, 0, count)
    for start in range(0, stop, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        z_MN = _logits_tile(x_ptrs, w_ptr, b_ptr, stride_w, first + cols, classes, ins, BIAS,
                            PRECISION, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        z_target += tl.sum(tl.where(cols[None, :] == target_col[:, None], z_MN, 0.0), 1)
        inside = (cols < count)[None, :]
        if SMOOTHING:
            z_sum += tl.sum(tl.where(inside, z_MN, 0.0), 1)
        new_m = tl.maximum(m, tl.max(z_MN, 1))  # a class that is repeated adds nothing to it
        # A row of -inf so far: exp(-inf - 0) = 0, where -inf - (-inf) would be NaN.
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        e_MN = tl.where(inside, tl.exp(z_MN - finite_m[:, None]), 0.0)
        s = s * tl.exp(m - finite_m) + tl.sum(e_MN, 1)
        m = new_m

    inside = rows < tokens
    partial = split.to(tl.int64) * tokens + rows
    tl.store(m_ptr + partial, m, mask=inside)
    tl.store(s_ptr + partial, s, mask=inside)
    if SMOOTHING:
        tl.store(z_sum_ptr + partial, z_sum, mask=inside)
    tl.store(z_target_ptr + rows, z_target, mask=inside & (target_col >= 0))


@triton.jit(do_not_specialize=["tokens", "ignore_index"])
def linear_cross_entropy_combine_kernel(
    part_m_ptr, part_s_ptr, z_sum_ptr, z_target_ptr, target_ptr, loss_ptr, m_ptr, s_ptr, tokens,
    classes, splits, ignore_index, label_smoothing, SMOOTHING: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """loss, m and s [T] of BLOCK_M rows from their partial results [P, T]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    target, kept = _load_target(target_ptr, rows, tokens, ignore_index)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    z_sum = s
    partial = rows
    for _ in range(0, splits):
        part_m = tl.load(part_m_ptr + partial, mask=inside, other=0.0)
        part_s = tl.load(part_s_ptr + partial, mask=inside, other=1.0)
        if SMOOTHING:
            z_sum += tl.load(z_sum_ptr + partial, mask=inside, other=0.0)
        new_m = tl.maximum(m, part_m)
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        s = s * tl.exp(m - finite_m) + part_s * tl.exp(part_m - finite_m)
        m = new_m
        partial += tokens
    valid = (target >= 0) & (target < classes)
    z_target = tl.load(z_target_ptr + rows, mask=inside & valid & kept, other=0.0)
    # (m - z) + log s and not lse - z: m + log s would round away the digits of a small loss.
    log_s = tl.log(s)
    loss = (m - z_target) + log_s
    if SMOOTHING:
        smooth = (m - z_sum / classes) + log_s
        loss = (1 - label_smoothing) * loss + label_smoothing * smooth
    loss = tl.where(valid, loss, float("nan"))
    tl.store(loss_ptr + rows, tl.where(kept, loss, 0.0), mask=inside)
    tl.store(m_ptr + rows, m, mask=inside)
    tl.store(s_ptr + rows, tl.where(valid, s, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["tokens", "first", "ignore_index"])
def linear_cross_entropy_bwd_dz_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, m_ptr, s_ptr, dloss_ptr, dz_ptr,
    stride_x, stride_w, stride_dloss, stride_dz, tokens, first, count, ins, ignore_index,
    confidence, share, BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of dz [T, C] for the `count` classes from `first` on, whose
    weight and bias begin at w_ptr and b_ptr. confidence: 1 - eps, share: eps / V."""
    row_block, col_block = tile_of(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(count, BLOCK_N), GROUP
    )
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    target, kept = _load_target(target_ptr, rows, tokens, ignore_index)
    target_col = _column_of(target, first, count)
    safe_rows = tl.minimum(rows, tokens - 1)
    ins = tl.where(tl.max(kept.to(tl.int32), 0) == 0, 0, ins)
    x_ptrs = x_ptr + safe_rows[:, None] * stride_x + tl.arange(0, BLOCK_K)[None, :]
    z_MN = _logits_tile(x_ptrs, w_ptr, b_ptr, stride_w, cols, count, ins, BIAS, PRECISION, EVEN,
                        BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    m, s = tl.load(m_ptr + safe_rows), tl.load(s_ptr + safe_rows)
    dloss = tl.load(dloss_ptr + safe_rows * stride_dloss)
    # forward: loss = lse - (1 - eps) z_target - eps mean(z), so dz = dloss (p - (1 - eps) [target]
    # - eps / V) with p = exp(z - m) / s
    dz_MN = tl.exp(z_MN - m[:, None]) * (dloss / s)[:, None] - (dloss * share)[:, None]
    is_target = cols[None, :] == target_col[:, None]
    dz_MN -= tl.where(is_target, (dloss * confidence)[:, None], 0.0)
    dz_MN = tl.where(kept[:, None], dz_MN, 0.0)
    inside = (rows < tokens)[:, None] & (cols < count)[None, :]
    dz_ptrs = dz_ptr + rows[:, None] * stride_dz + cols[None, :]
    tl.store(dz_ptrs, dz_MN.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def linear_cross_entropy_bwd_dx_kernel(
    dz_ptr, w_ptr, dx_ptr, stride_dz, stride_w, tokens, count, ins,
    ADD: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_K] of dx [T, K] fp32 = (dx if ADD) + dz w over a chunk of classes.
    EVEN: the chunk is a multiple of BLOCK_N."""
    row_block, col_block = tile_of(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(ins, BLOCK_K), GROUP
    )
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_K + tl.arange(0, BLOCK_K)
    ns = tl.arange(0, BLOCK_N)
    inside = (rows < tokens)[:, None] & (cols < ins)[None, :]
    dx_ptrs = dx_ptr + rows[:, None] * ins + cols[None, :]
    dz_ptrs = dz_ptr + tl.minimum(rows, tokens - 1)[:, None] * stride_dz + ns[None, :]
    w_ptrs = w_ptr + ns[:, None].to(tl.int64) * stride_w + cols[None, :]
    step_w = tl.cast(BLOCK_N, tl.int64) * stride_w
    acc_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if ADD:
        acc_MK = tl.load(dx_ptrs, mask=inside, other=0.0)
    for start in range(0, count, BLOCK_N):
        n_inside = ns < count - start
        w_mask = (cols < ins)[None, :]
        if not EVEN:
            w_mask = w_mask & n_inside[:, None]
        dz_MN = load_tile(dz_ptrs, n_inside[None, :], not EVEN)
        w_NK = tl.load(w_ptrs, mask=w_mask, other=0.0)
        acc_MK = tl.dot(dz_MN, w_NK, acc_MK, input_precision=PRECISION)
        dz_ptrs += BLOCK_N
        w_ptrs += step_w
    tl.store(dx_ptrs, acc_MK, mask=inside)


def linear_cross_entropy_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss [T], m [T], s [T]) in float32; m and s of an ignored row are any values."""
    (tokens, ins), classes = x.shape, weight.shape[0]
    loss, m, s, z_target = (
        torch.empty(tokens, dtype=torch.float32, device=x.device) for _ in range(4)
    )
    if tokens == 0:
        return loss, m, s
    arch = architecture(x)
    tile = tuning.linear_cross_entropy("fwd", x.element_size(), arch)
    split = tuning.VOCABULARY_SPLIT[arch]
    splits, smoothing = triton.cdiv(classes, split), label_smoothing > 0
    part_m, part_s, z_sum = torch.empty((3, splits, tokens), dtype=torch.float32, device=x.device)
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    with guard(x):
        linear_cross_entropy_fwd_kernel[(triton.cdiv(tokens, tile.block_m) * splits,)](
            x, weight, bias, target, part_m, part_s, z_sum, z_target,
            x.stride(0), weight.stride(0), tokens, classes, ins, ignore_index,
            BIAS=bias is not None, SMOOTHING=smoothing, PRECISION=dot_precision(x.dtype),
            EVEN=ins % tile.block_k == 0, SPLIT=split, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        block_m = tuning.COMBINE_ROWS
        linear_cross_entropy_combine_kernel[(triton.cdiv(tokens, block_m),)](
            part_m, part_s, z_sum, z_target, target, loss, m, s, tokens, classes, splits,
            ignore_index, label_smoothing,
            SMOOTHING=smoothing, BLOCK_M=block_m, num_warps=block_m // 32,
        )  # fmt: skip
    return loss, m, s


def linear_cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    m: torch.Tensor,
    s: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dx [T, K], dw [V, K], db [V] or None), in the dtypes of x, weight and bias."""
    (tokens, ins), classes = x.shape, weight.shape[0]
    dw = torch.empty((classes, ins), dtype=weight.dtype, device=x.device)
    db = None if bias is None else torch.empty(classes, dtype=bias.dtype, device=x.device)
    if tokens == 0:
        return torch.empty_like(x), dw.zero_(), None if db is None else db.zero_()
    arch, itemsize, precision = architecture(x), x.element_size(), dot_precision(x.dtype)
    chunk = min(classes, tuning.vocabulary_chunk(tokens, itemsize, arch))
    # Rows of dz begin at 16 bytes, so that its loads stay wide.
    dz = torch.empty((tokens, triton.cdiv(chunk, 16) * 16), dtype=x.dtype, device=x.device)
    dx = torch.empty((tokens, ins), dtype=torch.float32, device=x.device)
    dz_tile = tuning.linear_cross_entropy("bwd_dz", itemsize, arch)
    dx_tile = tuning.linear_cross_entropy("bwd_dx", itemsize, arch)
    row_blocks = triton.cdiv(tokens, dz_tile.block_m)
    dx_tiles = triton.cdiv(tokens, dx_tile.block_m) * triton.cdiv(ins, dx_tile.block_n)
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    x_kept = torch.where((target != ignore_index)[:, None], x, 0.0)
    with guard(x):
        for first in range(0, classes, chunk):
            part = slice(first, min(first + chunk, classes))
            count, w, b = part.stop - first, weight[part], None if bias is None else bias[part]
            linear_cross_entropy_bwd_dz_kernel[(row_blocks * triton.cdiv(count, dz_tile.block_n),)](
                x, w, b, target, m, s, dloss, dz,
                x.stride(0), w.stride(0), dloss.stride(0), dz.stride(0), tokens, first, count, ins,
                ignore_index, 1 - label_smoothing, label_smoothing / classes,
                BIAS=b is not None, PRECISION=precision, EVEN=ins % dz_tile.block_k == 0,
                BLOCK_M=dz_tile.block_m, BLOCK_N=dz_tile.block_n, BLOCK_K=dz_tile.block_k,
                GROUP=tuning.GROUP_M, num_warps=dz_tile.warps, num_stages=dz_tile.stages,
            )  # fmt: skip
            bwd_weight(dz[:, :count], x_kept, w, b, None, "", 0.0, None, None,
                       out=(dw[part], None if db is None else db[part]))  # fmt: skip
            if dx_tiles:
                linear_cross_entropy_bwd_dx_kernel[(dx_tiles,)](
                    dz, w, dx, dz.stride(0), w.stride(0), tokens, count, ins,
                    ADD=first > 0, PRECISION=precision, EVEN=count % dx_tile.block_k == 0,
                    BLOCK_M=dx_tile.block_m, BLOCK_K=dx_tile.block_n, BLOCK_N=dx_tile.block_k,
                    GROUP=tuning.GROUP_M, num_warps=dx_tile.warps, num_stages=dx_tile.stages,
                )  # fmt: skip
    return dx.to(x.dtype), dw, db
