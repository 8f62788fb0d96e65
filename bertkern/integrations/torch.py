"""`torch.nn.functional.scaled_dot_product_attention` on these kernels, while a `with` block lasts.

    with bertkern.integrations.torch.sdpa():
        model(x)

Every call of torch's function inside is routed, whoever makes it: a model's own code,
`nn.MultiheadAttention`, `nn.TransformerEncoder`, transformers' "sdpa". Nothing is replaced: a
`torch.overrides.TorchFunctionMode` sees the calls of its thread and of no other, and what is
compiled inside it is compiled with it. The mode costs every torch call of the block some
microseconds of the host's time; where that counts, call `bertkern.scaled_dot_product_attention`.
"""

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..ops.attention import MAX_HEAD_DIM
from ..ops.scaled_dot_product_attention import scaled_dot_product_attention


def sdpa() -> TorchFunctionMode:
    """A context in which `F.scaled_dot_product_attention` is
    `bertkern.scaled_dot_product_attention`: out = dropout(softmax(scale · q kᵀ + mask)) v, with
    torch's arguments, layout [..., S, D] and alignment of causal masks.

    What the op does not take goes to torch as ever: head dims above 256, other types of numbers
    than floating point, nested tensors. Gradients need no block around the backward; a checkpoint
    that computes the forward again does.
    """
    return _Routing()


class _Routing(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            func = _attend
        elif func is F.multi_head_attention_forward:
            func = _multi_head_attention_forward
        return func(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    takes = _takes(query, key, value)
    function = scaled_dot_product_attention if takes else F.scaled_dot_product_attention
    return function(query, key, value, *args, **kwargs)


def _takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the op computes a call; whether its arguments make sense is for the op to say."""
    return not any(
        t.is_nested or not t.is_floating_point() or t.dim() < 2 or t.shape[-1] > MAX_HEAD_DIM
        for t in (query, key, value)
    )


def _with_globals(function: Any, **names: Any) -> Callable[..., Any]:
    """A copy of a Python function that finds other things under some global names."""
    copy = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


# A mode is off while it runs a function of torch that is written in Python, so it would see nothing
# of the attention inside `nn.MultiheadAttention`.
_multi_head_attention_forward = _with_globals(
    F.multi_head_attention_forward,
    has_torch_function=lambda _: False,
    scaled_dot_product_attention=_attend,
)
