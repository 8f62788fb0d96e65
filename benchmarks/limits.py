"""What the machine can do: the two ceilings of every row, measured in the same run.

Bandwidth: a copy that moves as many bytes as the row must, because a small row's tensors stay in a
cache and a large one's do not. Rate: the fastest of a large product by torch in the row's dtype
and, on a CPU, of the processor's widest multiply-add on registers. A floor is the larger of
bytes / bandwidth and flops / rate: no program with these tensors is faster on this machine.
"""

import bisect
import math
from collections.abc import Callable
from typing import Any

import torch

from .harness import measure
from .row import Row

# Bytes that a copy reads and writes together. Between them the bandwidth is interpolated.
COPIES = (2**18, 2**20, 2**22, 2**24, 2**26, 2**28, 2**30)
PRODUCT = {"cpu": 1536, "cuda": 8192}  # rows, columns and depth of the product
SAMPLES = 7
FMA_OPERATIONS = 1e9  # the row of the multiply-add has the time of so many


class Limits:
    """The ceilings of one device, and the rows that tell how they were measured."""

    def __init__(self) -> None:
        self.copies: list[tuple[float, float]] = []  # (bytes moved, bytes a second), rising
        self.rates: dict[str, float] = {}  # dtype -> operations a second
        self.rows: list[Row] = []

    def bandwidth(self, moved: float, cache: str = "warm") -> float:
        """Bytes a second of a copy of that size; from memory where caches are cold."""
        sizes = [size for size, _ in self.copies]
        at = len(sizes) if cache == "cold" else bisect.bisect_left(sizes, moved)
        if at in (0, len(sizes)):
            return self.copies[min(at, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.copies[at - 1], self.copies[at]
        share = math.log(moved / low) / math.log(high / low)
        return slow ** (1 - share) * fast**share

    def floor(self, moved: float, flops: float, dtype: str, cache: str = "warm") -> float | None:
        """Seconds; None without bytes and flops, or without a rate for the dtype."""
        if dtype not in self.rates or not (moved or flops):
            return None
        return max(moved / self.bandwidth(moved, cache), flops / self.rates[dtype])


def measure_limits(
    device: torch.device, dtypes: tuple[str, ...], facts: dict[str, Any], quick: bool
) -> Limits:
    """Measure bandwidth for several sizes, and the rate of each dtype."""
    limits = Limits()

    def record(op: str, dtype: str, peer: str, seconds: list[float], **counted: Any) -> Row:
        about = {"suite": "limits", "op": op, "dtype": dtype, "peer": peer, "provenance": facts}
        row = Row.timed(seconds, **{"direction": "forward", "shape": {}, **about, **counted})
        limits.rows.append(row)
        return row

    def seconds_of(call: Callable[[], Any]) -> list[float]:
        return measure({"": call}, device, SAMPLES)[""]

    # Several times, apart: one disturbed millisecond must not lower the ceiling of the whole run.
    fma = [_fma_rates()] if device.type == "cpu" else []
    best: dict[float, float] = {}
    for moved in COPIES[: -1 if device.type == "cpu" else None]:
        source = torch.ones(moved // 8, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        seconds = seconds_of(lambda s=source, t=target: t.copy_(s))  # type: ignore[misc]
        counted = {"shape": {"bytes": moved}, "bytes": float(moved)}
        row = record("copy", "float32", "torch", seconds, **counted)
        best[moved] = moved / row.p20_s  # type: ignore[operator]
    limits.copies = sorted(best.items())
    fma += [_fma_rates()] if device.type == "cpu" else []
    for name in dtypes:
        dtype = getattr(torch, name)
        size = PRODUCT[device.type] // (2 if quick and device.type == "cpu" else 1)
        # random numbers: a GPU clocks higher on ones
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = seconds_of(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        counted = {"shape": {"M": size, "N": size, "K": size}, "flops": 2.0 * size**3}
        row = record("matrix product", name, "torch", seconds, **counted)
        limits.rates[name] = row.flops / row.p20_s  # type: ignore[operator]
    fma += [_fma_rates()] if device.type == "cpu" else []
    for name in fma[0] if fma else ():
        rates = [rate for measured in fma for rate in measured[name]]
        seconds = [FMA_OPERATIONS / rate for rate in rates]
        row = record("multiply-add", name, "registers", seconds, flops=FMA_OPERATIONS)
        limits.rates[name] = max(limits.rates.get(name, 0.0), row.flops / row.p20_s)  # type: ignore[operator]
    return limits


def _fma_rates() -> dict[str, list[float]]:
    try:
        from bertkern.ops import _cpu
    except ImportError:  # the extension is not compiled: torch's product alone is the ceiling
        return {}
    measured = {
        name: _cpu.fma_rates(name, torch.get_num_threads())
        for name in ("float32", "bfloat16", "int8")
    }
    return {name: rates for name, rates in measured.items() if rates}
