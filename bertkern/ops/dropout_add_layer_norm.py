"""The end of a post-LN sublayer: z = residual + dropout(x), y = LayerNorm(z)        (Ba et al.
2016)

Backward: dz_total = LayerNorm'(dy) + dz, dresidual = dz_total, dx = dz_total · mask; the mask is
computed again from the seed, never stored.
"""

import math
from typing import Any

from torch import Tensor

from ..reference import layer_norm as reference
from ..reference.layer_norm import statistics_dtype
from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, define, define_backward, present, usual_call
from ._vmap import Fold
from .layer_norm import check_eps, check_normalization, fake_parameter_gradients

_OP = "dropout_add_layer_norm"


def _fwd(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return implementation(_OP, "_fwd", x, columns=x.shape[1])(x, *rest)


def _fwd_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    statistics = [x.new_empty(x.shape[0], dtype=statistics_dtype(x)) for _ in range(2)]
    return x.new_empty(x.shape), x.new_empty(x.shape), *statistics


def _bwd(
    dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    function = implementation(_OP, "_bwd", z, columns=z.shape[1])
    dz = None if dz is None else arguments.unit_last_stride(dz)
    dy = arguments.unit_last_stride(dy)
    dx, dresidual, dweight, dbias = function(dy, dz, z, weight, bias, *rest)
    # Without dropout dx is dresidual, and an op must not return one tensor twice.
    dx = z.new_empty(0) if dx is dresidual else dx
    return dx, dresidual, present(dweight, z), present(dbias, z)


def _bwd_fake(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, ...]:
    dx = z.new_empty(0 if dropout_seed is None else z.shape)
    return dx, z.new_empty(z.shape), *fake_parameter_gradients(z, weight, bias)


def _bwd_formula(*inputs: Any) -> tuple[Tensor | None, ...]:
    dx, dresidual, dweight, dbias = reference.dropout_add_layer_norm_bwd(*inputs)
    return None if dx is dresidual else dx, dresidual, dweight, dbias


_dropout_add_layer_norm_bwd = define_backward(
    "dropout_add_layer_norm_bwd(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor rstd, float dropout_p, Tensor? dropout_seed, Tensor? dropout_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _bwd_formula,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, ctx.dropout_p, _, seed, rows = inputs
    _, z, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, weight, bias, mean, rstd, seed, rows)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None and dz is None:
        return (None,) * 8
    z, weight, bias, mean, rstd, seed, rows = ctx.saved_tensors
    dy = z.new_zeros(z.shape) if dy is None else dy
    dx, dresidual, dweight, dbias = _dropout_add_layer_norm_bwd(
        dy, dz, z, weight, bias, mean, rstd, ctx.dropout_p, seed, rows
    )
    dx = dresidual if seed is None else dx
    dweight = None if weight is None else dweight
    dbias = None if bias is None else dbias
    return dx, dresidual, dweight, dbias, None, None, None, None


_dropout_add_layer_norm_fwd = define(
    "dropout_add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float "
    "dropout_p, "
    "float eps, Tensor? dropout_seed, Tensor? dropout_rows) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "residual", "weight", "bias"),
    outputs=2,
    fold=Fold(("x", "residual"), row_numbers="dropout_rows"),
)


_usual = usual_call("x[... n], x[... n], float?[n], float?[n], int64?[*], int64?[rows]")


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    prenorm: bool = False,
    dropout_seed: Tensor | None = None,
    *,
    dropout_rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) over the last dimension.

    Args:
        x, residual: [..., columns], one dtype; under autocast both are cast to its dtype.
        weight, bias: [columns] or None, of any float dtype.
        dropout_p: probability to drop each element of x, rounded to a multiple of 1/65536.
        eps: added to the variance.
        prenorm: also return the sum z = residual + dropout(x), rounded to x's dtype.
        dropout_seed: int64, one element, on x's device; None draws one.
        dropout_rows: int64 [tokens], each token's row in the padded layout, so that the mask is the
            same padded or not; None counts the rows of x.

    Returns:
        y [..., columns] in x's dtype; with prenorm, (y, z).

    Raises:
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    if arguments.autocasts(x):
        x, residual = arguments.to_autocast_dtype(x, residual)  # type: ignore[assignment]
    usual = _usual(x, residual, weight, bias, dropout_seed, dropout_rows)
    if usual == UNUSUAL:
        check_normalization(_OP, x, weight, bias)
        arguments.check_tensor(_OP, "residual", residual)
        arguments.check_same(_OP, "x", x, residual=residual)
        arguments.check_shape(_OP, "residual", residual, x.shape)
        weight, bias = arguments.vector(weight), arguments.vector(bias)
        dropout_rows = arguments.check_dropout_rows(_OP, x, math.prod(x.shape[:-1]), dropout_rows)
    check_eps(_OP, eps)
    seed = arguments.dropout_seed_for(_OP, x, dropout_p, dropout_seed, usual)
    y, z = _dropout_add_layer_norm_fwd(
        arguments.as_rows(x),
        arguments.as_rows(residual),
        weight,
        bias,
        float(dropout_p),
        float(eps),
        seed,
        dropout_rows,
        usual=usual,
    )
    y = arguments.from_rows(y, x)
    return (y, arguments.from_rows(z, x)) if prenorm else y
