"""y = residual + dropout(act(x wᵀ + b)), forward and backward, as one family of three matrix
products.

Legend: M tokens, N output features, K input features; x [M, K], w [N, K], b [N], z = x wᵀ + b [M,
N] (the pre-activation), y and dy [M, N]. act: "" (none), "gelu" (erf, Hendrycks & Gimpel 2016),
"gelu_tanh", "relu".

    forward   y  = residual + dropout(act(z))            bias, activation, dropout, residual in the
    epilogue backward  dz = dropout'(dy) * act'(z)                computed while dy is loaded, never
    stored
              dx = dz w                                  epilogue, if asked: dx * act'(z_prev) and
              act(z_prev) dw = dzᵀ x,  db = sum over tokens of dz    both in one loop over tokens
              (dresidual = dy)

Each program owns one tile of the result and sums in the order of the index: nothing is split over
the summed dimension, so a token's result does not depend on the other tokens, and gradients are the
same bits from run to run. Programs run through the tiles in groups of GROUP_M row blocks, so that
the operands of neighbours meet in L2 (the order of Triton's tutorial 3).

Masks: a tail of the summed dimension is loaded as 0 in both operands (beyond it may stand NaN,
and 0 * NaN = NaN). Past the result's edge, rows are read at the last valid index instead (they only
reach their own, unstored results), and columns are masked, which keeps wide loads wide.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .device import architecture, dot_precision, guard
from .dropout import hidden_keep_mask, hidden_row_keys, keep_mask, threshold_and_scale

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TANH_OUTER = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): gelu_tanh(z) = z sigmoid(2 u)
_TANH_INNER = tl.constexpr(0.044715)  # u = sqrt(2 / pi) (z + 0.044715 z³)
_TANH_INNER_3 = tl.constexpr(3 * 0.044715)


@triton.jit
def activate_both(g, z, ACTIVATION: tl.constexpr):
    """(act(z), g * act'(z)) in fp32; the compiler drops the one that is not used."""
    h = z
    if ACTIVATION == "gelu":  # (z Phi(z))' = Phi(z) + z phi(z)
        cumulative = 0.5 + 0.5 * tl.erf(z * _SQRT_HALF)
        h = z * cumulative
        g = g * (cumulative + z * (_INV_SQRT_2PI * tl.exp(-0.5 * z * z)))
    elif ACTIVATION == "gelu_tanh":  # (z s(2u))' = s + z s (1 - s) 2u'
        double_u = (z + z * z * z * _TANH_INNER) * _TANH_OUTER
        # By e = exp(-|2u|) <= 1: 1 - s would lose its digits where s is near 1.
        e = tl.exp(-tl.abs(double_u))
        inverse = 1.0 / (1.0 + e)
        s = tl.where(double_u < 0, e * inverse, inverse)
        h = z * s
        slope = e * inverse * inverse  # s (1 - s)
        g = g * (s + z * slope * ((1 + z * z * _TANH_INNER_3) * _TANH_OUTER))
    elif ACTIVATION == "relu":
        h = tl.where(z < 0, 0.0, z)  # a NaN stays
        g = tl.where(z <= 0, 0.0, g)
    return h, g


@triton.jit
def tile_of(pid, row_blocks, col_blocks, GROUP: tl.constexpr):
    """(row block, column block): GROUP row blocks share one pass over the columns."""
    per_group = GROUP * col_blocks
    first = pid // per_group * GROUP
    rows_here = tl.minimum(row_blocks - first, GROUP)
    within = pid % per_group
    return first + within % rows_here, within // rows_here


@triton.jit
def load_tile(ptrs, mask, MASKED: tl.constexpr):
    """A tile, 0 outside the mask."""
    if MASKED:
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _load_dz(dy_ptrs, z_ptrs, mask, row_a, row_b, row_names, cols, threshold, keep_scale,
             ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """dz = dropout'(dy) * act'(z) of a tile [M, N]; in dy's dtype where there is nothing to
    compute."""
    dz = load_tile(dy_ptrs, mask, MASKED)
    if DROPOUT:
        keep = keep_mask(
            row_a[:, None], row_b[:, None], row_names[:, None], cols[None, :], threshold
        )
        dz = tl.where(keep, dz.to(tl.float32) * keep_scale, 0.0)
    if ACTIVATION != "":
        z = load_tile(z_ptrs, mask, MASKED).to(tl.float32)
        _, dz = activate_both(dz.to(tl.float32), z, ACTIVATION)
    return dz


@triton.jit(do_not_specialize=["tokens", "threshold"])
def linear_fwd_kernel(
    x_ptr, w_ptr, b_ptr, residual_ptr, z_ptr, y_ptr, seed_ptr, dropout_rows_ptr,
    stride_x, stride_w, stride_residual, stride_y, tokens, outs, ins, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SAVE_Z: tl.constexpr,
    DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M tokens, BLOCK_N outputs] of y, and of z if SAVE_Z. EVEN: K is a multiple of
    BLOCK_K."""
    row_block, col_block = tile_of(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(outs, BLOCK_N), GROUP
    )
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, tokens - 1)[:, None] * stride_x + ks[None, :]
    w_ptrs = w_ptr + tl.minimum(cols, outs - 1)[:, None].to(tl.int64) * stride_w + ks[None, :]
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, ins, BLOCK_K):
        inside = (ks < ins - start)[None, :]
        x_MK = load_tile(x_ptrs, inside, not EVEN)
        w_NK = load_tile(w_ptrs, inside, not EVEN)
        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    inside = (rows < tokens)[:, None] & (cols < outs)[None, :]
    z_MN = acc_MN
    if BIAS:
        z_MN += tl.load(b_ptr + cols, mask=cols < outs, other=0.0).to(tl.float32)[None, :]
    y_offsets = rows[:, None] * stride_y + cols[None, :]
    if SAVE_Z:
        tl.store(z_ptr + y_offsets, z_MN.to(z_ptr.dtype.element_ty), mask=inside)
    y_MN, _ = activate_both(z_MN, z_MN, ACTIVATION)
    if DROPOUT:
        keep = hidden_keep_mask(
            seed_ptr, dropout_rows_ptr, rows, tokens, cols, threshold, DROPOUT_ROWS
        )
        y_MN = tl.where(keep, y_MN * keep_scale, 0.0)
    if RESIDUAL:
        residual_ptrs = residual_ptr + rows[:, None] * stride_residual + cols[None, :]
        y_MN += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_offsets, y_MN.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def linear_bwd_input_kernel(
    dy_ptr, z_ptr, w_ptr, z_prev_ptr, dx_ptr, h_ptr, seed_ptr, dropout_rows_ptr,
    stride_dy, stride_z, stride_w, stride_dx, tokens, outs, ins, threshold, keep_scale,
    ACTIVATION: tl.constexpr, PREVIOUS: tl.constexpr, DROPOUT: tl.constexpr,
    DROPOUT_ROWS: tl.constexpr,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M tokens, BLOCK_K inputs] of dx = dz w, summed over outputs. EVEN: N is a
    multiple of BLOCK_N.

    EPILOGUE: x was h = act(z_prev) with the activation PREVIOUS: stores dx * act'(z_prev), which is
    dz of the layer before, and h, which its weight gradient needs. z_prev and h share the strides
    of dx.
    """
    row_block, col_block = tile_of(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(ins, BLOCK_K), GROUP
    )
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_K + tl.arange(0, BLOCK_K)
    ns = tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, tokens - 1)
    dy_ptrs = dy_ptr + safe_rows[:, None] * stride_dy + ns[None, :]
    z_ptrs = dy_ptrs
    if ACTIVATION != "":
        z_ptrs = z_ptr + safe_rows[:, None] * stride_z + ns[None, :]
    w_ptrs = w_ptr + ns[:, None].to(tl.int64) * stride_w + cols[None, :]
    step_w = BLOCK_N * stride_w.to(tl.int64)
    row_names, row_a, row_b = rows, rows, rows
    if DROPOUT:
        row_names, row_a, row_b = hidden_row_keys(
            seed_ptr, dropout_rows_ptr, safe_rows, tokens, DROPOUT_ROWS
        )
    acc_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, outs, BLOCK_N):
        inside = ns < outs - start
        dz_MN = _load_dz(dy_ptrs, z_ptrs, inside[None, :], row_a, row_b, row_names, start + ns,
                         threshold, keep_scale, ACTIVATION, DROPOUT, not EVEN)  # fmt: skip
        w_mask = (cols < ins)[None, :]
        if not EVEN:
            w_mask = w_mask & inside[:, None]
        w_NK = tl.load(w_ptrs, mask=w_mask, other=0.0)
        acc_MK = tl.dot(dz_MN.to(w_NK.dtype), w_NK, acc_MK, input_precision=PRECISION)
        dy_ptrs += BLOCK_N
        z_ptrs += BLOCK_N
        w_ptrs += step_w

    inside = (rows < tokens)[:, None] & (cols < ins)[None, :]
    offsets = rows[:, None] * stride_dx + cols[None, :]
    if EPILOGUE:
        z_prev_MK = tl.load(z_prev_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        h_MK, acc_MK = activate_both(acc_MK, z_prev_MK, PREVIOUS)
        tl.store(h_ptr + offsets, h_MK.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + offsets, acc_MK.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows(x_MN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum over the rows as a binary tree, the interpreter's too: log2(BLOCK_M) roundings a
    column."""
    rows: tl.constexpr = BLOCK_M // 2
    pairs = tl.sum(tl.reshape(x_MN, [rows, 2, BLOCK_N]), 1)
    if rows > 1:
        return _sum_rows(pairs, rows, BLOCK_N)
    else:
        return tl.reshape(pairs, [BLOCK_N])


@triton.jit
def _bwd_weight_sum(
    dy_ptr, z_ptr, x_ptr, seed_ptr, dropout_rows_ptr, stride_dy, stride_z, stride_x, outs_N, ins_K,
    tokens, outs, ins,
    threshold, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM_DZ: tl.constexpr,
):  # fmt: skip
    """(dzᵀ x [N, K], sum of dz over whole tiles [M, N]); the second only if SUM_DZ."""
    acc_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    db_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = (rows < tokens)[:, None]
        dz_inside = inside & (outs_N < outs)[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dy + outs_N[None, :]
        z_ptrs = dy_ptrs
        if ACTIVATION != "":
            z_ptrs = z_ptr + rows[:, None] * stride_z + outs_N[None, :]
        row_names, row_a, row_b = rows, rows, rows
        if DROPOUT:
            row_names, row_a, row_b = hidden_row_keys(
                seed_ptr, dropout_rows_ptr, rows, tokens, DROPOUT_ROWS
            )
        dz_MN = _load_dz(dy_ptrs, z_ptrs, dz_inside, row_a, row_b, row_names, outs_N, threshold,
                         keep_scale,
                         ACTIVATION, DROPOUT, True)  # fmt: skip
        x_inside = inside & (ins_K < ins)[None, :]
        x_MK = tl.load(x_ptr + rows[:, None] * stride_x + ins_K[None, :], mask=x_inside, other=0.0)
        if SUM_DZ:
            db_MN += dz_MN.to(tl.float32)
        acc_NK = tl.dot(tl.trans(dz_MN.to(x_MK.dtype)), x_MK, acc_NK, input_precision=PRECISION)
    return acc_NK, db_MN


@triton.jit(do_not_specialize=["tokens", "threshold"])
def linear_bwd_weight_kernel(
    dy_ptr, z_ptr, x_ptr, dw_ptr, db_ptr, seed_ptr, dropout_rows_ptr,
    stride_dy, stride_z, stride_x, stride_dw, tokens, outs, ins, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_N outputs, BLOCK_K inputs] of dw = dzᵀ x; the first tile of each row of tiles
    also sums db."""
    row_block, col_block = tile_of(
        tl.program_id(0), tl.cdiv(outs, BLOCK_N), tl.maximum(tl.cdiv(ins, BLOCK_K), 1), GROUP
    )
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col_block * BLOCK_K + tl.arange(0, BLOCK_K)
    sum_dz = False
    if BIAS:
        sum_dz = col_block == 0
    if sum_dz:
        acc_NK, db_MN = _bwd_weight_sum(
            dy_ptr, z_ptr, x_ptr, seed_ptr, dropout_rows_ptr, stride_dy, stride_z, stride_x,
            rows, cols, tokens, outs, ins,
            threshold, keep_scale,
            ACTIVATION, DROPOUT, DROPOUT_ROWS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            True)  # fmt: skip
        db_N = _sum_rows(db_MN, BLOCK_M, BLOCK_N)
        tl.store(db_ptr + rows, db_N.to(db_ptr.dtype.element_ty), mask=rows < outs)
    else:
        acc_NK, _ = _bwd_weight_sum(
            dy_ptr, z_ptr, x_ptr, seed_ptr, dropout_rows_ptr, stride_dy, stride_z, stride_x,
            rows, cols, tokens, outs, ins,
            threshold, keep_scale,
            ACTIVATION, DROPOUT, DROPOUT_ROWS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            False)  # fmt: skip
    inside = (rows < outs)[:, None] & (cols < ins)[None, :]
    dw_ptrs = dw_ptr + rows[:, None].to(tl.int64) * stride_dw + cols[None, :]
    tl.store(dw_ptrs, acc_NK.to(dw_ptr.dtype.element_ty), mask=inside)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """A gradient as it comes from autograd (expanded, transposed) with last stride 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def bwd_input(
    dy: torch.Tensor,
    w: torch.Tensor,
    z: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
    z_prev: torch.Tensor | None = None,
    previous: str = "",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx [M, K], None), or with z_prev [M, K]: (dx * act'(z_prev), act(z_prev)) of the activation
    `previous`."""
    (tokens, outs), ins = dy.shape, w.shape[1]
    dx = torch.empty((tokens, ins), dtype=dy.dtype, device=dy.device)
    h = None if z_prev is None else torch.empty_like(dx)
    if dx.numel() == 0:
        return dx, h
    tile = tuning.gemm("bwd_input", dy.element_size(), architecture(dy))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    with guard(dy):
        linear_bwd_input_kernel[(triton.cdiv(tokens, tile.block_m) * triton.cdiv(ins,
                                                                                 tile.block_n),)](
            dy, z, w, z_prev, dx, h, dropout_seed, dropout_rows,
            dy.stride(0), z.stride(0) if activation else 0, w.stride(0), ins, tokens, outs, ins,
            threshold, keep_scale,
            ACTIVATION=activation, PREVIOUS=previous, DROPOUT=dropout_p > 0,
            DROPOUT_ROWS=dropout_rows is not None,
            EPILOGUE=z_prev is not None, PRECISION=dot_precision(dy.dtype),
            EVEN=outs % tile.block_k == 0,
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_N=tile.block_k, GROUP=tuning.GROUP_M,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx, h


def bwd_weight(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    z: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dw [N, K] in w's dtype, db [N] in b's dtype or None); contiguous, in `out` if given. No
    tokens: zeros."""
    (tokens, outs), ins = dy.shape, x.shape[1]
    if out is None:
        dw = torch.empty((outs, ins), dtype=w.dtype, device=w.device)
        db = None if b is None else torch.empty_like(b, memory_format=torch.contiguous_format)
    else:
        dw, db = out
    tile = tuning.gemm("bwd_weight", dy.element_size(), architecture(dy))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    # At least one column of tiles: without input features there is still db.
    tiles = triton.cdiv(outs, tile.block_m) * max(1, triton.cdiv(ins, tile.block_n))
    if tiles == 0:
        return dw, db
    with guard(dy):
        linear_bwd_weight_kernel[(tiles,)](
            dy, z, x, dw, db, dropout_seed, dropout_rows,
            dy.stride(0), z.stride(0) if activation else 0, x.stride(0), ins, tokens, outs, ins,
            threshold, keep_scale,
            ACTIVATION=activation, BIAS=b is not None, DROPOUT=dropout_p > 0,
            DROPOUT_ROWS=dropout_rows is not None,
            PRECISION=dot_precision(dy.dtype),
            BLOCK_N=tile.block_m, BLOCK_K=tile.block_n, BLOCK_M=tile.block_k, GROUP=tuning.GROUP_M,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dw, db


def linear_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
    save_preact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [M, N], z): z = x wᵀ + b [M, N] if save_preact and there is an activation, else an empty
    tensor [0]."""
    (tokens, ins), outs = x.shape, w.shape[0]
    y = torch.empty((tokens, outs), dtype=x.dtype, device=x.device)
    save = bool(save_preact and activation)
    z = torch.empty((tokens, outs) if save else (0,), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, z
    tile = tuning.gemm("fwd", x.element_size(), architecture(x))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    with guard(x):
        linear_fwd_kernel[(triton.cdiv(tokens, tile.block_m) * triton.cdiv(outs, tile.block_n),)](
            x, w, b, residual, z, y, dropout_seed, dropout_rows,
            x.stride(0), w.stride(0), 0 if residual is None else residual.stride(0), outs, tokens,
            outs, ins,
            threshold, keep_scale,
            ACTIVATION=activation, BIAS=b is not None, RESIDUAL=residual is not None, SAVE_Z=save,
            DROPOUT=dropout_p > 0, DROPOUT_ROWS=dropout_rows is not None,
            PRECISION=dot_precision(x.dtype),
            EVEN=ins % tile.block_k == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP=tuning.GROUP_M, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y, z


def preactivation(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, z: torch.Tensor
) -> torch.Tensor:
    """z [M, N] as saved; x wᵀ + b where it was not (z is empty [0]), by the same tiles and so the
    same bits."""
    if z.dim() == 2:
        return z
    return linear_fwd(x, w, b, None, "", 0.0, None, None, False)[0]


def linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    z: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dx, dw, db) of y = dropout(act(x wᵀ + b)); db is None without b. z is the pre-activation,
    empty [0] where it was not saved."""
    dy = unit_stride(dy)
    if activation:
        z = preactivation(x, w, b, z)
    hidden = (activation, dropout_p, dropout_seed, dropout_rows)
    dx, _ = bwd_input(dy, w, z, *hidden)
    dw, db = bwd_weight(dy, x, w, b, z, *hidden)
    return dx, dw, db
