"""`torch.func.vmap` of an op: n samples as one call where that is exact, else one call each.

vmap shows a function one sample and computes n. An op that treats every row (or sequence) of its
first dimension alike computes n samples at once when that dimension holds them end to end:
op(cat(x)) = cat(op(x)). Where a parameter, a seed or a gradient of parameters differs from sample
to sample, the samples are computed one after the other and stacked.

Dropout: the mask is a function of the seed and of each sample's own rows. vmap's
randomness="different" draws a seed for each sample, so masks differ; "same" draws one seed, so that
all samples drop the same elements; "error" (vmap's default) refuses unless dropout_seed is given,
which then counts as "same" (or as "different" where it is itself vmapped).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fold:
    """Says what lets a vmapped dimension be folded into the first one.

    Args:
        arguments: names of the tensors whose first dimension is the batch or the rows, as is every
            output's.
        unless: names of arguments that must be None.
        row_numbers: name of the argument that numbers the rows in the dropout mask (None: from 0).
            Every sample keeps its own numbers.
    """

    arguments: tuple[str, ...]
    unless: tuple[str, ...] = ()
    row_numbers: str | None = None


def vmap_rule(
    op: Callable[..., Any], names: Sequence[str], fold: Fold | None
) -> Callable[..., tuple[Any, Any]]:
    """The rule that `torch.library.register_vmap` takes, for an op with arguments of these
    names."""
    if fold is not None and not {*fold.arguments, *fold.unless} <= set(names):
        raise ValueError(f"{fold}: the op's arguments are {', '.join(names)}")

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        vmapped = [dim is not None for dim in in_dims]
        inputs = tuple(
            value if dim is None else value.movedim(dim, 0)
            for value, dim in zip(inputs, in_dims, strict=True)
        )
        if fold is not None and size and _is_exact(fold, names, vmapped, inputs):
            output = _folded(op, fold, names, vmapped, inputs, size)
        else:
            output = _one_by_one(op, vmapped, inputs, size)
        return output, 0 if isinstance(output, Tensor) else (0,) * len(output)

    return rule


def _is_exact(
    fold: Fold, names: Sequence[str], vmapped: Sequence[bool], inputs: Sequence[Any]
) -> bool:
    foldable = {*fold.arguments, fold.row_numbers}
    return all(
        (name in foldable or not is_vmapped) and (name not in fold.unless or value is None)
        for name, is_vmapped, value in zip(names, vmapped, inputs, strict=True)
    )


def _folded(
    op: Callable[..., Any],
    fold: Fold,
    names: Sequence[str],
    vmapped: Sequence[bool],
    inputs: Sequence[Any],
    size: int,
) -> Any:
    """[size, rows, ...] -> [size · rows, ...], one call, and back."""
    first = inputs[names.index(fold.arguments[0])]
    rows = first.shape[1 if vmapped[names.index(fold.arguments[0])] else 0]
    values = []
    for name, is_vmapped, value in zip(names, vmapped, inputs, strict=True):
        if name == fold.row_numbers and value is None:
            value = torch.arange(rows, device=first.device)
        elif value is None or (name not in fold.arguments and name != fold.row_numbers):
            values.append(value)
            continue
        samples = value if is_vmapped else value.expand(size, *value.shape)
        values.append(samples.reshape(size * samples.shape[1], *samples.shape[2:]))
    output = op(*values)
    if isinstance(output, Tensor):
        return output.unflatten(0, (size, output.shape[0] // size))
    return tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in output)


def _one_by_one(
    op: Callable[..., Any], vmapped: Sequence[bool], inputs: Sequence[Any], size: int
) -> Any:
    """One call for each sample; without samples, one call on zeros for the outputs' shapes."""
    outputs = []
    for i in range(max(size, 1)):
        sample = [
            value if not is_vmapped else value[i] if size else value.new_zeros(value.shape[1:])
            for is_vmapped, value in zip(vmapped, inputs, strict=True)
        ]
        outputs.append(op(*sample))
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs)[:size]
    return tuple(torch.stack(output)[:size] for output in zip(*outputs, strict=True))
