"""The command: `bertkern bench`, `make bench`, `python -m bertkern.benchmarks.run`.

    bertkern bench [ops|models|training ...] [--quick] [--peers LIST] [--device D] [--dtype LIST]
                   [--only TEXT] [--samples N] [--results FOLDER] [--report FOLDER] [--list]
    bertkern bench report [FILE ...]         tables and pictures of result files
    bertkern bench compare OLD NEW           exit code 1 where a ratio to a peer fell

Without a suite all three run. The machine's limits are measured first. Every case's rows are
written as soon as they are measured, so what an interrupted run measured is there.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from . import compare, op_cases, report
from .decoding_cases import decoding
from .harness import run_case
from .limits import measure_limits
from .machine import file_name, progress, provenance
from .model_cases import Run, inference
from .peers import GROUPS, Peers
from .row import RESULTS, Row, write_rows
from .sentence_cases import OP as SENTENCES
from .sentence_cases import sentences_per_second
from .training_cases import training
from .transformer_cases import sizes_of, transformer_training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUITES = ("ops", "models", "training")
# Samples of a case, and the seconds that they may take: an op's, a model's.
FULL, QUICK = (25, 0.7, 3.0), (9, 0.3, 0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report or compare. Exit code 1 when an output of ours was wrong or a ratio fell."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["report"]:
        return report.main(given[1:])
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    return measure_suites(given)


def parser_of_suites() -> argparse.ArgumentParser:
    """The options of a run."""
    parser = argparse.ArgumentParser(
        prog="bertkern bench",
        description="Time bertkern and what one would otherwise use, in one run; say how far each "
        "figure is from what the machine can do.",
        epilog="Also: bertkern bench report [FILE ...] · bertkern bench compare OLD NEW. Peers: "
        + "; ".join(f"{name} ({what})" for name, (_, what) in GROUPS.items()),
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--peers", help="comma-separated, or none (default: all that are here)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        help=f"comma-separated, of {', '.join(DTYPES)} (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--samples", type=int, help="samples per peer at most")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--report", type=Path, help="folder of tables and pictures (default: RESULTS/../report)"
    )
    parser.add_argument("--no-report", action="store_true", help="draw nothing")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser


def measure_suites(arguments: Sequence[str]) -> int:
    """Run the suites that are asked for."""
    start = time.monotonic()
    parser = parser_of_suites()
    options = parser.parse_args(arguments)
    wrong = [name for name in options.suites if name not in SUITES]
    if wrong:
        parser.error(f"SUITE {' '.join(wrong)}: allowed are {', '.join(SUITES)}, report, compare")
    suites = options.suites or list(SUITES)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device {options.device}: not a device of torch, as cpu or cuda:0 is")
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and not torch.cuda.is_available()
    ):
        parser.error(f"--device {options.device}: allowed are cpu, and cuda where torch finds one")
    names = (options.dtype or ("bfloat16" if device.type == "cuda" else "float32")).split(",")
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        parser.error(f"--dtype {','.join(unknown)}: allowed are {', '.join(DTYPES)}")
    if options.samples is not None and options.samples < 1:
        parser.error(f"--samples {options.samples}: at least 1")
    asked = None if options.peers is None else [p for p in options.peers.split(",") if p != "none"]
    try:
        if options.list:
            return list_cases(device, [DTYPES[name] for name in names], options.quick)
        who = Peers(asked, device, options.quick)
    except ValueError as problem:
        parser.error(str(problem))

    # Memory is measured after a collection of garbage, which need not look at the peers' modules.
    gc.freeze()
    facts = provenance(device)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    path = options.results / file_name("-".join(options.suites) or "bench", facts)
    rows: list[Row] = []

    def emit(measured: Iterable[Row]) -> None:
        measured = list(measured)
        rows.extend(measured)
        write_rows(measured, path)

    samples, op_budget, model_budget = QUICK if options.quick else FULL
    samples = options.samples or samples
    ended = ""
    try:
        limits = measure_limits(
            device, (*dict.fromkeys(("float32", *names)),), facts, options.quick
        )
        emit(limits.rows)
        emit(absent_rows(who, suites, facts))
        run = Run(who, limits, facts, samples, model_budget, options.quick, emit)
        chosen = [DTYPES[name] for name in names]
        runners: dict[str, Callable[[], None]] = {
            "ops": lambda: run_ops(run, chosen, op_budget, options.only),
            "models": lambda: run_models(run, chosen, options.only),
            "training": lambda: run_training(run, chosen, options.only),
        }
        for suite in suites:
            progress(f"== {suite}")
            runners[suite]()
    except KeyboardInterrupt:
        ended = "interrupted"
    except OSError as problem:  # a full disk: what was measured is in the table below
        ended = f"stopped: {problem}"
    print(report.table_of([row for row in rows if row.op != "peer"]))
    for name, why in who.absent.items():
        print(f"{GROUPS[name][1]}: {why}")
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s -> {path}")
    if ended:
        print(f"{ended}; what was measured is above, and what was written is in {path}")
        return 130 if ended == "interrupted" else 1
    if not options.no_report:
        folder = options.report or options.results.parent / "report"
        report.main([str(path), "--out", str(folder)])
    if options.only and not any(row.suite in suites and row.op != "peer" for row in rows):
        print(f"--only {options.only}: no case is named so; --list names them")
        return 2
    bad = [row for row in rows if row.error.startswith("wrong")]
    for row in bad:
        print(f"wrong output: {row.op} {row.shape_text} {row.direction} {row.peer}: {row.error}")
    for row in rows:
        if row.own and row.error.startswith("not run"):
            print(f"not run: {row.op} {row.shape_text} {row.direction} {row.peer}: {row.error}")
            bad.append(row)
    return 1 if any(row.own for row in bad) else 0


def list_cases(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> int:
    """Names that --only selects from."""
    who = Peers([], device, quick)
    for dtype in dtypes:
        for case in op_cases.cases(who, dtype, quick):
            print("ops", case.name)
    transformers = [f"transformer-{name}" for name in sizes_of(device, quick)]
    decoded = [f"{name} decode" for name in transformers]
    for name in ("bert-mini", "bert-base", "bert-large", SENTENCES, *decoded):
        print("models", name)
    trained = ("bert-mini", "bert-base") if device.type == "cpu" else ("bert-base", "bert-large")
    for name in (*trained, *transformers):
        print("training", name)
    return 0


def absent_rows(who: Peers, suites: Sequence[str], facts: dict[str, object]) -> list[Row]:
    """A row for each peer that is not here, with its reason."""
    return [
        Row.timed(
            (),
            suite=suites[0],
            op="peer",
            direction="import",
            shape={},
            dtype="",
            peer=GROUPS[name][1],
            correct=False,
            error=why,
            provenance=dict(facts),
        )
        for name, why in who.absent.items()
    ]


def run_ops(run: Run, dtypes: Sequence[torch.dtype], budget: float, only: str) -> None:
    """The table of op cases."""
    device = run.who.device
    for dtype in dtypes:
        for case in op_cases.cases(run.who, dtype, run.quick):
            if only in case.name:
                progress(f"  {case.name} {str(dtype).removeprefix('torch.')}")
                torch.compiler.reset()  # else it stops compiling after some shapes
                run.emit(run_case(case, device, run.samples, budget, run.limits, run.facts))


def run_models(run: Run, dtypes: Sequence[torch.dtype], only: str) -> None:
    """Inference of BERT by every engine, sentences a second, and the Transformer's decoding."""
    inference(run, dtypes, only)
    if only in SENTENCES:
        sentences_per_second(run, dtypes)
    decoding(run, dtypes, only)


def run_training(run: Run, dtypes: Sequence[torch.dtype], only: str) -> None:
    """Steps of BERT's pre-training and of the Transformer."""
    training(run, dtypes, only)
    transformer_training(run, dtypes, only)


if __name__ == "__main__":
    sys.exit(main())
