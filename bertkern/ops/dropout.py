"""Dropout by the house's one generator: y = x · keep · scale        (Srivastava et al. 2014)

The mask is a function of (seed, row, column) alone: the same on every backend, padded or not. The
backward is the forward applied to dy. Used after the embedding's LayerNorm.
"""

import math
from typing import Any

from torch import Tensor

from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, define, usual_call
from ._vmap import Fold


def _fwd(x: Tensor, dropout_p: float, dropout_seed: Tensor, dropout_rows: Tensor | None) -> Tensor:
    return implementation("dropout", "", x, columns=x.shape[1])(
        x, dropout_p, dropout_seed, dropout_rows
    )


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dropout_p, seed, rows = inputs
    ctx.save_for_backward(seed, rows)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    seed, rows = ctx.saved_tensors
    return _dropout(arguments.unit_last_stride(dy), ctx.dropout_p, seed, rows), None, None, None


_dropout = define(
    "dropout(Tensor x, float dropout_p, Tensor dropout_seed, Tensor? dropout_rows) -> Tensor",
    _fwd,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x",),
    fold=Fold(("x",), row_numbers="dropout_rows"),
)


_usual = usual_call("x[... n], int64?[*], int64?[rows]")


def dropout(
    x: Tensor,
    dropout_p: float,
    dropout_seed: Tensor | None = None,
    *,
    dropout_rows: Tensor | None = None,
) -> Tensor:
    """Zeroes elements of x with probability dropout_p and scales the others.

    Args:
        x: [..., columns].
        dropout_p: rounded to a multiple of 1/65536; the scale is one over the keep rate really
            used.
        dropout_seed: int64, one element, on x's device; None draws one.
        dropout_rows: int64 [tokens], each token's row in the padded layout; None counts the rows of
            x.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    usual = _usual(x, dropout_seed, dropout_rows)
    if usual == UNUSUAL:
        arguments.check_tensor("dropout", "x", x)
        if x.dim() < 1:
            raise ValueError("dropout: x has no dimension; it needs at least one")
        dropout_rows = arguments.check_dropout_rows(
            "dropout", x, math.prod(x.shape[:-1]), dropout_rows
        )
    seed = arguments.dropout_seed_for("dropout", x, dropout_p, dropout_seed, usual)
    if seed is None:
        return x
    y = _dropout(arguments.as_rows(x), float(dropout_p), seed, dropout_rows, usual=usual)
    return arguments.from_rows(y, x)
