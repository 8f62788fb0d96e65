"""Cross-entropy of a linear layer's logits, without holding the logits.

    z = x wᵀ + b,   loss_t = (1 − ε)(lse_t − z_t,target) + ε (lse_t − mean_v z_tv),
    lse_t = m_t + log s_t,   m_t = max_v z_tv,   s_t = Σ_v exp(z_tv − m_t)

Backward, with p = exp(z − m)/s:  dz_tv = dloss_t (p_tv − (1 − ε)[v = target_t] − ε/V),
dx = dz w,  dw = dzᵀ x,  db = Σ_t dz. Only x, the parameters, m and s are kept: z is recomputed some
thousand classes at a time. (m and s apart, because their lse loses digits where logits are large.)

Legend: T rows (tokens), V classes (vocabulary), K input features, ε label smoothing.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference import linear_cross_entropy as reference
from ..reference.layer_norm import statistics_dtype
from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, define, define_backward, present, usual_call
from ._vmap import Fold
from .layer_norm import fake_parameter_gradients
from .linear import check_weight_and_bias

REDUCTIONS = ("mean", "sum", "none")
_OP = "linear_cross_entropy"
_OPTIONS = "Tensor target, {}int ignore_index, float label_smoothing"


def _fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(_OP, "_fwd", x)(x, *rest)


def _fwd_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, m, s = (x.new_empty(x.shape[0], dtype=statistics_dtype(x)) for _ in range(3))
    return loss, m, s


def _bwd(dloss: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = implementation(_OP, "_bwd", x)(dloss, x, *rest)
    return dx, dw, present(db, x)


def _bwd_fake(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *fake_parameter_gradients(x, weight, bias)


_linear_cross_entropy_bwd = define_backward(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, "
    f"{_OPTIONS.format('Tensor m, Tensor s, ')}) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    reference.linear_cross_entropy_bwd,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, target, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, target, *output[1:])


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 6
    x, weight, bias, target, m, s = ctx.saved_tensors
    dx, dw, db = _linear_cross_entropy_bwd(
        dloss, x, weight, bias, target, m, s, ctx.ignore_index, ctx.label_smoothing
    )
    return dx, dw, None if bias is None else db, None, None, None


_linear_cross_entropy_fwd = define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, "
    f"{_OPTIONS.format('')}) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "weight", "bias"),
    outputs=1,
    fold=Fold(("x", "target")),
)


_usual = usual_call("x[... k], x[n+ k], x|float32?[n], int64[...]")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`F.cross_entropy(F.linear(x, weight, bias), target, ...)` without holding the logits.

    Nothing waits for the device. A row whose target is `ignore_index` has loss 0 and gradients
    exactly 0, whatever stands in x there. A row whose target is not in 0..V-1 has loss NaN, and NaN
    gradients, where torch stops the device: a wrong target must show.

    Args:
        x: [..., K].
        weight: [V, K], x's dtype, V at least 1.
        bias: [V] or None, x's dtype or float32.
        target: int64 [...], the class of each row.
        ignore_index: the target of rows that do not count.
        label_smoothing: ε, the share of the loss that is spread evenly over all classes; 0 to 1.
        reduction: "mean" over the rows that count (NaN where none does), "sum" or "none".

    Returns:
        The loss, [] or [...] for "none", in float32 (float64 for float64 x): a sum over rows
        leaves the range of half precision.

    Raises:
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    if arguments.autocasts(x):
        x, weight, bias = arguments.to_autocast_dtype(x, weight, bias)  # type: ignore[assignment]
    usual = _usual(x, weight, bias, target)
    if usual == UNUSUAL:
        arguments.check_tensor(_OP, "x", x)
        if x.dim() < 1:
            raise ValueError(f"{_OP}: x has no dimension; it must be [..., K]")
        check_weight_and_bias(_OP, x, "weight", weight, "bias", bias, x.shape[-1])
        if weight.shape[0] == 0:
            raise ValueError(f"{_OP}: weight has shape {list(weight.shape)}; there must be a class")
        weight, bias = arguments.unit_last_stride(weight), arguments.vector(bias)
        arguments.check_index_tensor(_OP, "target", target, x, x.shape[:-1], torch.int64)
    if not isinstance(ignore_index, int):
        raise TypeError(f"{_OP}: ignore_index must be an int, not {type(ignore_index).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{_OP}: label_smoothing={label_smoothing}; it must be between 0 and 1")
    if reduction not in REDUCTIONS:
        allowed = ", ".join(repr(name) for name in REDUCTIONS)
        raise ValueError(f"{_OP}: reduction={reduction!r}; allowed are {allowed}")
    (loss,) = _linear_cross_entropy_fwd(
        arguments.as_rows(x),
        weight,
        bias,
        (target if target.dim() == 1 else target.reshape(-1)).contiguous(),
        ignore_index,
        float(label_smoothing),
        usual=usual,
    )
    if reduction == "none":
        return loss if target.dim() == 1 else loss.reshape(target.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()
