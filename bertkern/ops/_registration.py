"""Registers ops with torch: schema, implementation, shapes (fake), autograd, gradients of
gradients, and vmap.

An op is three layers, each the cheapest that torch accepts (`benchmarks/overhead.py` measures
them):

1. `CompositeExplicitAutograd`: the Python function sees plain tensors of any device and hands them
   to the backend that `_backend.implementation` names.
2. `Autograd`: an `autograd.Function` that calls the op again below autograd. This is what
   `torch.library.register_autograd` does in twice the host time, with a function that `torch.func`
   transforms refuse and tangents of forward mode pass by unseen.
3. The callable that `define` returns. Where nobody but the kernel has business with the call
   (`_watched`, `_plain`), it enters a node or the implementation itself, without the dispatcher,
   which puts every argument into a box and takes it out again. That node sees only the inputs and
   outputs that a gradient may pass: each one more costs host time.

Before all of them stands `usual_call`: where an op's tensors are what they usually are, the
compiled extension says so in one step, and neither the op's own checks nor those of the third layer
are made.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _dispatch_isTensorSubclassLike,
    _get_tracing_state,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import _profiler_enabled, forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function, has_torch_function_unary
from torch.utils._python_dispatch import _disable_current_modes

from ._backend import native
from ._vmap import Fold, vmap_rule

# torch names without a promise, all here: the imports above that begin with `_`,
# `forward_ad._current_level`, and `_is_any_autocast_enabled` in _arguments.py. torch.library,
# torch.overrides and torch.autograd use the same.

UNUSUAL, USUAL, USUAL_GRADIENT = 0, 1, 2  # what `usual_call` says, as csrc/usual_call.h does

NAMESPACE = "bertkern"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    differentiable: Sequence[str] = (),
    outputs: int | None = None,
    fold: Fold | None = None,
) -> Callable[..., Any]:
    """Defines `bertkern::name` from its schema and returns its fastest callable.

    Args:
        schema: "name(Tensor x, ...) -> (Tensor, ...)", without defaults, keyword-only arguments and
            lists of tensors.
        implementation: computes it; must neither alias nor mutate its inputs.
        fake: the same signature, returns empty tensors of the right shape, dtype and device.
        setup_context, backward: as `torch.library.register_autograd` takes them; without them, to
            ask for a gradient raises.
        differentiable: the arguments that a gradient may be asked for, which stand next to each
            other in the schema; none named means any.
        outputs: how many of the op's outputs, the first ones, the callable returns, unless its own
            argument `outputs` says otherwise; the others are there for the backward alone. None is
            all of them.
        fold: how vmap folds its dimension into the first one of the arguments; None computes the
            samples one after the other.
    """
    if setup_context is None or backward is None:
        setup_context, backward = _save_nothing, _refuse_gradient
    tensors = _tensor_positions(schema)
    first, last = _span(schema, differentiable)
    op = _register(schema, implementation, fake, setup_context, backward, fold)
    record = _short_node(schema, implementation, setup_context, backward, first, last)

    def call(*inputs: Any, outputs: int | None = outputs, usual: int = UNUSUAL) -> Any:
        if usual == UNUSUAL:
            if _watched() or has_torch_function(inputs) or not _plain(inputs, tensors):
                output = op(*inputs)
                return output if outputs is None else output[:outputs]
            usual = USUAL_GRADIENT if _needs_node(inputs, tensors) else USUAL
        if usual == USUAL_GRADIENT and is_grad_enabled():
            return record(*inputs[first:last], inputs, outputs)
        output = implementation(*inputs)
        return output if outputs is None else output[:outputs]

    return call


def usual_call(pattern: str) -> Callable[..., int]:
    """A function of an op's tensors that says whether they are what the pattern says.

    Its answer goes to the callable of `define` as `usual`, and stands for all checks of these
    tensors: `USUAL` (no gradient is asked for), `USUAL_GRADIENT`, or `UNUSUAL` where something
    differs or cannot be told (no compiled extension, a torch without DLPack's exchange interface,
    a tensor subclass, a transform, a mode, a compiler that traces): then the op checks.

    Args:
        pattern: types and sizes, in the language of `csrc/usual_call.h`.
    """
    match: Callable[..., int] | None = None

    def usual(*tensors: Any) -> int:
        nonlocal match
        if _watched() or has_torch_function_unary(_PROBE) or _dispatch_isTensorSubclassLike(_PROBE):
            return UNUSUAL
        if match is None:
            match = _matcher(pattern)
        return match(*tensors)

    return usual


with _disable_current_modes():  # whatever mode this is imported in
    # Itself as plain as can be: what is asked of it is asked of the modes.
    _PROBE = torch.empty(0, device="cpu")


def _matcher(pattern: str) -> Callable[..., int]:
    extension, _ = native()
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    match = None
    if extension is not None and exchange is not None:
        types = (Tensor, torch.nn.Parameter)
        match = extension.usual_call(pattern, exchange, types, Tensor.is_neg)
    return match or (lambda *tensors: UNUSUAL)


def may_read(tensor: Tensor) -> bool:
    """Whether the host may look at a tensor's values to choose a way: it has some, and nobody
    traces, who would write the choice down as the only one."""
    return not (
        is_dynamo_compiling()
        or _get_tracing_state() is not None
        or _dispatch_isTensorSubclassLike(tensor)
        or tensor.is_meta
    )


def _span(schema: str, names: Sequence[str]) -> tuple[int, int]:
    """(first, last) of arguments that stand next to each other; of all for no name."""
    arguments = [name for _, name in _arguments(schema)]
    first = arguments.index(names[0]) if names else 0
    last = first + len(names) if names else len(arguments)
    if names and arguments[first:last] != list(names):
        raise ValueError(f"{schema}: {', '.join(names)} must stand next to each other")
    return first, last


def _watched() -> bool:
    """Whether something wants to see the op pass through the dispatcher."""
    return (
        is_dynamo_compiling()
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _profiler_enabled()
        or _get_tracing_state() is not None
    )


def _plain(inputs: tuple[Any, ...], tensors: Sequence[int]) -> bool:
    """Whether the tensors are memory and nothing else, and no dispatch mode is on: no subclass with
    a dispatch of its own, no wrapper of a transform (which may have ended), no sign that is only
    noted."""
    for i in tensors:
        tensor = inputs[i]
        if tensor is not None and (_dispatch_isTensorSubclassLike(tensor) or tensor.is_neg()):
            return False
    return True


def _arguments(schema: str) -> list[tuple[str, str]]:
    """(type, name) of each argument."""
    inside = schema[schema.index("(") + 1 : schema.index(") ->")]
    # The dispatcher leaves out arguments that equal their default; autograd does not look in lists.
    if any(mark in inside for mark in ("=", "*", "[")):
        raise ValueError(f"{schema}: no defaults, no keyword-only arguments, no lists")
    return [tuple(argument.split()) for argument in inside.split(",")]  # type: ignore[misc]


def _tensor_positions(schema: str) -> list[int]:
    return [i for i, (kind, _) in enumerate(_arguments(schema)) if kind.startswith("Tensor")]


def _needs_node(inputs: tuple[Any, ...], tensors: Sequence[int]) -> bool:
    """Whether a call must enter the autograd graph."""
    if is_grad_enabled():
        for i in tensors:
            tensor = inputs[i]
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0  # the node refuses a tangent; below, it would be dropped


def _register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    fold: Fold | None,
) -> Callable[..., Any]:
    """Layers 1 and 2: the op."""
    name = schema[: schema.index("(")]
    names = [argument for _, argument in _arguments(schema)]
    tensors = _tensor_positions(schema)
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    op = getattr(torch.ops.bertkern, name).default

    def below_autograd(*inputs: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            if _are_functorch_transforms_active():
                # A node is made with gradients off; the transforms outside this one record theirs.
                with torch.enable_grad():
                    return op(*inputs)
            return op(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = below_autograd(*inputs)
        setup_context(ctx, inputs, output)
        return output

    record_op = _apply(name, forward, backward)

    def autograd(*inputs: Any) -> Any:
        if not _needs_node(inputs, tensors):
            return below_autograd(*inputs)
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return record_op(*inputs)
        return record_op(*inputs)

    _library.impl(name, autograd, "Autograd")
    torch.library.register_vmap(qualified, vmap_rule(op, names, fold), lib=_library)
    return op


def _short_node(
    schema: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    first: int,
    last: int,
) -> Callable[..., Any]:
    """The implementation as a node of few inputs and outputs: inputs[first:last] of the op, which
    alone autograd sees, then all of them in a tuple, and how many outputs it gives."""

    def forward(ctx: Any, *packed: Any) -> Any:
        inputs, outputs = packed[-2:]
        output = implementation(*inputs)
        setup_context(ctx, inputs, output)
        return output if outputs is None else output[:outputs]

    def short_backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (*backward(ctx, *grads)[first:last], None, None)

    return _apply(schema[: schema.index("(")], forward, short_backward)


def _apply(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """A call of `forward` as a node of the autograd graph."""
    # Function.apply looks for active transforms first, which are dealt with here. Its base
    # class is the node alone.
    function = type(
        f"{name}_autograd",
        (_SingleLevelFunction,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    return function.apply  # type: ignore[attr-defined]


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(f"bertkern: {ctx.name()} has no gradient; call it under no_grad")


def define_backward(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    formula: Callable[..., Any],
    *,
    fold: Fold | None = None,
) -> Callable[..., Any]:
    """Defines a backward op whose own gradients go through a differentiable formula.

    Args:
        schema, implementation, fake, fold: as in `define`.
        formula: the same signature in plain PyTorch (from `bertkern/reference/`); it may return
            None where the op returns an empty tensor.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*[inputs[i] for i in ctx.tensors])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.constants)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[i] = tensor
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        given = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        result: list[Tensor | None] = [None] * len(inputs)
        if not given:
            return tuple(result)

        def outputs_of(*values: Tensor) -> list[Tensor]:
            changed = list(inputs)
            for i, value in zip(wanted, values, strict=True):
                changed[i] = value
            outputs = formula(*changed)
            return [torch.zeros_like(g) if outputs[i] is None else outputs[i] for i, g in given]

        # torch.func, not torch.autograd.grad: where one input was computed from another only the
        # direct path counts, and inside a transform's own backward nothing else is allowed.
        pullback = torch.func.vjp(outputs_of, *[inputs[i] for i in wanted])[1]
        for i, grad in zip(wanted, pullback([grad for _, grad in given]), strict=True):
            result[i] = grad
        return tuple(result)

    return define(
        schema, implementation, fake, setup_context=setup_context, backward=backward, fold=fold
    )


def present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An op returns no None: an absent tensor travels as one of shape [0]."""
    return like.new_empty(0) if tensor is None else tensor
