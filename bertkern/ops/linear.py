"""Linear layer with fused epilogues: y = residual + dropout(act(x wᵀ + b)).

Backward, with g = dropout'(dy) and z = x wᵀ + b:  dz = g · act'(z), dx = dz w, dw = dzᵀ x, db = Σ
dz, dresidual = dy. z is kept for the backward, or computed there again (save_preact=False).
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..reference import linear as reference
from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, USUAL, define, define_backward, present, usual_call
from ._vmap import Fold
from .layer_norm import fake_parameter_gradients

_DROPOUT = "float dropout_p, Tensor? dropout_seed, Tensor? dropout_rows"


def _fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return implementation("linear", "_fwd", x)(x, *rest)


def _fwd_fake(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], w.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_preact and activation else 0)


def _bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    function = implementation("linear", "_bwd", x)
    dx, dw, db = function(arguments.unit_last_stride(dy), x, *rest)
    return dx, dw, present(db, x)


def _bwd_fake(dy: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *fake_parameter_gradients(x, w, b)


_linear_bwd = define_backward(
    f"linear_bwd(Tensor dy, Tensor x, Tensor w, Tensor? b, Tensor z, str activation, {_DROPOUT}) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    reference.linear_bwd,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, b, residual, ctx.activation, ctx.dropout_p, seed, rows, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, w, b, output[1], seed, rows)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, w, b, z, seed, rows = ctx.saved_tensors
    dx, dw, db = _linear_bwd(dy, x, w, b, z, ctx.activation, ctx.dropout_p, seed, rows)
    dresidual = dy if ctx.has_residual else None
    return dx, dw, None if b is None else db, dresidual, None, None, None, None, None


_linear_fwd = define(
    "linear_fwd(Tensor x, Tensor w, Tensor? b, Tensor? residual, str activation, "
    f"{_DROPOUT}, bool save_preact) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "w", "b", "residual"),
    outputs=1,
    fold=Fold(("x", "residual"), row_numbers="dropout_rows"),
)


def check_weight_and_bias(
    op: str, x: Tensor, w_name: str, w: Tensor, b_name: str, b: Tensor | None, columns: int
) -> None:
    """w is [out, columns] of x's dtype; b is None or [out], in x's dtype or float32; all on one
    device."""
    arguments.check_same(op, "x", x, **{w_name: w})
    if w.dim() != 2 or w.shape[1] != columns:
        raise ValueError(
            f"{op}: {w_name} has shape {list(w.shape)}; it must be [out, {columns}] (out by in, as "
            "torch.nn.Linear keeps it)"
        )
    if b is None:
        return
    arguments.check_tensor(op, b_name, b)
    arguments.check_shape(op, b_name, b, w.shape[:1])
    arguments.check_device(op, "x", x, b_name, b)
    if b.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: {b_name} has dtype {b.dtype}; allowed are {x.dtype} and torch.float32"
        )


def needs_gradient(usual: int, *tensors: Tensor | None) -> bool:
    """Whether a backward can follow: always, as far as torch.jit.trace is concerned, which records
    one answer and checks it with gradients off."""
    if usual == USUAL:
        return False
    if usual == UNUSUAL and torch.jit.is_tracing():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


_usual = usual_call("x[... k], x[n k], x|float32?[n], x?[... n], int64?[*], int64?[rows]")


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    dropout_rows: Tensor | None = None,
    save_preact: bool = True,
) -> Tensor:
    """Residual + dropout(act(x wᵀ + b)), in one kernel where the backend has one.

    Args:
        x: [..., K]; w: [N, K], x's dtype; b: [N] or None, x's dtype or float32.
        activation: None, "gelu" (erf), "gelu_tanh" or "relu".
        residual: [..., N] or None.
        dropout_p: probability to drop each output, rounded to a multiple of 1/65536.
        dropout_seed: int64, one element, on x's device; None draws one.
        dropout_rows: int64 [tokens], each token's row in the padded layout; None counts the rows of
            x.
        save_preact: whether the backward finds z = x wᵀ + b [..., N] in memory. False computes it
            there again, one more product, where there is an activation.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    if arguments.autocasts(x):
        x, w, b, residual = arguments.to_autocast_dtype(x, w, b, residual)  # type: ignore[assignment]
    usual = _usual(x, w, b, residual, dropout_seed, dropout_rows)
    if usual == UNUSUAL:
        arguments.check_tensor("linear", "x", x)
        if x.dim() < 1:
            raise ValueError("linear: x has no dimension; it must be [..., K]")
        check_weight_and_bias("linear", x, "w", w, "b", b, x.shape[-1])
        w, b = arguments.unit_last_stride(w), arguments.vector(b)
        if residual is not None:
            arguments.check_same("linear", "x", x, residual=residual)
            arguments.check_shape("linear", "residual", residual, (*x.shape[:-1], w.shape[0]))
        dropout_rows = arguments.check_dropout_rows(
            "linear", x, math.prod(x.shape[:-1]), dropout_rows
        )
    act = arguments.check_activation("linear", activation, optional=True)
    seed = arguments.dropout_seed_for("linear", x, dropout_p, dropout_seed, usual)
    (y,) = _linear_fwd(
        arguments.as_rows(x),
        w,
        b,
        None if residual is None else arguments.as_rows(residual),
        act,
        float(dropout_p),
        seed,
        dropout_rows,
        save_preact and needs_gradient(usual, x, w, b),
        usual=usual,
    )
    return arguments.from_rows(y, x)
