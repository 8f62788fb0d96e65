"""Host time that an op adds to its kernel's launch: argument checks, choice of backend, dispatcher
and autograd.

python -m bertkern.benchmarks.overhead [--device D] [--samples N] [--only OP] [--results FOLDER]

The backends' functions are replaced by stubs that allocate the outputs and compute nothing. Timed
are the stub alone ("bare") and the public function on top of it, in turns; what is added is the
difference of their 20 % quantiles, because what disturbs a host only ever adds time. The backward
is timed over many independent calls at once, so that the start of torch's engine, which a training
step pays once, is shared by them. For scale, torch's own LayerNorm is timed the same way; its
kernel, a microsecond here, is in its figure.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bertkern
from bertkern.ops import _backend

from .harness import measure
from .machine import file_name, provenance
from .row import RESULTS, Row, quantile, write_rows

LIMIT_S = 12e-6  # forward with gradient over the bare launch, on a 2-core machine
CALLS_PER_BACKWARD = 32
HOST = torch.device("cpu")  # measured with the host's clock, whatever device the tensors are on


class Stub:
    """A backend's function that, once `frozen`, only allocates what its last real call returned."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.frozen = False
        self.arguments: tuple[Any, ...] = ()
        self.outputs: list[tuple[Any, ...] | int | None] = []
        self.is_tuple = False

    def __call__(self, *arguments: Any) -> Any:
        if self.frozen:
            made: list[Any] = []
            for output in self.outputs:
                if isinstance(output, tuple):
                    shape, dtype, device = output
                    made.append(torch.empty(shape, dtype=dtype, device=device))
                else:
                    made.append(None if output is None else made[output])
            return tuple(made) if self.is_tuple else made[0]
        result = self.function(*arguments)
        self.is_tuple = isinstance(result, tuple)
        tensors = list(result) if self.is_tuple else [result]
        seen: dict[int, int] = {}  # a function may return one tensor twice
        self.outputs = []
        for index, tensor in enumerate(tensors):
            if tensor is None or id(tensor) in seen:
                self.outputs.append(None if tensor is None else seen[id(tensor)])
            else:
                seen[id(tensor)] = index
                self.outputs.append((tensor.shape, tensor.dtype, tensor.device))
        self.arguments = arguments
        return result


@contextmanager
def stubs() -> Iterator[list[Stub]]:
    """Backends that hand out stubs, listed in the order of their first use."""
    made: list[Stub] = []
    real = _backend._function

    def function(name: str, op: str, function: str) -> Stub:
        made.append(Stub(real(name, op, function)))
        return made[-1]

    _backend._function = function  # type: ignore[assignment]
    _backend._choose.cache_clear()
    try:
        yield made
    finally:
        _backend._function = real
        _backend._choose.cache_clear()


def calls(device: torch.device) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each op as a function of its differentiable inputs, as BERT's layers call it."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    tokens, hidden, heads = 8, 16, 2
    x, residual, vector = leaf(tokens, hidden), leaf(tokens, hidden), leaf(hidden)
    matrix = leaf(hidden, hidden)
    q_BSHD, q_THD = leaf(2, tokens // 2, heads, 8), leaf(tokens, heads, 8)
    cu_seqlens = torch.tensor([0, 3, tokens], dtype=torch.int32, device=device)
    lengths = torch.tensor([3, 4], dtype=torch.int32, device=device)
    seed = torch.tensor([7], device=device)
    target = torch.arange(tokens, device=device)
    types = target % 2
    dropped = {"dropout_p": 0.1, "dropout_seed": seed}
    return {
        "attention": (
            lambda q, k, v: bertkern.attention(q, k, v, key_lengths=lengths, **dropped),
            [q_BSHD, q_BSHD, q_BSHD],
        ),
        "attention_varlen": (
            lambda q, k, v: bertkern.attention_varlen(
                q, k, v, cu_seqlens, cu_seqlens, tokens, tokens, **dropped
            ),
            [q_THD, q_THD, q_THD],
        ),
        "scaled_dot_product_attention": (
            bertkern.scaled_dot_product_attention,
            [q_BSHD.transpose(1, 2)] * 3,
        ),
        "layer_norm": (bertkern.layer_norm, [x, vector, vector]),
        "dropout_add_layer_norm": (
            lambda *inputs: bertkern.dropout_add_layer_norm(*inputs, **dropped),
            [x, residual, vector, vector],
        ),
        "dropout": (lambda x: bertkern.ops.dropout(x, 0.1, seed), [x]),
        "linear": (
            lambda x, w, b: bertkern.linear(x, w, b, activation="gelu"),
            [x, matrix, vector],
        ),
        "ffn": (
            lambda *inputs: bertkern.ffn(*inputs, **dropped),
            [x, matrix, vector, matrix, vector],
        ),
        "linear_cross_entropy": (  # "mean" and "sum" add reductions of torch's own
            lambda x, w, b: bertkern.linear_cross_entropy(x, w, b, target, reduction="none"),
            [x, matrix, vector],
        ),
        "embedding_layer_norm": (
            lambda *tables: bertkern.embedding_layer_norm(
                target, target, types, *tables, **dropped
            ),
            [x, x, matrix, vector, vector],
        ),
    }


def time_op(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], samples: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each (pass, "bare" or "bertkern")."""

    def leaves() -> list[Tensor]:
        return [t.detach().requires_grad_() for t in inputs]

    own = leaves()
    with stubs() as made:
        torch.autograd.grad(function(*own).sum(), own)
        forward, backward = made[0], made[-1]
        for stub in made:
            stub.frozen = True

        def no_grad(call: Callable[..., Any]) -> Callable[[], Any]:
            def run() -> None:
                with torch.no_grad():
                    call()

            return run

        copies = [leaves() for _ in range(CALLS_PER_BACKWARD)]
        outputs = [function(*one) for one in copies]
        flat = [leaf for one in copies for leaf in one]
        gradients = [torch.ones_like(output) for output in outputs]

        def bare() -> None:
            forward(*forward.arguments)

        def call() -> None:
            function(*own)

        def bare_backward() -> None:
            for _ in range(CALLS_PER_BACKWARD):
                backward(*backward.arguments)

        def call_backward() -> None:
            torch.autograd.grad(outputs, flat, gradients, retain_graph=True)

        passes = {
            "forward, no grad": (no_grad(bare), no_grad(call), 1),
            "forward": (bare, call, 1),
            "backward": (bare_backward, call_backward, CALLS_PER_BACKWARD),
        }
        times = {}
        for direction, (stub_alone, op, count) in passes.items():
            taken = measure({"bare": stub_alone, "bertkern": op}, HOST, samples)
            for who, seconds in taken.items():
                times[direction, who] = [s / count for s in seconds]
    return times


def torch_layer_norm(samples: int) -> list[float]:
    """Seconds of a call of torch's own op with gradient, kernel included."""
    x, vector = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def call() -> None:
        torch.nn.functional.layer_norm(x, (16,), vector, vector)

    return measure({"torch": call}, HOST, samples)["torch"]


def table_of(seconds: dict[tuple[str, str, str], float]) -> str:
    """One line per op and pass, microseconds."""
    lines = [f"{'op':<30}{'pass':<18}{'bare':>8}{'op':>8}{'added':>8}   us of host time"]
    for (op, direction, who), taken in seconds.items():
        if who == "bertkern":
            bare = seconds[op, direction, "bare"]
            numbers = "".join(f"{s * 1e6:8.1f}" for s in (bare, taken, taken - bare))
            lines.append(f"{op:<30}{direction:<18}{numbers}")
    return "\n".join(lines)


def row_of(
    op: str, direction: str, peer: str, taken: Sequence[float], facts: dict[str, Any]
) -> Row:
    """As the other suites write it; nothing is computed, so nothing can be wrong."""
    return Row.timed(
        taken,
        suite="overhead",
        op=op,
        direction=direction,
        shape={},
        dtype="float32",
        peer=peer,
        provenance=facts,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every op. Exit code 1 when a forward with gradient adds more than LIMIT_S."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=25, help="samples per measurement")
    parser.add_argument("--only", default="", help="measure the ops whose name contains this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(1)

    facts = provenance(device)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    own = torch_layer_norm(options.samples)
    rows = [row_of("layer_norm", "forward", "torch, with its kernel", own, facts)]
    seconds: dict[tuple[str, str, str], float] = {}
    for op, (function, inputs) in calls(device).items():
        if options.only not in op:
            continue
        for (direction, who), taken in time_op(function, inputs, options.samples).items():
            seconds[op, direction, who] = quantile(taken, 0.2)
            peer = "stub launch" if who == "bare" else "bertkern on a stub"
            rows.append(row_of(op, direction, peer, taken, facts))
    print(table_of(seconds))
    print(f"torch's own layer_norm with gradient, kernel included: {quantile(own, 0.2) * 1e6:.1f}")
    path = options.results / file_name("overhead", facts)
    write_rows(rows, path)
    print(f"{len(rows)} rows -> {path}")
    added = {
        op: taken - seconds[op, direction, "bare"]
        for (op, direction, who), taken in seconds.items()
        if direction == "forward" and who == "bertkern"
    }
    over = [f"{op} {s * 1e6:.1f} us" for op, s in added.items() if s > LIMIT_S]
    print(f"over {LIMIT_S * 1e6:.0f} us with gradient: {', '.join(over) or 'none'}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
