"""embedding_layer_norm of the backend "cuda": hands tensors to the compiled extension as addresses
and strides.

Equation, legend and arguments are those of `bertkern/reference/embedding_layer_norm.py`. An id that
its table does not have makes its token's row NaN, and its gradient, NaN, goes to the nearest row
that exists, as in `kernels/embedding_layer_norm.py`: to refuse it, the host would have to wait.
"""

import torch
from torch import Tensor

from bertkern import _C

from ._cuda import DTYPES, address, dropout_options, in_dtype_of, parameters, partial_sums, place

_VECTOR = 8  # rows of dz begin on multiples of so many elements


def _wide(*ids: Tensor | None) -> list[bool]:
    """Which ids are int64, not int32."""
    return [i is not None and i.dtype == torch.int64 for i in ids]


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [address(tensor) for tensor in tensors]


def _row_strides(*tables: Tensor) -> list[int]:
    return [table.stride(0) for table in tables]


def _sizes(*tables: Tensor) -> list[int]:
    return [table.shape[0] for table in tables]


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
    rows, cols = ids.shape[0], word.shape[1]
    weight, bias, weight_dtype = parameters(word, weight, bias)
    y = torch.empty((rows, cols), dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=word.device) for _ in range(2))
    _C.cuda_embedding_layer_norm_fwd(
        _addresses(ids, position_ids, type_ids),
        _wide(ids, position_ids, type_ids),
        _addresses(word, position, type),
        _row_strides(word, position, type),
        _sizes(word, position, type),
        address(weight),
        address(bias),
        address(y),
        address(mean),
        address(rstd),
        address(dropout_rows),
        address(dropout_seed),
        rows,
        cols,
        DTYPES[word.dtype],
        weight_dtype,
        eps,
        *dropout_options(dropout_p, dropout_seed),
        *place(word),
    )
    return y, mean, rstd


def _table_gradients(
    dz: Tensor, keys: Tensor, cols: int, padding_idx: int, *tables: Tensor
) -> list[Tensor]:
    """Sums of the rows of dz [tokens, cols] and some columns more, whose keys [3, tokens] name the
    same row of a table."""
    rows = dz.shape[0]
    sorted_keys, order = keys.view(-1).sort(stable=True)
    shape = (_C.cuda_embedding_layer_norm_chunks(rows), 2, dz.shape[1])
    partial = torch.empty(shape, dtype=torch.float32, device=dz.device)
    gradients = [torch.empty(table.shape, dtype=dz.dtype, device=dz.device) for table in tables]
    _C.cuda_embedding_layer_norm_tables(
        address(dz),
        address(sorted_keys),
        address(order),
        address(partial),
        _addresses(*gradients),
        _sizes(*tables),
        dz.stride(0),
        rows,
        cols,
        padding_idx,
        DTYPES[dz.dtype],
        *place(dz),
    )
    return gradients


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
) -> tuple[Tensor | None, ...]:
    """(dword, dposition, dtype, dweight, dbias)."""
    given, tables = (weight, bias), (word, position, type)
    rows, cols = dy.shape
    if dy.numel() == 0:
        return tuple(
            None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
            for t in (*tables, *given)
        )
    keys = torch.empty((len(tables), rows), dtype=torch.int32, device=dy.device)
    _C.cuda_embedding_layer_norm_keys(
        _addresses(ids, position_ids, type_ids),
        _wide(ids, position_ids, type_ids),
        _sizes(*tables),
        address(keys),
        rows,
        *place(dy),
    )
    weight, bias, weight_dtype = parameters(word, weight, bias)
    padded = -(-cols // _VECTOR) * _VECTOR
    dz = torch.empty((rows, padded), dtype=word.dtype, device=dy.device)
    dweight, dbias = (None if p is None else torch.empty_like(p) for p in (weight, bias))
    partial = partial_sums(rows, word, dweight, dbias)
    _C.cuda_embedding_layer_norm_bwd(
        address(dy),
        address(keys),
        _addresses(*tables),
        _row_strides(*tables),
        _sizes(*tables),
        address(weight),
        address(mean),
        address(rstd),
        address(dz),
        address(dweight),
        address(dbias),
        address(partial),
        address(dropout_rows),
        address(dropout_seed),
        dy.stride(0),
        dz.stride(0),
        rows,
        cols,
        DTYPES[word.dtype],
        weight_dtype,
        *dropout_options(dropout_p, dropout_seed),
        *place(dy),
    )
    gradients = _table_gradients(dz, keys, cols, padding_idx, *tables)
    return *gradients, *in_dtype_of((dweight, dbias), given)
