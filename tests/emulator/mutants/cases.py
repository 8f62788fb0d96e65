"""The calls that each mutant is run on: small ones, between them of every option, with NaN in
everything that must not be read.

    x = scale · q kᵀ,  s = softcap · tanh(x / softcap) + bias,  out = (softmax(s) · mask) v

A case holds an op's call, the same in plain torch, and the results that are expected. Sizes are
chosen for the tiles of overlay/cuda/attention_table.h and common/norm_params.h: one and several,
whole and cut. Legend: B batch, S sequence, T tokens, H heads, Hk key heads, D head dim.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bertkern.reference.tolerance import assert_close, cancelling

Tensors = dict[str, torch.Tensor]
HALF = torch.float16


@dataclass
class Case:
    """One call, forward and backward.

    Attributes:
        name: for reports.
        leaves: differentiable inputs, as the op is given them.
        call: leaves -> outputs, by the op.
        plain: leaves -> outputs in plain torch, in the leaves' dtype; looks at no poison.
        cotangents: the gradient of each output.
        unread: name of a cotangent or leaf -> where it is poison that `plain` must not see, either.
        dtype: plain torch in this dtype is the yardstick.
        matrices: name (of an output or a leaf) -> its values with rows second to last.
        cancels: names of leaves whose gradient is a sum of terms that cancel.
    """

    name: str
    leaves: Tensors
    call: Callable[[Tensors], Tensors]
    plain: Callable[[Tensors], Tensors]
    cotangents: Tensors
    dtype: torch.dtype
    unread: Tensors = field(default_factory=dict)
    matrices: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    cancels: tuple[str, ...] = ()

    def _run(self, call: Callable[[Tensors], Tensors], leaves: Tensors, out: Tensors) -> Tensors:
        leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        outputs = call(leaves)
        grads = torch.autograd.grad(
            [outputs[name] for name in out],
            list(leaves.values()),
            [c.to(outputs[name].dtype) for name, c in out.items()],
            allow_unused=True,
            materialize_grads=True,
        )
        results = {name: t.detach() for name, t in outputs.items()}
        return results | {f"d {n}": g for n, g in zip(leaves, grads, strict=True)}

    def _run_plain(self, dtype: torch.dtype) -> Tensors:
        def clean(name: str, t: torch.Tensor) -> torch.Tensor:
            return t.masked_fill(self.unread[name], 0) if name in self.unread else t

        leaves = {name: clean(name, t).to(dtype) for name, t in self.leaves.items()}
        return self._run(self.plain, leaves, {n: clean(n, c) for n, c in self.cotangents.items()})

    @functools.cached_property
    def expected(self) -> tuple[Tensors, Tensors, float]:
        """In fp64, in the tested dtype, and the rounding of a sum of terms that cancel."""
        exact, same = self._run_plain(torch.float64), self._run_plain(self.dtype)
        terms = [c.double() * exact[n].nan_to_num(0, 0, 0) for n, c in self.cotangents.items()]
        return exact, same, sum(cancelling(t.nan_to_num(0), self.dtype) for t in terms)

    def prepare(self) -> None:
        """Computes what is expected."""
        assert self.expected is not None

    def check(self) -> None:
        """Makes the call and holds all its results to the tolerance rule."""
        exact, same, noise = self.expected
        got = self._run(self.call, self.leaves, self.cotangents)
        for name, out in got.items():
            want, like = exact[name], same[name]
            if name == "lse":  # nothing to attend to: -Inf, and nothing that could be subtracted
                empty = want == -math.inf
                assert torch.equal(out == -math.inf, empty), "lse: -Inf in other rows"
                out, want, like = (t.masked_fill(empty, 0.0) for t in (out, want, like))
            leaf = name.removeprefix("d ")
            view = self.matrices.get(leaf, lambda t: t)
            views = (view(t) for t in (out, want, like))
            allowed = noise if leaf in self.cancels and leaf != name else 0.0
            assert_close(*views, grad=leaf != name, name=name, noise=allowed)


class Dice:
    """Random values in memory whose other parts are NaN."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def rows(
        self, *shape: int, dtype: torch.dtype = HALF, scale: float = 1.0, chunk: int = 8
    ) -> torch.Tensor:
        """Rows of `chunk` elements more, between others that are NaN, too. The first dimension but
        the last has two entries more in front and behind."""
        memory = torch.full((shape[0] + 4, *shape[1:-1], shape[-1] + chunk), math.nan, dtype=dtype)
        view = memory[2:-2, ..., : shape[-1]]
        view.copy_(self.normal(*shape) * scale)
        return view
