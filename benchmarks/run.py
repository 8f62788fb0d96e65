"""`make bench`: times the ops against torch on the device at hand; a table, and JSON lines.

python -m bertkern.benchmarks.run [--device D] [--dtype float32,bfloat16] [--quick]
                                  [--results FOLDER]
"""

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import op_cases
from .harness import RESULTS, Row, provenance, run_case, write_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seconds(value: float | None) -> str:
    """1.23 ms, 45.6 us."""
    if value is None:
        return ""
    return f"{value * 1e3:.3f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


HEADINGS = (
    *("case", "dtype", "pass", "who"),
    *("median", "20 %", "80 %", "GFLOP/s", "GB/s", "time / bertkern's"),
)


def table_of(rows: Sequence[Row]) -> str:
    """One line per measurement, in plain text: a stock installation of torch has no rich."""

    def group(row: Row) -> tuple[str, str, str]:
        shape = " ".join(f"{key}={value}" for key, value in row.shape.items())
        return f"{row.op} {shape}", row.dtype, row.direction

    own = {group(row): row.median_s for row in rows if row.peer == "bertkern"}
    lines = [HEADINGS]
    before = None
    for row in rows:
        head = group(row) if group(row) != before else ("", "", "")
        before = group(row)
        if row.median_s is None:
            lines.append((*head, f"{row.peer}: {row.error}", *[""] * 6))
            continue
        mine = own[before]
        lines.append(
            (
                *(*head, row.peer),
                *(seconds(row.median_s), seconds(row.p20_s), seconds(row.p80_s)),
                f"{row.flops / row.median_s * 1e-9:,.0f}",
                f"{row.bytes / row.median_s * 1e-9:,.1f}",
                f"{row.median_s / mine:.2f}" if mine else "",
            )
        )
    # A refused peer's reason may be long: it does not widen its column.
    measured = [line for line in lines if line[4]]
    widths = [max((len(line[i]) for line in measured), default=0) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases. Exit code 1 when an output was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        help=f"comma-separated, of {', '.join(DTYPES)} (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--samples", type=int, help="samples per peer (default 25, quick 9)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    names = (options.dtype or ("bfloat16" if device.type == "cuda" else "float32")).split(",")
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        parser.error(f"--dtype {','.join(unknown)}: allowed are {', '.join(DTYPES)}")
    samples = options.samples or (9 if options.quick else 25)

    facts = provenance(device)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    rows: list[Row] = []
    for name in names:
        for case in op_cases.ops(device, DTYPES[name], options.quick):
            if options.only in case.name:
                rows += run_case(case, device, samples, facts)
    print(table_of(rows))

    machine = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = options.results / f"ops-{machine}-{stamp}.jsonl"
    write_rows(rows, path)
    print(f"{len(rows)} rows -> {path}")
    wrong = [row for row in rows if row.error.startswith("wrong")]
    for row in wrong:
        print(f"wrong output: {row.op} {row.direction} {row.peer}: {row.error}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
