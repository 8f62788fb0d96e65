"""The backend "cpu" of embedding_layer_norm: the compiled kernel reads the tables' rows itself; the
backward gathers again, by torch, into the compiled LayerNorm's.

Equation, legend and arguments are those of `bertkern/reference/embedding_layer_norm.py`.
"""

import torch
from torch import Tensor

from bertkern import _C

from ..reference.embedding_layer_norm import check_all_ids, table_gradient, type_gradient
from . import _cpu


def _sum(
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
) -> Tensor:
    """word[ids] + position[position_ids] + type[type_ids], float32 [tokens, cols]."""
    z = word.index_select(0, ids).float()
    z += position.index_select(0, position_ids)
    z += type[0] if type_ids is None else type.index_select(0, type_ids)
    return z


def _table_gradient(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    """The gradient of a table; in half precision by float32 sums, of the rows alone that were
    read."""
    if table.dtype == torch.float32:
        return table_gradient(dz, ids, table, padding_idx)
    read, place = ids.unique(return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(dz, place, read.shape[0], -1, False)
    return table_gradient(sums.to(table.dtype), read, table, padding_idx)


def embedding_layer_norm_fwd(
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    check_all_ids(ids, position_ids, type_ids, word, position, type)
    rows, cols = ids.shape[0], word.shape[1]
    y = torch.empty(rows, cols, dtype=word.dtype)
    mean, rstd = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
    # int32 ids are copied; the variables keep the copies alive during the call
    words, positions = ids.long(), position_ids.long()
    types = None if type_ids is None else type_ids.long()
    weight, bias = _cpu.parameter(weight), _cpu.parameter(bias)
    _C.cpu_embedding_layer_norm_fwd(
        _cpu.address(words),
        _cpu.address(positions),
        _cpu.address(types),
        _cpu.address(word),
        _cpu.address(position),
        _cpu.address(type),
        _cpu.address(weight),
        _cpu.address(bias),
        _cpu.address(y),
        _cpu.address(mean),
        _cpu.address(rstd),
        _cpu.address(dropout_rows),
        word.stride(0),
        position.stride(0),
        type.stride(0),
        rows,
        cols,
        _cpu.DTYPES[word.dtype],
        _cpu.dtype_or(weight, word),
        _cpu.dtype_or(bias, word),
        eps,
        *_cpu.dropout_options(dropout_p, dropout_seed),
        torch.get_num_threads(),
    )
    return y, mean, rstd


def embedding_layer_norm_bwd(
    dy: Tensor,
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dword, dposition, dtype, dweight, dbias)."""
    if dropout_seed is not None:
        dy = _cpu.dropout(dy, dropout_p, dropout_seed, dropout_rows)
    z = _sum(ids, position_ids, type_ids, word, position, type)
    dz, dweight, dbias = _cpu.layer_norm_bwd(dy.float(), z, weight, bias, mean, rstd)
    dword = _table_gradient(dz, ids, word, padding_idx)
    dposition = _table_gradient(dz, position_ids, position, -1)
    return dword, dposition, type_gradient(dz, type_ids, type), dweight, dbias
