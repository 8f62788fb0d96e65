"""BERT's input: y = dropout(LayerNorm(word[id] + position[p] + type[t]))  (Devlin et al. 2018)

ids, position_ids, type_ids [tokens], None: type 0 everywhere; word [V, cols], position [P, cols],
type [N, cols]; y [tokens, cols]. The sum z is in the statistics' dtype, not rounded to the tables'.

Backward: dz = LayerNorm'(dropout'(dy)), and a row of a table receives the sum of dz over the tokens
that read it; the word row padding_idx receives nothing, as in torch.nn.Embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import dropout
from .layer_norm import layer_norm_bwd, layer_norm_fwd, statistics_dtype


def check_ids(name: str, ids: Tensor | None, rows: int) -> None:
    """IndexError for an id that is not a row of its table, on the host, where asking is free."""
    if ids is None or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(
            f"embedding_layer_norm: {name} holds {low if low < 0 else high}, out of range; allowed "
            f"are 0 to {rows - 1}"
        )


def check_all_ids(
    ids: Tensor, position_ids: Tensor, type_ids: Tensor | None, *tables: Tensor
) -> None:
    """check_ids of the three."""
    names = ("ids", "position_ids", "type_ids")
    for name, indices, table in zip(names, (ids, position_ids, type_ids), tables, strict=True):
        check_ids(name, indices, table.shape[0])


def table_gradient(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    """Sums of the rows of dz [tokens, cols] that share an id, in dz's dtype, then in the table's.

    One addition after the other, in the order of the tokens, on the CPU; see
    `kernels/embedding_layer_norm.py` for the order on a GPU.
    """
    rows = table.shape[0]
    summed = torch.ops.aten.embedding_dense_backward(dz, ids, rows, padding_idx, False)
    return summed.to(table.dtype)


def type_gradient(dz: Tensor, type_ids: Tensor | None, type: Tensor) -> Tensor:
    """The gradient of the table `type`; without type_ids type 0 has it all."""
    if type_ids is not None:
        return table_gradient(dz, type_ids, type, -1)
    others = dz.new_zeros(type.shape[0] - 1, dz.shape[1])
    return torch.cat([dz.sum(0, keepdim=True), others]).to(type.dtype)


def _sum(
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    padding_idx: int,
) -> Tensor:
    """z; padding_idx (-1: none) only stops the gradient."""
    dtype = statistics_dtype(word)
    z = F.embedding(ids, word, None if padding_idx < 0 else padding_idx).to(dtype)
    z = z + F.embedding(position_ids, position).to(dtype)
    return z + (type[:1] if type_ids is None else F.embedding(type_ids, type)).to(dtype)


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
    z = _sum(ids, position_ids, type_ids, word, position, type, -1)
    y, mean, rstd = layer_norm_fwd(z, weight, bias, eps)
    if dropout_seed is not None:
        y = dropout(y, dropout_p, dropout_seed, dropout_rows)
    return y.to(word.dtype), mean, rstd


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
    """(dword, dposition, dtype, dweight, dbias). z is recomputed from the tables, so that this can
    be differentiated again."""
    z = _sum(ids, position_ids, type_ids, word, position, type, padding_idx)
    dy = dy.to(z.dtype)
    if dropout_seed is not None:
        dy = dropout(dy, dropout_p, dropout_seed, dropout_rows)
    dz, dweight, dbias = layer_norm_bwd(dy, z, weight, bias, mean, rstd)
    dword = table_gradient(dz, ids, word, padding_idx)
    dposition = table_gradient(dz, position_ids, position, -1)
    return dword, dposition, type_gradient(dz, type_ids, type), dweight, dbias
