"""One measurement, and the JSON lines that hold them.

A result file is one row a line, in the order of measurement, each row with everything that is
needed to read it alone: what was computed, by whom, how long it took, what it had to move and to
compute, what the machine could have done (the floor), and which machine, versions and commit it
was.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks", "results")  # below the folder one stands in, not the installation
OWN = "bertkern"


@dataclass
class Row:
    """One measurement. A time of None was not measured; `error` says why.

    `op`, `direction`, `shape`, `dtype` and `cache` name what was done, `peer` who did it.
    `floor_s` is the larger of bytes / bandwidth and flops / rate, with the ceilings that the same
    run measured (its rows of suite "limits").
    """

    suite: str  # limits, ops, models, training, overhead
    op: str
    direction: str  # forward, forward+backward, step
    shape: dict[str, int | str]
    dtype: str
    peer: str
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    samples: int
    correct: bool
    flops: float = 0.0
    bytes: float = 0.0
    cache: str = "warm"  # "cold": filled with something else before; "graph": CUDA graph, warm
    floor_s: float | None = None
    items: float = 0.0  # tokens, sentences: what the row's rate counts
    unit: str = ""
    peak_bytes: int | None = None  # memory that one call added at its peak
    max_error: float | None = None  # largest difference from fp64 over its largest value
    curve: str = ""  # the key of `shape` that a scaling curve runs over
    note: str = ""
    error: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def timed(cls, seconds: Sequence[float], **fields: Any) -> "Row":
        """The row of these samples, or one without a time where there are none."""
        return cls(
            **{"correct": True, **fields},
            median_s=quantile(seconds, 0.5) if seconds else None,
            p20_s=quantile(seconds, 0.2) if seconds else None,
            p80_s=quantile(seconds, 0.8) if seconds else None,
            samples=len(seconds),
        )

    @property
    def shape_text(self) -> str:
        """B=8 S=128."""
        return " ".join(f"{key}={value}" for key, value in self.shape.items())

    @property
    def what(self) -> tuple[str, str, str, str, str, str]:
        """What was computed: rows that agree in this are peers."""
        return (self.suite, self.op, self.shape_text, self.dtype, self.direction, self.cache)

    @property
    def own(self) -> bool:
        """Of bertkern, and not of a peer."""
        return is_own(self.peer)

    @property
    def of_floor(self) -> float | None:
        """Floor over median: 1 is all that the machine can do."""
        return self.floor_s / self.median_s if self.floor_s and self.median_s else None

    @property
    def rate(self) -> float | None:
        """Items a second."""
        return self.items / self.median_s if self.items and self.median_s else None


def is_own(peer: str) -> bool:
    """bertkern itself, whatever follows: "bertkern [triton]", "bertkern in transformers"."""
    return peer.startswith(OWN)


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Append JSON lines. A row that was written stays, whatever happens to the run afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            values = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in asdict(row).items()  # JSON has no NaN and no infinity
            }
            file.write(json.dumps(values) + "\n")


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Rows of the files, in order.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is not a row; file and line are named.
    """
    known = {item.name for item in fields(Row)}
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                unknown = set(values) - known
                if unknown:
                    raise ValueError(f"unknown {', '.join(sorted(unknown))}")
                row = Row(**values)
            except (ValueError, TypeError) as problem:
                raise ValueError(f"{path}:{number}: not a measurement: {problem}") from None
            rows.append(row)
    return rows


def quantile(values: Sequence[float], share: float) -> float:
    """Value below which `share` of the samples lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log))."""
    return math.exp(sum(map(math.log, values)) / len(values))
