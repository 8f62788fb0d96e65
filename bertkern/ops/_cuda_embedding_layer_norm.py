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
        ids=_addresses(ids, position_ids, type_ids),
        wide_ids=_wide(ids, position_ids, type_ids),
        tables=_addresses(word, position, type),
        strides=_row_strides(word, position, type),
        sizes=_sizes(word, position, type),
        weight=address(weight),
        bias=address(bias),
        y=address(y),
        mean=address(mean),
        rstd=address(rstd),
        rows=rows,
        cols=cols,
        dtype=DTYPES[word.dtype],
        weight_dtype=weight_dtype,
        eps=eps,
        **dropout_options(dropout_p, dropout_seed, dropout_rows),
        **place(word),
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
        dz=address(dz),
        keys=address(sorted_keys),
        order=address(order),
        partial=address(partial),
        gradients=_addresses(*gradients),
        sizes=_sizes(*tables),
        dz_stride=dz.stride(0),
        rows=rows,
        cols=cols,
        padding_row=padding_idx,
        dtype=DTYPES[dz.dtype],
        **place(dz),
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
        ids=_addresses(ids, position_ids, type_ids),
        wide_ids=_wide(ids, position_ids, type_ids),
        sizes=_sizes(*tables),
        keys=address(keys),
        rows=rows,
        **place(dy),
    )
    weight, bias, weight_dtype = parameters(word, weight, bias)
    padded = -(-cols // _VECTOR) * _VECTOR
    dz = torch.empty((rows, padded), dtype=word.dtype, device=dy.device)
    dweight, dbias = (None if p is None else torch.empty_like(p) for p in (weight, bias))
    partial = partial_sums(rows, word, dweight, dbias)
    _C.cuda_embedding_layer_norm_bwd(
        dy=address(dy),
        keys=address(keys),
        tables=_addresses(*tables),
        strides=_row_strides(*tables),
        sizes=_sizes(*tables),
        weight=address(weight),
        mean=address(mean),
        rstd=address(rstd),
        dz=address(dz),
        dweight=address(dweight),
        dbias=address(dbias),
        partial=address(partial),
        dy_stride=dy.stride(0),
        dz_stride=dz.stride(0),
        rows=rows,
        cols=cols,
        dtype=DTYPES[word.dtype],
        weight_dtype=weight_dtype,
        **dropout_options(dropout_p, dropout_seed, dropout_rows),
        **place(dy),
    )
    gradients = _table_gradients(dz, keys, cols, padding_idx, *tables)
    return *gradients, *in_dtype_of((dweight, dbias), given)
