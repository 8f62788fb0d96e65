"""The backend "cpu" of embedding_layer_norm: torch's gathers and the compiled LayerNorm.

The last of the two additions stands in the pass that normalises; the backward gathers again.
Equation, legend and arguments are those of `bertkern/reference/embedding_layer_norm.py`; in half
precision z is rounded to the tables' dtype.
"""

import torch
from torch import Tensor

from ..reference.embedding_layer_norm import check_all_ids, table_gradient, type_gradient
from . import _cpu


def _addends(
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
) -> tuple[Tensor, Tensor]:
    """word[ids] and position[position_ids] + type[type_ids], fresh [tokens, cols]."""
    others = position.index_select(0, position_ids)
    others += type[0] if type_ids is None else type.index_select(0, type_ids)
    return word.index_select(0, ids), others


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
    addends = _addends(ids, position_ids, type_ids, word, position, type)
    y, _, mean, rstd = _cpu.dropout_add_layer_norm_fwd(*addends, weight, bias, 0.0, eps, None, None)
    if dropout_seed is not None:
        y = _cpu.dropout(y, dropout_p, dropout_seed, dropout_rows)
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
    z, others = _addends(ids, position_ids, type_ids, word, position, type)
    z += others
    dz, dweight, dbias = _cpu.layer_norm_bwd(dy, z, weight, bias, mean, rstd)
    dz = dz.float()
    dword = _table_gradient(dz, ids, word, padding_idx)
    dposition = _table_gradient(dz, position_ids, position, -1)
    return dword, dposition, type_gradient(dz, type_ids, type), dweight, dbias
