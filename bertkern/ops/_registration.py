"""Registers ops with torch: schema, implementation, shapes (fake), autograd, and gradients of
gradients.

Uses `torch.library.Library` with `CompositeExplicitAutograd` implementations: the Python function
sees plain tensors of any device and hands them to the backend that `_backend.implementation` names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "bertkern"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `bertkern::name` from its schema and returns the callable op.

    Args:
        schema: "name(Tensor x, ...) -> (Tensor, ...)".
        implementation: computes it; must neither alias nor mutate its inputs.
        fake: the same signature, returns empty tensors of the right shape, dtype and device.
        setup_context, backward: as `torch.library.register_autograd` takes them.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.bertkern, name).default


def define_backward(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    formula: Callable[..., Any],
) -> Callable[..., Any]:
    """Defines a backward op whose own gradients go through a differentiable formula.

    Args:
        formula: the same signature in plain PyTorch (from `bertkern/reference/`); it may return
            None
            where the op returns an empty tensor.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        with torch.enable_grad():
            # Fresh views: where one input was computed from another, only the direct path counts
            # here.
            inputs = [
                _fresh_view(next(saved)) if is_tensor else constant
                for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
            ]
            outputs = formula(*inputs)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if output is not None and grad is not None and output.requires_grad
        ]
        wanted = [i for i, value in enumerate(inputs) if ctx.needs_input_grad[i]]
        result: list[Tensor | None] = [None] * len(inputs)
        if pairs and wanted:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [inputs[i] for i in wanted],
                [grad for _, grad in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            for i, grad in zip(wanted, found, strict=True):
                result[i] = grad
        return tuple(result)

    return define(schema, implementation, fake, setup_context=setup_context, backward=backward)


def _fresh_view(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An op returns no None: an absent tensor travels as one of shape [0]."""
    return like.new_empty(0) if tensor is None else tensor
