"""LayerNorm: y = (x − mean) · rstd · weight + bias        (Ba et al. 2016)

Backward: dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)) with g = dy · weight, dweight = Σ dy · x̂,
dbias = Σ dy. Statistics are float32 (float64 for float64), whatever the dtype of x.
"""

from typing import Any

from torch import Tensor

from ..reference import layer_norm as reference
from ..reference.layer_norm import statistics_dtype
from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, define, define_backward, present, usual_call
from ._vmap import Fold


def _fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return implementation("layer_norm", "_fwd", x, columns=x.shape[1])(x, weight, bias, eps)


def _fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    statistics = [x.new_empty(x.shape[0], dtype=statistics_dtype(x)) for _ in range(2)]
    return x.new_empty(x.shape), *statistics


def _bwd(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Tensor) -> Any:
    function = implementation("layer_norm", "_bwd", x, columns=x.shape[1])
    dx, dweight, dbias = function(arguments.unit_last_stride(dy), x, weight, bias, *rest)
    return dx, present(dweight, x), present(dbias, x)


def _bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Tensor
) -> Any:
    return x.new_empty(x.shape), *fake_parameter_gradients(x, weight, bias)


def fake_parameter_gradients(x: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    """Empty tensors like the parameters; of shape [0] for those that are None."""
    return [x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters]


_layer_norm_bwd = define_backward(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    reference.layer_norm_bwd,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _layer_norm_bwd(dy, x, weight, bias, mean, rstd)
    return dx, None if weight is None else dweight, None if bias is None else dbias, None


_layer_norm_fwd = define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "weight", "bias"),
    outputs=1,
    fold=Fold(("x",)),
)


_usual = usual_call("x[... n], float?[n], float?[n]")


def check_eps(op: str, eps: float) -> None:
    """ValueError for a negative one, and for NaN."""
    if not eps >= 0:
        raise ValueError(f"{op}: eps={eps}; it must not be negative")


def check_normalization(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Checks that the LayerNorm family shares; weight and bias may have a dtype of their own."""
    arguments.check_tensor(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; it needs at least one dimension")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            arguments.check_tensor(op, name, parameter)
            arguments.check_shape(op, name, parameter, x.shape[-1:])
            arguments.check_device(op, "x", x, name, parameter)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: [..., columns], float16, bfloat16, float32 or float64.
        weight, bias: [columns] or None, of any float dtype.
        eps: added to the variance.

    Returns:
        [..., columns] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    usual = _usual(x, weight, bias)
    if usual == UNUSUAL:
        check_normalization("layer_norm", x, weight, bias)
        weight, bias = arguments.vector(weight), arguments.vector(bias)
    check_eps("layer_norm", eps)
    (y,) = _layer_norm_fwd(arguments.as_rows(x), weight, bias, float(eps), usual=usual)
    return arguments.from_rows(y, x)
