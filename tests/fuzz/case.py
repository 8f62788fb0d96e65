"""One fuzz case: an op's call, the same in plain torch, and what must hold between them.

Outputs and every gradient are held to bertkern/reference/tolerance.py's rule. Where a few values
decide (one row of three columns), plain torch's own error is a matter of luck: a case that fails
the rule is computed again with other values, the columns of all attempts are laid side by side, and
the rule decides on these wider matrices. It is the same rule; an error of the kernel is in every
attempt.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import bertkern
from bertkern.reference.tolerance import assert_close, cancelling

from .draw import Draw

ATTEMPTS = (8, 32)
BACKEND = os.environ.get("BERTKERN_FUZZ_BACKEND", "triton")

Tensors = dict[str, torch.Tensor]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., columns] -> one matrix [rows, columns]; a vector is one row, a number one element."""
    if x.dim() == 0:
        return x.reshape(1, 1)
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@dataclass
class Case:
    """What a generator hands over.

    Attributes:
        leaves: the differentiable inputs, in the layouts that the op is given.
        wanted: names of the leaves that require a gradient; the others are frozen.
        call: leaves -> outputs, by the op.
        plain: leaves -> outputs in plain torch, in the leaves' dtype; must not look at poison.
        cotangents: gradient of each output that has one.
        dtype: the tested one; plain torch in this dtype is the yardstick.
        text: the choices, for the message of a failure.
        matrices: name (of an output or a leaf) -> how its values are seen as matrices of rows.
        cancels: name of a leaf whose gradient is a sum of terms that cancel -> how large they are,
            measured by dout * out and dlse.
        properties: further checks, each named; they get the results of the call.
    """

    leaves: Tensors
    wanted: set[str]
    call: Callable[[Tensors], Tensors]
    plain: Callable[[Tensors], Tensors]
    cotangents: Tensors
    dtype: torch.dtype
    text: str
    matrices: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)
    cancels: dict[str, float] = field(default_factory=dict)
    properties: dict[str, Callable[[Tensors], None]] = field(default_factory=dict)

    def run(
        self,
        leaves: Tensors | None = None,
        call: Callable[[Tensors], Tensors] | None = None,
        cotangents: Tensors | None = None,
    ) -> Tensors:
        """Outputs, and "d name" for each wanted leaf; with other inputs, another call, other
        gradients."""
        leaves = {name: t.detach() for name, t in (leaves or self.leaves).items()}
        for name in self.wanted & leaves.keys():
            leaves[name].requires_grad_()
        outputs = (call or self.call)(leaves)
        cotangents = self.cotangents if cotangents is None else cotangents
        results = {name: t.detach() for name, t in outputs.items()}
        names = sorted(self.wanted & leaves.keys())
        pairs = [(outputs[name], c) for name, c in cotangents.items() if name in outputs]
        pairs = [(o, c.to(o.dtype)) for o, c in pairs if o.requires_grad]
        results |= {f"d {name}": torch.zeros_like(leaves[name]) for name in names}
        if names and pairs:
            grads = torch.autograd.grad(
                [o for o, _ in pairs],
                [leaves[name] for name in names],
                [c for _, c in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            results |= {f"d {name}": grad for name, grad in zip(names, grads, strict=True)}
        return results

    def run_op(self, **changed: object) -> Tensors:
        with bertkern.backend(BACKEND):
            return self.run(**changed)

    def run_plain(self, dtype: torch.dtype) -> Tensors:
        """In plain torch, every leaf in `dtype`."""
        leaves = {name: t.detach().cpu().to(dtype) for name, t in self.leaves.items()}
        return self.run(leaves, self.plain, {name: c.cpu() for name, c in self.cotangents.items()})


@dataclass
class Triple:
    """The same matrix by the op, in fp64, and by plain torch in the op's dtype."""

    out: torch.Tensor
    exact: torch.Tensor
    same: torch.Tensor
    noise: float

    def hold(self, name: str) -> None:
        grad = name.startswith("d ")
        assert_close(self.out, self.exact, self.same, grad=grad, name=name, noise=self.noise)


def _rounding_of_terms(case: Case, exact: Tensors) -> float:
    """Of a sum of all dout * out and dlse."""
    terms = [c.cpu() * exact[name] for name, c in case.cotangents.items() if name == "out"]
    terms += [c.cpu() for name, c in case.cotangents.items() if name == "lse"]
    return sum(cancelling(t.nan_to_num(0.0), case.dtype) for t in terms)


def _triples(case: Case, got: Tensors) -> dict[str, Triple]:
    """name -> the matrices of the results, on the CPU."""
    exact, same = case.run_plain(torch.float64), case.run_plain(case.dtype)
    terms = _rounding_of_terms(case, exact) if case.cancels else 0.0
    triples = {}
    for name in got:
        view = case.matrices.get(name.removeprefix("d "), lambda t: [rows_of(t)])
        out, want, like = (r[name].cpu() for r in (got, exact, same))
        assert out.shape == want.shape, f"{name}: shape {list(out.shape)}, not {list(want.shape)}"
        if name == "lse":  # nothing to attend to: -inf, and nothing that could be subtracted
            empty = want == -math.inf
            assert torch.equal(out == -math.inf, empty), f"{name}: -inf in other rows"
            assert out.dtype == torch.float32
            out, want, like = (t.masked_fill(empty, 0.0) for t in (out, want, like))
        noise = case.cancels.get(name.removeprefix("d "), 0.0) * terms
        for i, matrices in enumerate(zip(*map(view, (out, want, like)), strict=True)):
            triples[f"{name}[{i}]"] = Triple(*matrices, noise)
    return triples


def _hold(triples: dict[str, Triple]) -> str | None:
    """What breaks the rule, or None."""
    for name, triple in triples.items():
        try:
            triple.hold(name)
        except AssertionError as error:
            return str(error)
    return None


def _side_by_side(many: list[dict[str, Triple]]) -> dict[str, Triple]:
    def joined(triples: list[Triple]) -> Triple:
        matrices = (
            torch.cat([getattr(t, part) for t in triples], -1) for part in ("out", "exact", "same")
        )
        return Triple(*matrices, max(t.noise for t in triples))

    return {name: joined([one[name] for one in many]) for name in many[0]}


def check(make: Callable[[int], Case], rerun: str) -> None:
    """Runs one case; make(attempt) is the case with the values of that attempt.

    Raises:
        AssertionError: with the case's choices and the command that runs it alone.
    """
    case = make(0)
    message = f"\n{case.text}\nrerun: {rerun}\n"
    try:
        got = case.run_op()
    except NotImplementedError as error:
        if BACKEND == "triton":
            raise AssertionError(f"{message}{error}") from error
        pytest.skip(f"backend {BACKEND}: {error}")
    try:
        for name, leaf in case.leaves.items():
            if name in case.wanted:
                assert got[f"d {name}"].dtype == leaf.dtype, f"d {name}: {got[f'd {name}'].dtype}"
        triples = _triples(case, got)
        many, broken = [triples], _hold(triples)
        for attempts in ATTEMPTS:
            if broken is None:
                break
            others = [make(attempt) for attempt in range(len(many), attempts)]
            many += [_triples(other, other.run_op()) for other in others]
            broken = _hold(_side_by_side(many))
        assert broken is None, broken
        for name, holds in case.properties.items():
            try:
                holds(got)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    except AssertionError as error:
        raise AssertionError(f"{message}{error}") from error


def same_bits(one: Tensors, two: Tensors, *names: str) -> None:
    """The named results are equal bit for bit, NaN to NaN."""
    for name in names or two:
        a, b = one[name].contiguous(), two[name].contiguous()
        assert a.shape == b.shape, f"{name}: shapes {list(a.shape)} and {list(b.shape)}"
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        different = (a.view(kind) != b.view(kind)) & (a != b) & ~(a.isnan() & b.isnan())
        assert not different.any(), f"{name}: {int(different.sum())} of {a.numel()} values differ"


def repeats(draw: Draw, case: Case) -> None:
    """Adds the properties that every op has: the same bits again, and of an expanded gradient.

    An expanded gradient (strides 0, as from a sum) is compared with its contiguous copy. It is not
    held to the rule: equal values are summed by plain torch without rounding, or with one drift.
    """
    if draw.chance(0.25):
        case.properties["the same bits again"] = lambda got: same_bits(got, case.run_op())
    if draw.chance(0.25):
        expanded = {}
        for name, c in case.cotangents.items():
            one = tuple(slice(0, 1) if draw.chance(0.6) else slice(None) for _ in range(c.dim()))
            expanded[name] = c[one].expand(c.shape)

        def as_its_copy(got: Tensors) -> None:
            copies = {name: c.contiguous() for name, c in expanded.items()}
            same_bits(case.run_op(cotangents=expanded), case.run_op(cotangents=copies))

        case.properties["an expanded gradient is its copy"] = as_its_copy
