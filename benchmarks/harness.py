"""The harness: every figure of the suite is measured, checked and recorded here.

How a case is timed. All peers of a case run in this process and are interleaved: sample 1 of
each, then sample 2 of each, beginning with another peer every time, so that a machine that slows
down slows all of them. A sample is as many calls as take about SAMPLE_SECONDS together. What is
kept is the median with the 20 % and 80 % quantiles. On a GPU a sample is one call between two CUDA
events, after the L2 cache was filled with something else.

What counts. Before anything is timed, each peer's output and gradients are held to the tolerance
rule of the tests against the same mathematics in fp64; a peer that fails is recorded as wrong and
not timed.
"""

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertkern.reference.tolerance import assert_close

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks", "results")  # below the folder one stands in, not the installation
SAMPLE_SECONDS = 2e-3
L2_FLUSH_BYTES = 256 * 2**20  # larger than any L2 of today: 50 MB on H100, 126 MB on B200


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class Peer:
    """One way to compute a case.

    `run` takes the leaf tensors in the peer's own layout. `enter` brings a tensor of the case into
    that layout and `leave` brings an output or a gradient back; both are outside the measured time.
    """

    run: Callable[..., Tensor]
    enter: Callable[[Tensor], Tensor] = _same
    leave: Callable[[Tensor], Tensor] = _same


@dataclass
class Case:
    """One row of the table of cases: an op at one shape, and who computes it."""

    op: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    inputs: Callable[[], Sequence[Tensor]]  # fresh leaf tensors, fp64 on the CPU
    plain: Callable[..., Tensor]  # the mathematics in ordinary torch ops, for the check
    peers: dict[str, Peer]
    flops: dict[str, float]  # per pass, what the mathematics needs
    bytes: dict[str, float]  # per pass, each tensor once
    passes: tuple[str, ...] = ("forward", "forward+backward")

    @property
    def name(self) -> str:
        """`op[k=v,...]`, unique in the suite."""
        return f"{self.op}[{','.join(f'{k}={v}' for k, v in self.shape.items())}]"


@dataclass
class Row:
    """One measurement. A time of None was not measured; `error` says why."""

    op: str
    direction: str
    shape: dict[str, int | str]
    dtype: str
    peer: str
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    samples: int
    flops: float
    bytes: float
    correct: bool
    error: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and date, the same for every row of a run."""
    import bertkern

    def version(package: str) -> str:
        module = sys.modules.get(package)
        return getattr(module, "__version__", "not imported")

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        return run.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    if commit != "unknown" and git("status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    facts: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "bertkern": bertkern.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def output_gradient(out: Tensor) -> Tensor:
    """A gradient for the output that is not constant (LayerNorm's gradient of ones is zero)."""
    index = torch.arange(out.numel(), device=out.device, dtype=torch.float64)
    return torch.cos(index * 0.7).reshape(out.shape).to(out.dtype)


def bound(
    peer: Peer, leaves: Sequence[Tensor], direction: str, dout: Tensor
) -> Callable[[], list[Tensor]]:
    """The call that is checked and timed: output, or output and gradients, in the peer's layout."""
    own = [peer.enter(t).detach().contiguous() for t in leaves]
    if direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [peer.run(*own)]

        return forward
    for tensor in own:
        tensor.requires_grad_()
    own_dout = peer.enter(dout)

    def forward_and_backward() -> list[Tensor]:
        out = peer.run(*own)
        return [out, *torch.autograd.grad(out, own, own_dout)]

    return forward_and_backward


def as_matrices(tensor: Tensor) -> Tensor:
    """Tokens second to last, as the tolerance rule wants them: [..., S, H, D] -> [..., H, S, D]."""
    return tensor.transpose(-3, -2) if tensor.dim() in (3, 4) else tensor


def check(case: Case, leaves: Sequence[Tensor], dout: Tensor) -> dict[tuple[str, str], str]:
    """What is wrong with each (peer, direction): empty where it holds the tolerance rule."""
    plain = Peer(case.plain)
    verdict: dict[tuple[str, str], str] = {}
    for direction in case.passes:
        exact = bound(plain, [t.cpu().double() for t in leaves], direction, dout.cpu().double())()
        same_dtype = bound(plain, leaves, direction, dout)()
        for name, peer in case.peers.items():
            try:
                results = bound(peer, leaves, direction, dout)()
                for index, result in enumerate(results):
                    assert_close(
                        as_matrices(peer.leave(result)),
                        as_matrices(exact[index]),
                        as_matrices(same_dtype[index]),
                        grad=index > 0,
                        name=f"gradient {index}" if index else "output",
                    )
                verdict[name, direction] = ""
            except AssertionError as problem:
                verdict[name, direction] = f"wrong: {problem}"
            except (RuntimeError, NotImplementedError, ValueError) as problem:
                verdict[name, direction] = (
                    f"not run: {(str(problem) or repr(problem)).splitlines()[0]}"
                )
    return verdict


def measure(
    calls: dict[str, Callable[[], Any]], device: torch.device, samples: int
) -> dict[str, list[float]]:
    """Seconds per call of each of `calls`, `samples` of each, interleaved."""
    timer = _GpuTimer(device) if device.type == "cuda" else _CpuTimer()
    numbers: dict[str, int] = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        seconds = max(timer(call, 1), 1e-9)
        numbers[name] = timer.calls_per_sample(seconds)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(samples):
        for name in order:
            times[name].append(timer(calls[name], numbers[name]))
        order.append(order.pop(0))
    return times


class _CpuTimer:
    def calls_per_sample(self, seconds: float) -> int:
        return max(1, math.ceil(SAMPLE_SECONDS / seconds))

    def __call__(self, call: Callable[[], Any], number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number


class _GpuTimer:
    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.device = device

    def calls_per_sample(self, seconds: float) -> int:
        return 1

    def __call__(self, call: Callable[[], Any], number: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        for _ in range(number):
            call()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) * 1e-3 / number


def quantile(values: Sequence[float], share: float) -> float:
    """Value below which `share` of the samples lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run_case(case: Case, device: torch.device, samples: int, facts: dict[str, Any]) -> list[Row]:
    """Check and time one case: one row per pass and peer."""
    leaves = [t.to(case.dtype).to(device) for t in case.inputs()]
    with torch.no_grad():
        dout = output_gradient(case.plain(*leaves))
    verdict = check(case, leaves, dout)
    rows = []
    for direction in case.passes:
        calls = {
            name: bound(peer, leaves, direction, dout)
            for name, peer in case.peers.items()
            if not verdict[name, direction]
        }
        times = measure(calls, device, samples) if calls else {}
        for name in case.peers:
            taken = times.get(name)
            rows.append(
                Row(
                    op=case.op,
                    direction=direction,
                    shape=case.shape,
                    dtype=str(case.dtype).removeprefix("torch."),
                    peer=name,
                    median_s=statistics.median(taken) if taken else None,
                    p20_s=quantile(taken, 0.2) if taken else None,
                    p80_s=quantile(taken, 0.8) if taken else None,
                    samples=len(taken or ()),
                    flops=case.flops[direction],
                    bytes=case.bytes[direction],
                    correct=not verdict[name, direction],
                    error=verdict[name, direction],
                    provenance=facts,
                )
            )
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """JSON lines, one measurement a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), sort_keys=True) + "\n")
