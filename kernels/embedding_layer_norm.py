"""BERT's input y = dropout(LayerNorm(word[id] + position[p] + type[t])), forward and backward.
(Devlin et al. 2018)

Legend: R tokens of a tile, C columns; ids, position_ids, type_ids [tokens]; the tables word,
position, type [their rows, cols]; y, dz [tokens, cols].

The sum z is never stored: the forward gathers, normalises and writes y once, and keeps mean and
rstd; the backward gathers again. z is the fp32 sum, not rounded to the tables' dtype. Statistics,
tiles and partial sums are those of layer_norm.py.

A token whose id, position or type is not a row of its table reads nothing: z is NaN, and so is its
row of y, but for dropped values. (To refuse it, the host would have to wait for the ids.) Its
gradient, NaN, goes to the nearest row that exists.

Backward, with g = dropout'(dy) * weight and x̂ = (z - mean) * rstd:
    dz = rstd * (g - sum g / C - x̂ * sum(g x̂) / C)               stored once, in the tables' dtype
    dweight = sum dropout'(dy) * x̂,  dbias = sum dropout'(dy)    partial sums in a fixed order
    dtype[t] = sum of dz over the tokens of type t                the same (whole rows, <= 2 types)
    dword[i] = sum of dz over the tokens of id i, dposition too   aten's embedding_dense_backward
The last is deterministic (aten/src/ATen/native/cuda/Embedding.cu, EmbeddingBackwardKernel.cu): up
to 3072 tokens one block owns a strip of columns and adds equal ids in the order of the tokens;
beyond, a stable radix sort, fp32 sums of ten tokens each, and those in order. No atomics.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .device import architecture, guard
from .dropout import hidden_keep_mask, threshold_and_scale
from .layer_norm import (
    add_to,
    affine,
    left_and_rstd,
    load_tile,
    normalise,
    store_tile,
    sum_partials,
)

SUMMED_TYPES = 2  # a table of so few types has its gradient summed in the kernel's registers


@triton.jit
def _table_rows(
    ids_ptr, position_ids_ptr, type_ids_ptr, tokens, in_col, word_rows, position_rows, type_rows,
    TYPE_IDS: tl.constexpr,
):  # fmt: skip
    """(row of word, row of position, row of type, whether all three exist) of each token."""
    word_R = tl.load(ids_ptr + tokens, mask=in_col, other=0).to(tl.int64)
    position_R = tl.load(position_ids_ptr + tokens, mask=in_col, other=0).to(tl.int64)
    exists_R = (word_R >= 0) & (word_R < word_rows)
    exists_R &= (position_R >= 0) & (position_R < position_rows)
    type_R = tl.zeros_like(word_R)
    if TYPE_IDS:
        type_R = tl.load(type_ids_ptr + tokens, mask=in_col, other=0).to(tl.int64)
        exists_R &= (type_R >= 0) & (type_R < type_rows)
    return word_R, position_R, type_R, exists_R


@triton.jit
def _load_sum(
    word_ptr, position_ptr, type_ptr, stride_word, stride_position, stride_type,
    word_R, position_R, type_R, exists_R, cols, inside,
):  # fmt: skip
    """z [R, C] in fp32: 0 outside, NaN in the rows of tokens that do not exist."""
    inside &= exists_R[:, None]
    z_RC = load_tile(word_ptr, stride_word, word_R, cols, inside)
    z_RC += load_tile(position_ptr, stride_position, position_R, cols, inside)
    z_RC += load_tile(type_ptr, stride_type, type_R, cols, inside)
    return tl.where(exists_R[:, None], z_RC, float("nan"))


@triton.jit
def _dropped(
    x_RC, seed_ptr, dropout_rows_ptr, tokens, tokens_total, cols, threshold, keep_scale,
    DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr,
):  # fmt: skip
    """dropout(x), which is its own derivative."""
    if DROPOUT:
        keep = hidden_keep_mask(
            seed_ptr, dropout_rows_ptr, tokens, tokens_total, cols, threshold, DROPOUT_ROWS
        )
        x_RC = tl.where(keep, x_RC * keep_scale, 0.0)
    return x_RC


@triton.jit(do_not_specialize=["tokens_total", "threshold"])
def embedding_layer_norm_fwd_kernel(
    ids_ptr, position_ids_ptr, type_ids_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, bias_ptr,
    y_ptr, mean_ptr, rstd_ptr, seed_ptr, dropout_rows_ptr,
    stride_word, stride_position, stride_type, stride_y, tokens_total, cols_total, word_rows,
    position_rows, type_rows, eps, threshold, keep_scale,
    TYPE_IDS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    DROPOUT_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCK_R tokens. WHOLE: a row fits in BLOCK_C columns; else it is gathered for each pass."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_col = tokens < tokens_total
    cols = tl.arange(0, BLOCK_C)
    word_R, position_R, type_R, exists_R = _table_rows(
        ids_ptr, position_ids_ptr, type_ids_ptr, tokens, in_col, word_rows, position_rows,
        type_rows, TYPE_IDS)  # fmt: skip
    if WHOLE:
        in_row = cols < cols_total
        inside = in_col[:, None] & in_row[None, :]
        z_RC = _load_sum(
            word_ptr, position_ptr, type_ptr, stride_word, stride_position, stride_type, word_R,
            position_R, type_R, exists_R, cols, inside)  # fmt: skip
        xhat_RC, mean_R, rstd_R = normalise(z_RC, in_row, cols_total, eps)
        y_RC = affine(xhat_RC, weight_ptr, bias_ptr, cols, in_row, WEIGHT, BIAS)
        y_RC = _dropped(y_RC, seed_ptr, dropout_rows_ptr, tokens, tokens_total, cols, threshold,
                        keep_scale, DROPOUT, DROPOUT_ROWS)  # fmt: skip
        store_tile(y_ptr, stride_y, y_RC, tokens, cols, inside)
    else:
        sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in range(0, cols_total, BLOCK_C):
            piece = start + cols
            inside = in_col[:, None] & (piece < cols_total)[None, :]
            sum_RC += _load_sum(
                word_ptr, position_ptr, type_ptr, stride_word, stride_position, stride_type, word_R,
                position_R, type_R, exists_R, piece, inside)  # fmt: skip
        mean_R = tl.sum(sum_RC, 1) / cols_total
        sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        square_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in range(0, cols_total, BLOCK_C):
            piece = start + cols
            in_row = piece < cols_total
            z_RC = _load_sum(
                word_ptr, position_ptr, type_ptr, stride_word, stride_position, stride_type, word_R,
                position_R, type_R, exists_R, piece, in_col[:, None] & in_row[None, :]
            )  # fmt: skip
            centred_RC = tl.where(in_row[None, :], z_RC - mean_R[:, None], 0.0)
            sum_RC += centred_RC
            square_RC += centred_RC * centred_RC
        left_R, rstd_R = left_and_rstd(tl.sum(sum_RC, 1), tl.sum(square_RC, 1), cols_total, eps)
        for start in range(0, cols_total, BLOCK_C):
            piece = start + cols
            in_row = piece < cols_total
            inside = in_col[:, None] & in_row[None, :]
            z_RC = _load_sum(
                word_ptr, position_ptr, type_ptr, stride_word, stride_position, stride_type, word_R,
                position_R, type_R, exists_R, piece, inside)  # fmt: skip
            xhat_RC = ((z_RC - mean_R[:, None]) - left_R[:, None]) * rstd_R[:, None]
            y_RC = affine(xhat_RC, weight_ptr, bias_ptr, piece, in_row, WEIGHT, BIAS)
            y_RC = _dropped(y_RC, seed_ptr, dropout_rows_ptr, tokens, tokens_total, piece,
                            threshold, keep_scale, DROPOUT, DROPOUT_ROWS)  # fmt: skip
            store_tile(y_ptr, stride_y, y_RC, tokens, piece, inside)
        mean_R += left_R
    tl.store(mean_ptr + tokens, mean_R, mask=in_col)
    tl.store(rstd_ptr + tokens, rstd_R, mask=in_col)


@triton.jit
def _load_normalised(
    dy_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, seed_ptr, dropout_rows_ptr,
    stride_dy, stride_word, stride_position, stride_type, word_R, position_R, type_R, exists_R,
    mean_R, rstd_R, tokens, tokens_total, cols, in_row, inside, threshold, keep_scale,
    WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr,
):  # fmt: skip
    """(dropout'(dy), x̂, g = dropout'(dy) * weight) of a tile, all 0 outside."""
    dy_RC = load_tile(dy_ptr, stride_dy, tokens, cols, inside)
    dy_RC = _dropped(dy_RC, seed_ptr, dropout_rows_ptr, tokens, tokens_total, cols, threshold,
                     keep_scale, DROPOUT, DROPOUT_ROWS)  # fmt: skip
    z_RC = _load_sum(
        word_ptr, position_ptr, type_ptr, stride_word, stride_position, stride_type, word_R,
        position_R, type_R, exists_R, cols, inside)  # fmt: skip
    xhat_RC = tl.where(inside, (z_RC - mean_R[:, None]) * rstd_R[:, None], 0.0)
    return dy_RC, xhat_RC, affine(dy_RC, weight_ptr, weight_ptr, cols, in_row, WEIGHT, False)


@triton.jit
def _of_type(dz_RC, type_R, in_col, TYPE: tl.constexpr):
    """dz of the tokens of one type, 0 elsewhere."""
    return tl.where((in_col & (type_R == TYPE))[:, None], dz_RC, 0.0)


@triton.jit(do_not_specialize=["tokens_total", "partials", "threshold"])
def embedding_layer_norm_bwd_kernel(
    dy_ptr, ids_ptr, position_ids_ptr, type_ids_ptr, word_ptr, position_ptr, type_ptr, weight_ptr,
    mean_ptr, rstd_ptr, dz_ptr, dweight_ptr, dbias_ptr, dtype_ptr, seed_ptr, dropout_rows_ptr,
    stride_dy, stride_word, stride_position, stride_type, stride_dz, tokens_total, cols_total,
    word_rows, position_rows, type_rows, partials, threshold, keep_scale,
    TYPE_IDS: tl.constexpr, TYPES: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, DROPOUT_ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles of tokens pid, pid + partials, ...: their dz, and partial sums [partials, cols] of
    dweight and dbias and [partials, TYPES, cols] of dtype (TYPES: 0, 1 or 2).

    Where a row is read in pieces (not WHOLE), the sums are made in memory that starts as 0, and
    dtype not at all.
    """
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    if WEIGHT:
        dweight_ptr += pid * cols_total
    if BIAS:
        dbias_ptr += pid * cols_total
    if TYPES > 0:
        dtype_ptr += pid * TYPES * cols_total
    dweight_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dtype_0_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dtype_1_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(pid, tl.cdiv(tokens_total, BLOCK_R), partials):
        tokens = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        in_col = tokens < tokens_total
        mean_R = tl.load(mean_ptr + tokens, mask=in_col, other=0.0)
        rstd_R = tl.load(rstd_ptr + tokens, mask=in_col, other=0.0)
        word_R, position_R, type_R, exists_R = _table_rows(
            ids_ptr, position_ids_ptr, type_ids_ptr, tokens, in_col, word_rows, position_rows,
            type_rows, TYPE_IDS)  # fmt: skip
        if WHOLE:
            in_row = cols < cols_total
            inside = in_col[:, None] & in_row[None, :]
            dy_RC, xhat_RC, g_RC = _load_normalised(
                dy_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, seed_ptr, dropout_rows_ptr,
                stride_dy, stride_word, stride_position, stride_type, word_R, position_R, type_R,
                exists_R, mean_R, rstd_R, tokens, tokens_total, cols, in_row, inside, threshold,
                keep_scale, WEIGHT, DROPOUT, DROPOUT_ROWS)  # fmt: skip
            if WEIGHT:
                dweight_RC += dy_RC * xhat_RC
            if BIAS:
                dbias_RC += dy_RC
            mean_g_R = tl.sum(g_RC, 1) / cols_total
            mean_gx_R = tl.sum(g_RC * xhat_RC, 1) / cols_total
            dz_RC = (g_RC - mean_g_R[:, None] - xhat_RC * mean_gx_R[:, None]) * rstd_R[:, None]
            store_tile(dz_ptr, stride_dz, dz_RC, tokens, cols, inside)
            if TYPES > 0:
                dtype_0_RC += _of_type(dz_RC, type_R, in_col, 0)
            if TYPES > 1:
                dtype_1_RC += _of_type(dz_RC, type_R, in_col, 1)
        else:
            mean_g_R = tl.zeros([BLOCK_R], tl.float32)
            mean_gx_R = tl.zeros([BLOCK_R], tl.float32)
            for start in range(0, cols_total, BLOCK_C):
                piece = start + cols
                in_row = piece < cols_total
                inside = in_col[:, None] & in_row[None, :]
                dy_RC, xhat_RC, g_RC = _load_normalised(
                    dy_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, seed_ptr,
                    dropout_rows_ptr, stride_dy, stride_word, stride_position, stride_type, word_R,
                    position_R, type_R, exists_R, mean_R, rstd_R, tokens, tokens_total, piece,
                    in_row, inside, threshold, keep_scale, WEIGHT, DROPOUT,
                    DROPOUT_ROWS)  # fmt: skip
                mean_g_R += tl.sum(g_RC, 1) / cols_total
                mean_gx_R += tl.sum(g_RC * xhat_RC, 1) / cols_total
                if WEIGHT:
                    add_to(dweight_ptr, piece, tl.sum(dy_RC * xhat_RC, 0), in_row)
                if BIAS:
                    add_to(dbias_ptr, piece, tl.sum(dy_RC, 0), in_row)
            for start in range(0, cols_total, BLOCK_C):
                piece = start + cols
                in_row = piece < cols_total
                inside = in_col[:, None] & in_row[None, :]
                dy_RC, xhat_RC, g_RC = _load_normalised(
                    dy_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, seed_ptr,
                    dropout_rows_ptr, stride_dy, stride_word, stride_position, stride_type, word_R,
                    position_R, type_R, exists_R, mean_R, rstd_R, tokens, tokens_total, piece,
                    in_row, inside, threshold, keep_scale, WEIGHT, DROPOUT,
                    DROPOUT_ROWS)  # fmt: skip
                dz_RC = (g_RC - mean_g_R[:, None] - xhat_RC * mean_gx_R[:, None]) * rstd_R[:, None]
                store_tile(dz_ptr, stride_dz, dz_RC, tokens, piece, inside)
    if WHOLE:
        in_row = cols < cols_total
        if WEIGHT:
            tl.store(dweight_ptr + cols, tl.sum(dweight_RC, 0), mask=in_row)
        if BIAS:
            tl.store(dbias_ptr + cols, tl.sum(dbias_RC, 0), mask=in_row)
        if TYPES > 0:
            tl.store(dtype_ptr + cols, tl.sum(dtype_0_RC, 0), mask=in_row)
        if TYPES > 1:
            tl.store(dtype_ptr + cols_total + cols, tl.sum(dtype_1_RC, 0), mask=in_row)


def embedding_layer_norm_fwd(
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    type: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [tokens, cols], mean, rstd); mean and rstd fp32 [tokens]. ids contiguous [tokens], tables
    with last stride 1. Type 0 everywhere without type_ids."""
    (tokens,), cols = ids.shape, word.shape[1]
    y = torch.empty((tokens, cols), dtype=word.dtype, device=word.device)
    mean = torch.empty(tokens, dtype=torch.float32, device=word.device)
    rstd = torch.empty_like(mean)
    if y.numel() == 0:
        return y, mean, rstd
    tile = tuning.layer_norm("fwd", cols, architecture(word))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    with guard(word):
        embedding_layer_norm_fwd_kernel[(triton.cdiv(tokens, tile.block_r),)](
            ids, position_ids, type_ids, word, position, type, weight, bias, y, mean, rstd,
            dropout_seed, dropout_rows,
            word.stride(0), position.stride(0), type.stride(0), cols, tokens, cols, word.shape[0],
            position.shape[0], type.shape[0], eps, threshold, keep_scale,
            TYPE_IDS=type_ids is not None, WEIGHT=weight is not None, BIAS=bias is not None,
            DROPOUT=dropout_p > 0, DROPOUT_ROWS=dropout_rows is not None, BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c, WHOLE=cols <= tile.block_c, num_warps=tile.warps,
        )  # fmt: skip
    return y, mean, rstd


def _table_gradient(
    dz: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, padding_idx: int = -1
) -> torch.Tensor:
    """Sums of the rows of dz that share an id; ids beyond the table count as its nearest row."""
    rows = table.shape[0]
    ids = ids.clamp(0, max(rows - 1, 0))  # beyond the table aten would write beyond its memory
    return torch.ops.aten.embedding_dense_backward(dz, ids, rows, padding_idx, False)


def embedding_layer_norm_bwd(
    dy: torch.Tensor,
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    type: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    padding_idx: int,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dword, dposition, dtype, dweight, dbias); padding_idx is the row of dword that stays 0, or
    -1."""
    (tokens,), cols = ids.shape, word.shape[1]
    parameters = (word, position, type, weight, bias)
    if dy.numel() == 0:
        dword, dposition, dtype, dweight, dbias = (
            None if t is None else torch.zeros_like(t) for t in parameters
        )
        return dword, dposition, dtype, dweight, dbias
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dz = torch.empty((tokens, cols), dtype=word.dtype, device=word.device)
    tile = tuning.layer_norm("bwd", cols, architecture(word))
    whole = cols <= tile.block_c
    partials = min(tuning.LAYER_NORM_PARTIALS, triton.cdiv(tokens, tile.block_r))
    types = 1 if type_ids is None else type.shape[0]
    if types > SUMMED_TYPES or not whole:
        types = 0
    allocate = torch.empty if whole else torch.zeros
    dweight, dbias, dtype = (
        allocate((partials, n * cols), dtype=torch.float32, device=word.device) if n else None
        for n in (weight is not None, bias is not None, types)
    )
    threshold, keep_scale = threshold_and_scale(dropout_p)
    with guard(word):
        embedding_layer_norm_bwd_kernel[(partials,)](
            dy, ids, position_ids, type_ids, word, position, type, weight, mean, rstd, dz, dweight,
            dbias, dtype, dropout_seed, dropout_rows,
            dy.stride(0), word.stride(0), position.stride(0), type.stride(0), cols, tokens, cols,
            word.shape[0], position.shape[0], type.shape[0], partials, threshold, keep_scale,
            TYPE_IDS=type_ids is not None, TYPES=types, WEIGHT=weight is not None,
            BIAS=bias is not None, DROPOUT=dropout_p > 0, DROPOUT_ROWS=dropout_rows is not None,
            BLOCK_R=tile.block_r, BLOCK_C=tile.block_c, WHOLE=whole, num_warps=tile.warps,
        )  # fmt: skip
        dweight = None if weight is None else sum_partials(dweight, weight)
        dbias = None if bias is None else sum_partials(dbias, bias)
        if types:
            dtype = sum_partials(dtype, type).view(types, cols)
        elif type_ids is not None:
            dtype = _table_gradient(dz, type_ids, type)
        else:
            dtype = dz.sum(0, keepdim=True, dtype=torch.float32).to(type.dtype)
        if dtype.shape[0] < type.shape[0]:  # no type_ids: type 0 has it all
            dtype = torch.cat([dtype, dtype.new_zeros(type.shape[0] - 1, cols)])
        dword = _table_gradient(dz, ids, word, padding_idx)
        dposition = _table_gradient(dz, position_ids, position)
    return dword, dposition, dtype, dweight, dbias
