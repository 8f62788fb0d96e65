"""BERT's input: y = dropout(LayerNorm(word[id] + position[p] + type[t]))  (Devlin et al. 2018)

Backward, with g = dropout'(dy) · weight:  dz = rstd · (g − mean(g) − x̂ · mean(g · x̂)), a row of a
table receives the sum of dz over the tokens that read it, dweight = Σ dropout'(dy) · x̂, dbias =
Σ dropout'(dy). The sum z is computed again from the tables; mean and rstd alone are kept.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference import embedding_layer_norm as reference
from ..reference.layer_norm import statistics_dtype
from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, define, define_backward, present, usual_call
from ._vmap import Fold
from .layer_norm import check_eps, check_normalization, fake_parameter_gradients

_OP = "embedding_layer_norm"
_INPUTS = (
    "Tensor ids, Tensor position_ids, Tensor? type_ids, Tensor word, Tensor position, Tensor type, "
    "Tensor? weight, Tensor? bias"
)
_OPTIONS = "float dropout_p, Tensor? dropout_seed, Tensor? dropout_rows"


def _fwd(
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    padding_idx: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    function = implementation(_OP, "_fwd", word, columns=word.shape[1])
    return function(ids, position_ids, type_ids, word, position, type, weight, bias, *options)


def _fwd_fake(
    ids: Tensor, position_ids: Tensor, type_ids: Tensor | None, word: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    tokens = ids.shape[0]
    statistics = [word.new_empty(tokens, dtype=statistics_dtype(word)) for _ in range(2)]
    return word.new_empty(tokens, word.shape[1]), *statistics


def _bwd(
    dy: Tensor,
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    function = implementation(_OP, "_bwd", word, columns=word.shape[1])
    dy = arguments.unit_last_stride(dy)
    *tables, dweight, dbias = function(dy, ids, position_ids, type_ids, word, *rest)
    return *tables, present(dweight, word), present(dbias, word)


def _bwd_fake(
    dy: Tensor,
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return tuple(fake_parameter_gradients(word, word, position, type, weight, bias))


_embedding_layer_norm_bwd = define_backward(
    f"embedding_layer_norm_bwd(Tensor dy, {_INPUTS}, Tensor mean, Tensor rstd, int padding_idx, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    reference.embedding_layer_norm_bwd,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.padding_idx, _, ctx.dropout_p, seed, rows = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:], seed, rows)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    *tensors, seed, rows = ctx.saved_tensors
    *tables, dweight, dbias = _embedding_layer_norm_bwd(
        dy, *tensors, ctx.padding_idx, ctx.dropout_p, seed, rows
    )
    weight, bias = tensors[6:8]
    dweight = None if weight is None else dweight
    dbias = None if bias is None else dbias
    return None, None, None, *tables, dweight, dbias, None, None, None, None, None


_embedding_layer_norm_fwd = define(
    f"embedding_layer_norm_fwd({_INPUTS}, int padding_idx, float eps, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("word", "position", "type", "weight", "bias"),
    outputs=1,
    fold=Fold(("ids", "position_ids", "type_ids"), row_numbers="dropout_rows"),
)


def _check_ids(name: str, ids: object, word: Tensor) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{_OP}: {name} must be a torch.Tensor, not {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{_OP}: {name} has dtype {ids.dtype}; allowed are int64 and int32")
    arguments.check_device(_OP, "word", word, name, ids)
    return ids


def _check_other_ids(name: str, ids: object, shape: torch.Size, word: Tensor) -> Tensor:
    """Contiguous, of the shape of ids, to which they are broadcast."""
    indices = _check_ids(name, ids, word)
    try:
        return (indices if indices.shape == shape else indices.expand(shape)).contiguous()
    except RuntimeError:
        raise ValueError(
            f"{_OP}: {name} has shape {list(indices.shape)}, which does not broadcast to that of "
            f"ids, {list(shape)}"
        ) from None


def _flat(ids: Tensor) -> Tensor:
    """[tokens]."""
    return ids if ids.dim() == 1 else ids.reshape(-1)


def _check_tables(word: Tensor, position: Tensor, table: Tensor) -> None:
    arguments.check_tensor(_OP, "word", word)
    arguments.check_same(_OP, "word", word, position=position, type=table)
    for name, tensor in (("word", word), ("position", position), ("type", table)):
        if tensor.dim() != 2 or tensor.shape[0] == 0:
            raise ValueError(
                f"{_OP}: {name} has shape {list(tensor.shape)}; it must be [rows, columns] with at "
                "least one row"
            )
        if tensor.shape[1] != word.shape[1]:
            raise ValueError(
                f"{_OP}: {name} has {tensor.shape[1]} columns, but word has {word.shape[1]}; they "
                "must be equal"
            )


_usual = usual_call(
    "id[...], id[...], id?[...], x[words+ n+], x[positions+ n], x[types+ n], float?[n], float?[n], "
    "int64?[*], int64?[rows]"
)


def embedding_layer_norm(
    ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    *,
    dropout_rows: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[position_ids] + type[type_ids])).

    Args:
        ids: [...], int64 or int32. position_ids, type_ids: the same types, of shapes that broadcast
            to that of ids; type_ids None is type 0 everywhere.
        word, position, type: [rows, columns] each, of one float dtype.
        weight, bias: [columns] or None, of any float dtype.
        eps: added to the variance.
        dropout_p: probability to drop each output, rounded to a multiple of 1/65536.
        dropout_seed: int64, one element, on the tables' device; None draws one.
        dropout_rows: int64 [tokens], each token's row in the padded layout; None counts the tokens.
        padding_idx: the row of `word` that gets no gradient, as in `torch.nn.Embedding`, or None.

    Returns:
        [..., columns] in the tables' dtype. A token with an id that its table does not have gives a
        row of NaN on a GPU, which to refuse it would have to wait for.

    Raises:
        IndexError: on the CPU, for an id that its table does not have.
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    usual = _usual(
        ids, position_ids, type_ids, word, position, type, weight, bias, dropout_seed, dropout_rows
    )
    if usual == UNUSUAL:
        _check_tables(word, position, type)
        check_normalization(_OP, word, weight, bias)
        word, position = arguments.unit_last_stride(word), arguments.unit_last_stride(position)
        type = arguments.unit_last_stride(type)
        weight, bias = arguments.vector(weight), arguments.vector(bias)
        ids = _check_ids("ids", ids, word)
        position_ids = _check_other_ids("position_ids", position_ids, ids.shape, word)
        if type_ids is not None:
            type_ids = _check_other_ids("type_ids", type_ids, ids.shape, word)
        ids = ids.contiguous()
        dropout_rows = arguments.check_dropout_rows(_OP, word, ids.numel(), dropout_rows)
    check_eps(_OP, eps)
    rows = word.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(
            f"{_OP}: padding_idx={padding_idx}; it must be None or from {-rows} to {rows - 1}"
        )
    seed = arguments.dropout_seed_for(_OP, word, dropout_p, dropout_seed, usual)
    (y,) = _embedding_layer_norm_fwd(
        _flat(ids),
        _flat(position_ids),
        None if type_ids is None else _flat(type_ids),
        word,
        position,
        type,
        weight,
        bias,
        -1 if padding_idx is None else padding_idx % rows,
        float(eps),
        float(dropout_p),
        seed,
        dropout_rows,
        usual=usual,
    )
    return y if ids.dim() == 1 else y.reshape(*ids.shape, word.shape[1])
