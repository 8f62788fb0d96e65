"""The harness: every figure of the suite is checked, measured and recorded here.

How a case is timed. All peers of a case run in this process and are interleaved: sample 1 of
each, then sample 2 of each, in another order every time, so that a machine that slows down slows
all of them. Before a peer's turn on a CPU the harness waits until the threads of the one before
sleep (thread pools spin for a while, and would take a core from the next), and calls once without
timing. What is kept is the median with the 20 % and 80 % quantiles.

    warm    a sample is as many calls one after the other as take about SAMPLE_SECONDS
    cold    GPU: a sample is one call, after the L2 cache was filled with something else
    graph   GPU: as warm, but a CUDA graph of the call is replayed: what is left of small calls when
            the host's work is taken away

A GPU is timed by CUDA events, a CPU by its clock.

What counts. Before anything is timed, each peer's output and gradients are held to the tolerance
rule of the tests against the same mathematics in fp64; a peer that fails is recorded as wrong and
not timed. A peer that cannot run is recorded with its reason and disturbs nobody.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertkern.reference.tolerance import Bound, NearMiss, hold_in_most_draws

from .machine import added_bytes
from .row import Row, is_own

if TYPE_CHECKING:
    from .limits import Limits

SAMPLE_SECONDS = 2e-3
SLOW_SECONDS = 0.1  # the first timing of a call that takes longer is its first sample
SETTLING_SECONDS, MOST_SETTLING_SECONDS = 1e-3, 0.5
LEAST_ROUNDS = 3  # of interleaved samples, however slow the calls are
L2_FLUSH_BYTES = 256 * 2**20  # larger than any L2 of today: 50 MB on H100, 126 MB on B200
# The states of the caches in which an op is timed.
CACHES = {"cpu": ("warm",), "cuda": ("cold", "warm", "graph")}


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class Peer:
    """One way to compute a case.

    `run` takes the leaf tensors in the peer's own layout. `enter` brings a tensor of the case into
    that layout and `leave` brings an output or a gradient back; both are outside the measured time.
    `checked` is what is checked in place of `run`: the same function with dropout off, for a peer
    whose dropout mask nobody else can compute.
    """

    run: Callable[..., Tensor]
    enter: Callable[[Tensor], Tensor] = _same
    leave: Callable[[Tensor], Tensor] = _same
    checked: Callable[..., Tensor] | None = None
    passes: tuple[str, ...] = ("forward", "forward+backward")


@dataclass
class Case:
    """One row of the table of cases: an op at one shape, and who computes it.

    `part` takes from every tensor of the case the part on which the exact result is computed, where
    the whole would not fit: the same part of an output or gradient depends on no other.
    """

    op: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    inputs: Callable[[int], Sequence[Tensor]]  # leaf tensors of a draw, fp64
    plain: Callable[..., Tensor]  # the mathematics in ordinary torch ops, for the check
    peers: dict[str, Peer]
    flops: dict[str, float]  # per pass, what the mathematics needs
    bytes: dict[str, float]  # per pass, each tensor once
    passes: tuple[str, ...] = ("forward", "forward+backward")
    part: Callable[[Tensor], Tensor] = _same
    out_like: int | None = None  # the leaf that the output has the shape of; needed with `part`
    items: float = 0.0
    unit: str = ""
    curve: str = ""

    @property
    def name(self) -> str:
        """`op[k=v,...]`, unique in the suite."""
        return f"{self.op}[{','.join(f'{k}={v}' for k, v in self.shape.items())}]"


@dataclass
class Outcome:
    """One peer at one pass: what is timed, what the check found, and the times."""

    call: Callable[[], Any]
    error: str = ""
    max_error: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per state of the caches

    def add_note(self, text: str) -> None:
        """One more thing to know of the measurement."""
        self.note = f"{self.note}; {text}" if self.note else text


def output_gradient(out: Tensor) -> Tensor:
    """A gradient for the output that is not constant (LayerNorm's gradient of ones is zero)."""
    index = torch.arange(out.numel(), device=out.device, dtype=torch.float64)
    return torch.cos(index * 0.7).reshape(out.shape).to(out.dtype)


def bound(
    run: Callable[..., Tensor], leaves: Sequence[Tensor], direction: str, dout: Tensor
) -> Callable[[], list[Tensor]]:
    """The call that is checked and timed: output, or output and gradients."""
    own = [t.detach().clone().contiguous() for t in leaves]  # a peer may write into what is its own
    own_dout = dout.clone()
    if direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [run(*own)]

        return forward
    for tensor in own:
        tensor.requires_grad_()

    def forward_and_backward() -> list[Tensor]:
        out = run(*own)
        return [out, *torch.autograd.grad(out, own, own_dout)]

    return forward_and_backward


def as_matrices(tensor: Tensor) -> Tensor:
    """Tokens second to last, as the tolerance rule wants them: [..., S, H, D] -> [..., H, S, D]."""
    return tensor.transpose(-3, -2) if tensor.dim() in (3, 4) else tensor


def reason(problem: BaseException) -> str:
    """The first line of an exception's message."""
    lines = [line for line in str(problem).splitlines() if line.strip()]
    return f"not run: {lines[0].strip() if lines else repr(problem)}"


class Truths:
    """Inputs of a case by the number of their draw, with the exact result of each pass."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.drawn: dict[int, tuple[list[Tensor], Tensor]] = {}
        self.known: dict[tuple[int, str], list[Bound]] = {}

    def inputs(self, draw: int) -> tuple[list[Tensor], Tensor]:
        """Leaf tensors and the output's gradient."""
        if draw not in self.drawn:
            case = self.case
            leaves = [t.to(case.dtype).to(self.device) for t in case.inputs(draw)]
            with torch.no_grad():
                parts = case.plain(*(case.part(t) for t in leaves))
                whole = parts if case.out_like is None else torch.empty_like(leaves[case.out_like])
            self.drawn[draw] = leaves, output_gradient(whole)
        return self.drawn[draw]

    def bounds(self, draw: int, direction: str) -> list[Bound]:
        """What output and gradients of the case's part are held to: the same in fp64, and the plain
        computation in the case's dtype."""
        if (draw, direction) not in self.known:
            leaves, dout = self.inputs(draw)
            parts, dout_part = [self.case.part(t) for t in leaves], self.case.part(dout)
            doubles = [t.double() for t in parts]
            exact = bound(self.case.plain, doubles, direction, dout_part.double())()
            same = bound(self.case.plain, parts, direction, dout_part)()
            self.known[draw, direction] = [
                Bound(as_matrices(truth), as_matrices(plain), plain.dtype, grad=index > 0)
                for index, (truth, plain) in enumerate(zip(exact, same, strict=True))
            ]
        return self.known[draw, direction]

    def forget(self, direction: str) -> None:
        """Free what is large."""
        self.known = {key: value for key, value in self.known.items() if key[1] != direction}


def check(case: Case, device: torch.device) -> dict[tuple[str, str], Outcome]:
    """Each (peer, direction) ready to be timed, or with what is wrong with it.

    A near miss of the rule is believed only if fresh inputs miss it, too (`hold_in_most_draws`);
    even then another package's peer, which was not made to our rule, is timed, with a note.
    """
    outcomes: dict[tuple[str, str], Outcome] = {}
    truths = Truths(case, device)
    for direction in case.passes:
        for name, peer in case.peers.items():
            outcomes[name, direction] = _check_peer(truths, name, peer, direction)
        truths.forget(direction)
    return outcomes


class WrongResult(Exception):
    """A peer computed something else."""


def compare(results: Sequence[Tensor], bounds: Sequence[Bound]) -> None:
    """Hold output and gradients to the rule, all of them before a near miss is told.

    Raises:
        WrongResult: one is wrong.
        NearMiss: none is, and one is close to the bound.
    """
    near: list[NearMiss] = []
    for index, (result, allowed) in enumerate(zip(results, bounds, strict=True)):
        name = f"gradient {index}" if index else "output"
        if result.dtype != allowed.dtype:
            raise WrongResult(f"{name} is {result.dtype}, not {allowed.dtype}")
        try:
            allowed.hold(as_matrices(result), name)
        except NearMiss as miss:
            near.append(miss)
        except AssertionError as problem:
            raise WrongResult(str(problem)) from None
    if near:
        raise near[0]


def _check_peer(truths: Truths, name: str, peer: Peer, direction: str) -> Outcome:
    outcome = Outcome(call=lambda: None)
    if direction not in peer.passes:
        outcome.error = f"not run: {name} has no {direction} here"
        return outcome

    def call_of(run: Callable[..., Tensor], draw: int) -> Callable[[], list[Tensor]]:
        leaves, dout = truths.inputs(draw)
        return bound(run, [peer.enter(t) for t in leaves], direction, peer.enter(dout))

    def hold(draw: int) -> None:
        bounds = truths.bounds(draw, direction)
        results = call_of(peer.checked or peer.run, draw)()
        parts = [truths.case.part(peer.leave(result)) for result in results]
        out, exact = as_matrices(parts[0]), bounds[0].truth
        if draw == 0 and out.shape == exact.shape:
            outcome.max_error = relative_error(out, exact)
        compare(parts, bounds)

    try:
        try:
            hold_in_most_draws(hold)
        except NearMiss as miss:
            if is_own(name):
                raise WrongResult(str(miss)) from None
            outcome.add_note(f"near the tolerance's bound: {miss}")
        if peer.checked is not None:
            outcome.add_note("checked with dropout off")
        outcome.call = call_of(peer.run, 0)
        if peer.checked is not None:
            outcome.call()  # what is made at the first call is not the call's memory
        _, outcome.peak_bytes = added_bytes(outcome.call, truths.device)
    except WrongResult as problem:
        outcome.error = f"wrong: {problem}"
    except Exception as problem:  # whatever a peer raises, the others are measured
        outcome.error = reason(problem)
    return outcome


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value."""
    return float((out.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max())


def time_outcomes(
    outcomes: dict[str, Outcome],
    device: torch.device,
    samples: int,
    budget: float,
    caches: Sequence[str] = ("warm",),
) -> None:
    """Fill in the seconds of those without an error, for each state of the caches.

    Args:
        budget: seconds that the samples of one state may take; LEAST_ROUNDS are taken anyway.
    """
    for cache in caches:
        calls = {}
        for name, outcome in outcomes.items():
            if outcome.error:
                continue
            try:
                calls[name] = graph_of(outcome.call) if cache == "graph" else outcome.call
            except Exception as problem:  # not every peer can be captured
                outcome.add_note(f"no CUDA graph: {reason(problem).removeprefix('not run: ')}")
        if calls:

            def failed(name: str, problem: Exception) -> None:
                outcomes[name].error = reason(problem)
                outcomes[name].seconds.clear()

            cold = cache == "cold"
            taken = measure(calls, device, samples, budget, cold, failed)
            for name, seconds in taken.items():
                outcomes[name].seconds[cache] = seconds


def graph_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of the call, captured on a side stream after a warm-up there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    samples: int,
    budget: float = math.inf,
    cold: bool = False,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each of `calls`: `samples` of each, interleaved, or fewer rounds where
    they take longer than `budget` seconds together.

    Args:
        failed: told of a call that raises, which is then left out; without it, measure raises.
    """
    timer = _GpuTimer(device, cold) if device.type == "cuda" else _CpuTimer()
    numbers: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}

    def first_calls(name: str) -> None:
        timer.settle()
        seconds = timer(calls[name], 1)
        if seconds < SAMPLE_SECONDS:  # what was slow is warm
            calls[name]()
            seconds = timer(calls[name], 1)
        numbers[name] = timer.calls_per_sample(max(seconds, 1e-9))
        if seconds > SLOW_SECONDS:
            times[name].append(seconds)

    def sample(name: str) -> None:
        timer.settle()
        if not times[name] or times[name][-1] < SLOW_SECONDS:
            calls[name]()
        times[name].append(timer(calls[name], numbers[name]))

    def guarded(step: Callable[[str], None], name: str) -> None:
        try:
            step(name)
        except Exception as problem:
            if failed is None:
                raise
            failed(name, problem)
            del times[name]

    for name in calls:
        guarded(first_calls, name)
    order = list(times)
    shuffle = random.Random(0)
    end = time.perf_counter() + budget
    while times and (done := min(map(len, times.values()))) < samples:
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in order:
            if len(times[name]) < samples:
                guarded(sample, name)
        order = [name for name in order if name in times]
        shuffle.shuffle(order)
    return times


class _CpuTimer:
    def settle(self) -> None:
        """Wait until no thread of this process works."""
        end = time.perf_counter() + MOST_SETTLING_SECONDS
        while time.perf_counter() < end:
            worked = time.process_time()
            time.sleep(SETTLING_SECONDS)
            if time.process_time() - worked < 0.2 * SETTLING_SECONDS:
                return

    def calls_per_sample(self, seconds: float) -> int:
        return max(1, math.ceil(SAMPLE_SECONDS / seconds))

    def __call__(self, call: Callable[[], Any], number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number


class _GpuTimer:
    def __init__(self, device: torch.device, cold: bool) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if cold else None
        self.device = device

    def settle(self) -> None:
        """A stream runs one call after the other anyway."""

    def calls_per_sample(self, seconds: float) -> int:
        return 1 if self.flush is not None else max(1, math.ceil(SAMPLE_SECONDS / seconds))

    def __call__(self, call: Callable[[], Any], number: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flush is not None:
            self.flush.zero_()
        start.record()
        for _ in range(number):
            call()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) * 1e-3 / number


def rows_of(outcomes: dict[str, Outcome], limits: "Limits", common: dict[str, Any]) -> list[Row]:
    """A row for each peer and state of the caches, or one that says why there is no time.

    Args:
        common: the fields that peers share: suite, op, direction, shape, dtype, flops, bytes, ...
    """
    rows = []
    for name, outcome in outcomes.items():
        for cache, seconds in (outcome.seconds or {"warm": []}).items():
            floor = limits.floor(common["bytes"], common["flops"], common["dtype"], cache)
            rows.append(
                Row.timed(
                    seconds,
                    **common,
                    peer=name,
                    cache=cache,
                    floor_s=floor,
                    peak_bytes=outcome.peak_bytes,
                    max_error=outcome.max_error,
                    correct=not outcome.error,
                    note=outcome.note,
                    error=outcome.error,
                )
            )
    return rows


def run_case(
    case: Case,
    device: torch.device,
    samples: int,
    budget: float,
    limits: "Limits",
    facts: dict[str, Any],
) -> list[Row]:
    """Check and time one case of the ops: rows for each pass and peer."""
    found = check(case, device)
    rows = []
    for direction in case.passes:
        outcomes = {name: found[name, direction] for name in case.peers}
        time_outcomes(outcomes, device, samples, budget, CACHES[device.type])
        common = {
            "suite": "ops",
            "op": case.op,
            "direction": direction,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "flops": case.flops[direction],
            "bytes": case.bytes[direction],
            "items": case.items,
            "unit": case.unit,
            "curve": case.curve,
            "provenance": facts,
        }
        rows += rows_of(outcomes, limits, common)
    return rows
