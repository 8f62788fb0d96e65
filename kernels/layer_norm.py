"""LayerNorm y = (x - mean) * rstd * weight + bias, and y = LayerNorm(residual + dropout(x)).
(Ba et al. 2016)

    mean = sum x / C,   var = sum (x - mean)² / C,   rstd = 1 / sqrt(var + eps)          over the C
    columns of a row

Legend: R rows of a tile, C columns; x, y, z [rows, cols]; z = residual + dropout(x), stored in x's
dtype and read back by the backward, so the statistics are those of the stored, rounded z.
Statistics and sums are fp32, and a mean much larger than the deviation costs no digits: the
variance is that of the deviations from the mean, and what the rounding of the mean leaves behind is
the mean of those deviations, which is taken off them again.

Rows up to tuning.LAYER_NORM_MAX_BLOCK columns are held in registers and read once. Wider rows are
read in pieces, once for each pass over them. A program's writes are read back by other threads of
the same program there, so a barrier stands between.

Backward, with x̂ = (x - mean) * rstd and g = dy * weight:
    dx = rstd * (g - sum g / C - x̂ * sum(g x̂) / C),   dweight = sum_rows dy * x̂,   dbias =
    sum_rows dy
(from d mean = 1/C and d rstd = -rstd² x̂ / C). With residual: dz += dx, dresidual = dz, dx = dz *
keep * keep_scale. dweight and dbias: each of P programs owns every P-th tile of rows and writes one
partial sum; a second kernel adds the P partial sums in order. P and the tile depend on the shape
only: the same bits from run to run.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .device import architecture, guard
from .dropout import hidden_keep_mask, threshold_and_scale


@triton.jit
def load_tile(ptr, stride, rows, cols, inside):
    """A tile [R, C] in fp32, 0 outside."""
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def store_tile(ptr, stride, tile, rows, cols, inside):
    """A tile [R, C] from fp32, rounded to the memory's dtype."""
    tl.store(
        ptr + rows[:, None] * stride + cols[None, :], tile.to(ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _load_input(
    x_ptr, residual_ptr, z_ptr, seed_ptr, dropout_rows_ptr, stride_x, stride_residual, stride_z,
    rows, rows_total, cols, inside, threshold, keep_scale,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr,
):  # fmt: skip
    """What is normalised: x, or z = residual + dropout(x), which is stored and rounded to its
    dtype."""
    x_RC = load_tile(x_ptr, stride_x, rows, cols, inside)
    if DROPOUT:
        keep = hidden_keep_mask(
            seed_ptr, dropout_rows_ptr, rows, rows_total, cols, threshold, DROPOUT_ROWS
        )
        x_RC = tl.where(keep, x_RC * keep_scale, 0.0)
    if ADD:
        x_RC += load_tile(residual_ptr, stride_residual, rows, cols, inside)
        x_RC = x_RC.to(z_ptr.dtype.element_ty).to(tl.float32)
        store_tile(z_ptr, stride_z, x_RC, rows, cols, inside)
    return x_RC


@triton.jit
def left_and_rstd(left_R, square_R, cols_total, eps):
    """(mean of the deviations, 1 / sqrt(var + eps)) from the sums of deviations and squares."""
    left_R = left_R / cols_total
    var_R = square_R / cols_total - left_R * left_R
    # A row of one value leaves rounding, of either sign. A NaN stays.
    return left_R, 1 / tl.sqrt_rn(tl.where(var_R < 0, 0.0, var_R) + eps)


@triton.jit
def normalise(x_RC, in_row, cols_total, eps):
    """(x̂, mean, rstd) of whole rows."""
    mean_R = tl.sum(x_RC, 1) / cols_total
    # Columns past the end hold 0, whose deviation is -mean: they must not enter the variance.
    centred_RC = tl.where(in_row[None, :], x_RC - mean_R[:, None], 0.0)
    left_R, rstd_R = left_and_rstd(
        tl.sum(centred_RC, 1), tl.sum(centred_RC * centred_RC, 1), cols_total, eps
    )
    xhat_RC = centred_RC * rstd_R[:, None] - (left_R * rstd_R)[:, None]
    return xhat_RC, mean_R + left_R, rstd_R


@triton.jit
def affine(xhat_RC, weight_ptr, bias_ptr, cols, in_row, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """x̂ * weight + bias."""
    y_RC = xhat_RC
    if WEIGHT:
        y_RC *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y_RC += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return y_RC


@triton.jit(do_not_specialize=["rows_total", "threshold"])
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dropout_rows_ptr,
    stride_x, stride_residual, stride_y, stride_z, rows_total, cols_total, eps, threshold,
    keep_scale,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
    DROPOUT_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows. WHOLE: a row fits in BLOCK_C columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_col = rows < rows_total
    cols = tl.arange(0, BLOCK_C)
    if WHOLE:
        in_row = cols < cols_total
        inside = in_col[:, None] & in_row[None, :]
        x_RC = _load_input(
            x_ptr, residual_ptr, z_ptr, seed_ptr, dropout_rows_ptr, stride_x, stride_residual,
            stride_z,
            rows, rows_total, cols, inside, threshold, keep_scale, ADD, DROPOUT,
            DROPOUT_ROWS)  # fmt: skip
        xhat_RC, mean_R, rstd_R = normalise(x_RC, in_row, cols_total, eps)
        y_RC = affine(xhat_RC, weight_ptr, bias_ptr, cols, in_row, WEIGHT, BIAS)
        store_tile(y_ptr, stride_y, y_RC, rows, cols, inside)
    else:
        sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in range(0, cols_total, BLOCK_C):
            piece = start + cols
            inside = in_col[:, None] & (piece < cols_total)[None, :]
            sum_RC += _load_input(
                x_ptr, residual_ptr, z_ptr, seed_ptr, dropout_rows_ptr, stride_x, stride_residual,
                stride_z,
                rows, rows_total, piece, inside, threshold, keep_scale, ADD, DROPOUT,
                DROPOUT_ROWS)  # fmt: skip
        mean_R = tl.sum(sum_RC, 1) / cols_total
        source_ptr, stride_source = x_ptr, stride_x
        if ADD:
            tl.debug_barrier()  # z was written by other threads of this program
            source_ptr, stride_source = z_ptr, stride_z
        sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        square_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in range(0, cols_total, BLOCK_C):
            piece = start + cols
            in_row = piece < cols_total
            x_RC = load_tile(
                source_ptr, stride_source, rows, piece, in_col[:, None] & in_row[None, :]
            )
            centred_RC = tl.where(in_row[None, :], x_RC - mean_R[:, None], 0.0)
            sum_RC += centred_RC
            square_RC += centred_RC * centred_RC
        left_R, rstd_R = left_and_rstd(tl.sum(sum_RC, 1), tl.sum(square_RC, 1), cols_total, eps)
        for start in range(0, cols_total, BLOCK_C):
            piece = start + cols
            in_row = piece < cols_total
            inside = in_col[:, None] & in_row[None, :]
            x_RC = load_tile(source_ptr, stride_source, rows, piece, inside)
            xhat_RC = ((x_RC - mean_R[:, None]) - left_R[:, None]) * rstd_R[:, None]
            y_RC = affine(xhat_RC, weight_ptr, bias_ptr, piece, in_row, WEIGHT, BIAS)
            store_tile(y_ptr, stride_y, y_RC, rows, piece, inside)
        mean_R += left_R
    tl.store(mean_ptr + rows, mean_R, mask=in_col)
    tl.store(rstd_ptr + rows, rstd_R, mask=in_col)


@triton.jit
def _load_normalised(dy_ptr, x_ptr, weight_ptr, stride_dy, stride_x, mean_R, rstd_R, rows, cols,
                     in_row, inside,
                     WEIGHT: tl.constexpr):  # fmt: skip
    """(dy, x̂, g = dy * weight) of a tile, all 0 outside."""
    dy_RC = load_tile(dy_ptr, stride_dy, rows, cols, inside)
    x_RC = load_tile(x_ptr, stride_x, rows, cols, inside)
    xhat_RC = tl.where(inside, (x_RC - mean_R[:, None]) * rstd_R[:, None], 0.0)
    g_RC = dy_RC
    if WEIGHT:
        g_RC *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return dy_RC, xhat_RC, g_RC


@triton.jit
def _store_input_grad(
    dx_RC, dz_ptr, dx_ptr, dresidual_ptr, seed_ptr, dropout_rows_ptr,
    stride_dz, stride_dx, stride_dresidual, rows, rows_total, cols, inside, threshold, keep_scale,
    ADD: tl.constexpr, DZ: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr,
):  # fmt: skip
    """dz = dx (+ dz); dresidual = dz; dx = dropout'(dz)."""
    if DZ:
        dx_RC += load_tile(dz_ptr, stride_dz, rows, cols, inside)
    if ADD:
        store_tile(dresidual_ptr, stride_dresidual, dx_RC, rows, cols, inside)
    if DROPOUT:
        keep = hidden_keep_mask(
            seed_ptr, dropout_rows_ptr, rows, rows_total, cols, threshold, DROPOUT_ROWS
        )
        dx_RC = tl.where(keep, dx_RC * keep_scale, 0.0)
    store_tile(dx_ptr, stride_dx, dx_RC, rows, cols, inside)


@triton.jit
def add_to(ptr, cols, value, in_row):
    """ptr[cols] += value, of memory that only this program touches."""
    tl.store(ptr + cols, tl.load(ptr + cols, mask=in_row, other=0.0) + value, mask=in_row)


@triton.jit(do_not_specialize=["rows_total", "partials", "threshold"])
def layer_norm_bwd_kernel(
    dy_ptr, dz_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr,
    dbias_ptr,
    seed_ptr, dropout_rows_ptr,
    stride_dy, stride_dz, stride_x, stride_dx, stride_dresidual, rows_total, cols_total, partials,
    threshold, keep_scale,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, DZ: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROPOUT_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles of rows pid, pid + partials, ...: their dx, and partial sums [partials, cols] of
    dweight and dbias.

    dweight and dbias start as 0 where a row is read in pieces (not WHOLE): then they are summed in
    memory.
    """
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    if WEIGHT:
        dweight_ptr += pid * cols_total
    if BIAS:
        dbias_ptr += pid * cols_total
    if WHOLE:
        in_row = cols < cols_total
        dweight_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        dbias_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for tile in range(pid, tl.cdiv(rows_total, BLOCK_R), partials):
            rows = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
            in_col = rows < rows_total
            inside = in_col[:, None] & in_row[None, :]
            mean_R = tl.load(mean_ptr + rows, mask=in_col, other=0.0)
            rstd_R = tl.load(rstd_ptr + rows, mask=in_col, other=0.0)
            dy_RC, xhat_RC, g_RC = _load_normalised(
                dy_ptr, x_ptr, weight_ptr, stride_dy, stride_x, mean_R, rstd_R, rows, cols, in_row,
                inside, WEIGHT)  # fmt: skip
            if WEIGHT:
                dweight_RC += dy_RC * xhat_RC
            if BIAS:
                dbias_RC += dy_RC
            mean_g_R = tl.sum(g_RC, 1) / cols_total
            mean_gx_R = tl.sum(g_RC * xhat_RC, 1) / cols_total
            dx_RC = (g_RC - mean_g_R[:, None] - xhat_RC * mean_gx_R[:, None]) * rstd_R[:, None]
            _store_input_grad(
                dx_RC, dz_ptr, dx_ptr, dresidual_ptr, seed_ptr, dropout_rows_ptr, stride_dz,
                stride_dx, stride_dresidual,
                rows, rows_total, cols, inside, threshold, keep_scale, ADD, DZ, DROPOUT,
                DROPOUT_ROWS)  # fmt: skip
        if WEIGHT:
            tl.store(dweight_ptr + cols, tl.sum(dweight_RC, 0), mask=in_row)
        if BIAS:
            tl.store(dbias_ptr + cols, tl.sum(dbias_RC, 0), mask=in_row)
    else:
        for tile in range(pid, tl.cdiv(rows_total, BLOCK_R), partials):
            rows = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
            in_col = rows < rows_total
            mean_R = tl.load(mean_ptr + rows, mask=in_col, other=0.0)
            rstd_R = tl.load(rstd_ptr + rows, mask=in_col, other=0.0)
            sum_g_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            sum_gx_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            for start in range(0, cols_total, BLOCK_C):
                piece = start + cols
                in_row = piece < cols_total
                inside = in_col[:, None] & in_row[None, :]
                dy_RC, xhat_RC, g_RC = _load_normalised(
                    dy_ptr, x_ptr, weight_ptr, stride_dy, stride_x, mean_R, rstd_R, rows,
                    piece, in_row, inside, WEIGHT)  # fmt: skip
                sum_g_RC += g_RC
                sum_gx_RC += g_RC * xhat_RC
                if WEIGHT:
                    add_to(dweight_ptr, piece, tl.sum(dy_RC * xhat_RC, 0), in_row)
                if BIAS:
                    add_to(dbias_ptr, piece, tl.sum(dy_RC, 0), in_row)
            mean_g_R = tl.sum(sum_g_RC, 1) / cols_total
            mean_gx_R = tl.sum(sum_gx_RC, 1) / cols_total
            for start in range(0, cols_total, BLOCK_C):
                piece = start + cols
                in_row = piece < cols_total
                inside = in_col[:, None] & in_row[None, :]
                dy_RC, xhat_RC, g_RC = _load_normalised(
                    dy_ptr, x_ptr, weight_ptr, stride_dy, stride_x, mean_R, rstd_R, rows,
                    piece, in_row, inside, WEIGHT)  # fmt: skip
                dx_RC = (g_RC - mean_g_R[:, None] - xhat_RC * mean_gx_R[:, None]) * rstd_R[:, None]
                _store_input_grad(
                    dx_RC, dz_ptr, dx_ptr, dresidual_ptr, seed_ptr, dropout_rows_ptr, stride_dz,
                    stride_dx, stride_dresidual,
                    rows, rows_total, piece, inside, threshold, keep_scale, ADD, DZ, DROPOUT,
                    DROPOUT_ROWS)  # fmt: skip


@triton.jit(do_not_specialize=["partials"])
def sum_partials_kernel(
    partial_ptr, total_ptr, partials, cols_total, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """total[col] = sum over the rows of partial [partials, cols], in a fixed order."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < cols_total
    sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, partials, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R).to(tl.int64)
        sum_RC += load_tile(
            partial_ptr, cols_total, rows, cols, (rows < partials)[:, None] & in_row[None, :]
        )
    tl.store(total_ptr + cols, tl.sum(sum_RC, 0).to(total_ptr.dtype.element_ty), mask=in_row)


def _forward(x, residual, weight, bias, dropout_p, eps, dropout_seed, dropout_rows):
    """(y, z, mean, rstd); z is None without residual."""
    rows, cols = x.shape
    y = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    z = None if residual is None else torch.empty_like(y)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, z, mean, rstd
    tile = tuning.layer_norm("fwd", cols, architecture(x))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    with guard(x):
        layer_norm_fwd_kernel[(triton.cdiv(rows, tile.block_r),)](
            x, residual, weight, bias, y, z, mean, rstd, dropout_seed, dropout_rows,
            x.stride(0), 0 if residual is None else residual.stride(0), cols, cols, rows, cols,
            eps, threshold, keep_scale,
            WEIGHT=weight is not None, BIAS=bias is not None, ADD=residual is not None,
            DROPOUT=dropout_p > 0,
            DROPOUT_ROWS=dropout_rows is not None, BLOCK_R=tile.block_r, BLOCK_C=tile.block_c,
            WHOLE=cols <= tile.block_c, num_warps=tile.warps,
        )  # fmt: skip
    return y, z, mean, rstd


def sum_partials(partial: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[partials, cols] fp32 -> [cols] in the dtype of `like`."""
    partials, cols = partial.shape
    total = torch.empty(cols, dtype=like.dtype, device=like.device)
    tile = tuning.elementwise(cols, architecture(like))
    sum_partials_kernel[(triton.cdiv(cols, tile.block_c),)](
        partial,
        total,
        partials,
        cols,
        BLOCK_R=tile.block_r,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return total


def _backward(dy, dz, x, weight, bias, mean, rstd, add, dropout_p, dropout_seed, dropout_rows):
    """(dx, dresidual, dweight, dbias); dresidual is None unless `add`. x is z where there was a
    residual."""
    rows, cols = x.shape
    dx = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    dresidual = torch.empty_like(dx) if add else None
    if x.numel() == 0:
        dweight, dbias = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
        return dx, dresidual, dweight, dbias
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    if dz is not None and dz.stride(-1) != 1:
        dz = dz.contiguous()
    tile = tuning.layer_norm("bwd", cols, architecture(x))
    whole = cols <= tile.block_c
    partials = min(tuning.LAYER_NORM_PARTIALS, triton.cdiv(rows, tile.block_r))
    allocate = torch.empty if whole else torch.zeros
    dweight, dbias = (
        None if t is None else allocate((partials, cols), dtype=torch.float32, device=x.device)
        for t in (weight, bias)
    )
    threshold, keep_scale = threshold_and_scale(dropout_p)
    with guard(x):
        layer_norm_bwd_kernel[(partials,)](
            dy, dz, x, weight, mean, rstd, dx, dresidual, dweight, dbias, dropout_seed,
            dropout_rows,
            dy.stride(0), 0 if dz is None else dz.stride(0), x.stride(0), cols, cols, rows, cols,
            partials,
            threshold, keep_scale,
            WEIGHT=weight is not None, BIAS=bias is not None, ADD=add, DZ=dz is not None,
            DROPOUT=dropout_p > 0,
            DROPOUT_ROWS=dropout_rows is not None, BLOCK_R=tile.block_r, BLOCK_C=tile.block_c,
            WHOLE=whole, num_warps=tile.warps,
        )  # fmt: skip
        dweight = None if weight is None else sum_partials(dweight, weight)
        dbias = None if bias is None else sum_partials(dbias, bias)
    return dx, dresidual, dweight, dbias


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd) of x [rows, cols] with last stride 1; mean and rstd fp32 [rows]."""
    y, _, mean, rstd = _forward(x, None, weight, bias, 0.0, eps, None, None)
    return y, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias), the last two in the dtypes of weight and bias, or None."""
    dx, _, dweight, dbias = _backward(dy, None, x, weight, bias, mean, rstd, False, 0.0, None, None)
    return dx, dweight, dbias


def dropout_add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_p: float,
    eps: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, z, mean, rstd) with z = residual + dropout(x) in x's dtype and y = LayerNorm(z)."""
    return _forward(x, residual, weight, bias, dropout_p, eps, dropout_seed, dropout_rows)


def dropout_add_layer_norm_bwd(
    dy: torch.Tensor,
    dz: torch.Tensor | None,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dresidual, dweight, dbias); dz is the gradient that reaches z itself (prenorm), or
    None."""
    return _backward(
        dy, dz, z, weight, bias, mean, rstd, True, dropout_p, dropout_seed, dropout_rows
    )
