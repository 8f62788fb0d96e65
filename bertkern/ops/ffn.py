"""Feed-forward network: y = dropout(act(x w1ᵀ + b1) w2ᵀ + b2)        (Vaswani et al. 2017, section
3.3)

Backward, with g = dropout'(dy), z = x w1ᵀ + b1 and h = act(z):  dw2 = gᵀ h, db2 = Σ g, dz = (g w2)
· act'(z), dw1 = dzᵀ x, db1 = Σ dz, dx = dz w1. z is kept for the backward, or computed there again
(save_preact=False), and h is computed from it again.
"""

import math
from typing import Any

from torch import Tensor

from ..reference import ffn as reference
from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, define, define_backward, present, usual_call
from ._vmap import Fold
from .layer_norm import fake_parameter_gradients
from .linear import check_weight_and_bias, needs_gradient

_PARAMETERS = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2"
_OPTIONS = "str activation, float dropout_p, Tensor? dropout_seed, Tensor? dropout_rows"


def _fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return implementation("ffn", "_fwd", x)(x, *rest)


def _fwd_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    save_preact = rest[-1]
    z_shape = (x.shape[0], w1.shape[0]) if save_preact else (0,)
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty(z_shape)


def _bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    function = implementation("ffn", "_bwd", x)
    dx, dw1, db1, dw2, db2 = function(arguments.unit_last_stride(dy), x, *rest)
    return dx, dw1, present(db1, x), dw2, present(db2, x)


def _bwd_fake(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *fake_parameter_gradients(x, w1, b1, w2, b2)


_ffn_bwd = define_backward(
    f"ffn_bwd(Tensor dy, Tensor x, {_PARAMETERS}, Tensor z, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    reference.ffn_bwd,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, ctx.activation, ctx.dropout_p, seed, rows, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, b1, w2, b2, output[1], seed, rows)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, w1, b1, w2, b2, z, seed, rows = ctx.saved_tensors
    dx, dw1, db1, dw2, db2 = _ffn_bwd(
        dy, x, w1, b1, w2, b2, z, ctx.activation, ctx.dropout_p, seed, rows
    )
    db1 = None if b1 is None else db1
    db2 = None if b2 is None else db2
    return dx, dw1, db1, dw2, db2, None, None, None, None, None


_ffn_fwd = define(
    f"ffn_fwd(Tensor x, {_PARAMETERS}, {_OPTIONS}, bool save_preact) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "w1", "b1", "w2", "b2"),
    outputs=1,
    fold=Fold(("x",), row_numbers="dropout_rows"),
)


_usual = usual_call(
    "x[... k], x[f k], x|float32?[f], x[n f], x|float32?[n], int64?[*], int64?[rows]"
)


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    *,
    dropout_rows: Tensor | None = None,
    save_preact: bool = True,
) -> Tensor:
    """Dropout(act(x w1ᵀ + b1) w2ᵀ + b2).

    Args:
        x: [..., K]; w1: [F, K]; w2: [N, F]; one dtype. b1: [F] or None; b2: [N] or None; x's dtype
            or float32.
        activation: "gelu" (erf), "gelu_tanh" or "relu".
        dropout_p: probability to drop each output, rounded to a multiple of 1/65536.
        dropout_seed: int64, one element, on x's device; None draws one.
        dropout_rows: int64 [tokens], each token's row in the padded layout; None counts the rows of
            x.
        save_preact: whether the backward finds z = x w1ᵀ + b1 [..., F] in memory. False computes it
            there again, one more product, and keeps one activation less.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    if arguments.autocasts(x):
        x, w1, b1, w2, b2 = arguments.to_autocast_dtype(x, w1, b1, w2, b2)  # type: ignore[assignment]
    usual = _usual(x, w1, b1, w2, b2, dropout_seed, dropout_rows)
    if usual == UNUSUAL:
        arguments.check_tensor("ffn", "x", x)
        if x.dim() < 1:
            raise ValueError("ffn: x has no dimension; it must be [..., K]")
        check_weight_and_bias("ffn", x, "w1", w1, "b1", b1, x.shape[-1])
        check_weight_and_bias("ffn", x, "w2", w2, "b2", b2, w1.shape[0])
        w1, b1 = arguments.unit_last_stride(w1), arguments.vector(b1)
        w2, b2 = arguments.unit_last_stride(w2), arguments.vector(b2)
        dropout_rows = arguments.check_dropout_rows("ffn", x, math.prod(x.shape[:-1]), dropout_rows)
    act = arguments.check_activation("ffn", activation, optional=False)
    seed = arguments.dropout_seed_for("ffn", x, dropout_p, dropout_seed, usual)
    (y,) = _ffn_fwd(
        arguments.as_rows(x),
        w1,
        b1,
        w2,
        b2,
        act,
        float(dropout_p),
        seed,
        dropout_rows,
        save_preact and needs_gradient(usual, x, w1, b1, w2, b2),
        usual=usual,
    )
    return arguments.from_rows(y, x)
