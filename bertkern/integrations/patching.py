"""`bertkern.patch(model)`: this package's ops in a model that another library made.

Each module that is known gets a subclass of its own class, whose `forward` computes the same by
fewer kernels. Parameters, buffers, hooks, names and the results of `isinstance` stay; no class of
torch or transformers is touched, so other models are as they were. `unpatch` sets the classes back.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from types import ModuleType

from torch import nn

from . import patched_torch

# The key of a module's __dict__ under which its own class is kept. It is copied and pickled along.
_OWN_CLASS = "_bertkern_own_class"

Replacement = Callable[[nn.Module, nn.Module], type | str | None]


@dataclass
class Report:
    """What `patch` did, by the names of `model.named_modules()`; "" is the model itself.

    Attributes:
        swapped: what is computed by this package now -> the modules' names.
        left: a module that was looked at and stays as it was -> why.
    """

    swapped: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for each kind that was swapped, and for each reason of what was left."""
        lines = [f"swapped {what}: {_listed(names)}" for what, names in self.swapped.items()]
        by_reason = sorted(self.left.items(), key=lambda item: item[1])
        for reason, items in groupby(by_reason, key=lambda item: item[1]):
            lines.append(f"left {_listed([name for name, _ in items])}: {reason}")
        return "\n".join(lines) or "nothing in the model is known"


def patch(model: nn.Module) -> Report:
    """Let this package's ops compute what they know in a model, in place.

    Known are attention, LayerNorm, FFN, embeddings and masked-LM loss of BERT-family models of
    transformers, and the nn.LayerNorm, nn.MultiheadAttention and nn.Transformer* of any model.
    Parameters are kept, and results are those of the model but for rounding. In training, dropout's
    masks come from this package's generator, and a masked-LM model that is given labels returns the
    loss and no logits (None). A model of transformers gets its own copy of its config, because the
    name of its attention stands there. Attention weights (output_attentions) cannot be asked for.
    Under autocast the outputs are in its dtype. Unpatch before a model is scripted, traced by
    torch.fx or exported to ONNX: what takes models apart knows torch's modules and ops alone.

    A module whose children were replaced or given hooks, before or after, calls them as it always
    did. To patch a second time does nothing to what is patched, and finds what is new.

    Args:
        model: any module.

    Returns:
        What was swapped, and what was left and why.

    Raises:
        TypeError: if model is not a torch.nn.Module.
    """
    _check_is_module("patch", model)
    rooms: list[Replacement] = [patched_torch.replacement]
    transformers_room = _transformers_room(model)
    if transformers_room is not None:
        rooms.append(transformers_room.replacement)
    report = Report()
    classes: list[tuple[nn.Module, type]] = []
    for name, module in model.named_modules():
        if _OWN_CLASS in module.__dict__:
            report.swapped.setdefault(_part(type(module)), []).append(name)
            continue
        for replacement in rooms:
            answer = replacement(module, model)
            if isinstance(answer, str):
                report.left[name] = answer
            elif answer is not None:
                report.swapped.setdefault(_part(answer), []).append(name)
                classes.append((module, answer))
            if answer is not None:
                break
    for module, patched in classes:
        module.__dict__[_OWN_CLASS] = type(module)
        module.__class__ = patched
    if transformers_room is not None:
        swapped, left = transformers_room.patch_attention(model)
        if swapped:
            report.swapped["attention"] = report.swapped.get("attention", []) + swapped
        report.left |= left
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`; what is not patched stays as it is.

    A model of transformers keeps the copy of its config that `patch` made, with whatever was set
    there since; the name of its attention is what it was.

    Raises:
        TypeError: if model is not a torch.nn.Module.
        RuntimeError: if a module's class was changed after `patch` (a parametrization, FSDP2); then
            nothing is undone.
    """
    _check_is_module("unpatch", model)
    for name, module in model.named_modules():
        own = module.__dict__.get(_OWN_CLASS)
        if own is not None and type(module).__bases__[-1] is not own:
            raise RuntimeError(
                f"bertkern.unpatch: {name or 'the model itself'} became a "
                f"{type(module).__name__} after it was patched; that must be undone before"
            )
    for module in model.modules():
        own = module.__dict__.pop(_OWN_CLASS, None)
        if own is not None:
            module.__class__ = own
    transformers_room = _transformers_room(model)
    if transformers_room is not None:
        transformers_room.unpatch_attention(model)


def _check_is_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"bertkern.{function}: model must be a torch.nn.Module, not {type(model).__name__}"
        )


def _transformers_room(model: nn.Module) -> ModuleType | None:
    """patched_transformers, if the model holds a module of transformers; else it is not
    imported."""
    for kind in {type(module) for module in model.modules()}:
        if any(base.__module__.partition(".")[0] == "transformers" for base in kind.__mro__):
            return importlib.import_module(".patched_transformers", __package__)
    return None


def _part(patched: type) -> str:
    """What a class computes, in the report's words."""
    return str(getattr(patched, "WHAT", patched.__mro__[1].__name__))


def _listed(names: list[str]) -> str:
    """The first name, and how many there are if it is not alone."""
    first = names[0] or "the model itself"
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
