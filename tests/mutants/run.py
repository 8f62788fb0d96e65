"""Runs the tests that a mutant names on a copy of `kernels/` that has the mutant's fault.

    PYTHONPATH=tests python -m mutants.run [--write docs/mutants.md] [NAME ...]

runs all of them, or those whose names are given, prints the table and, if asked, writes it.
A mutant is caught if one of its tests fails by an assertion; a crash does not count, since a kernel
that cannot run needs no test. The same tests must pass on a copy without a fault. They run in
Triton's interpreter, the random ones with FUZZ_CASES of each op.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
TIMEOUT = 600
FUZZ_CASES = 30


class Result(NamedTuple):
    """caught_by is the test that failed, or None; message says how, or why nothing was proved."""

    caught_by: str | None
    seconds: float
    message: str


def copy_with_fault(mutant: Mutant, folder: Path) -> None:
    """`kernels/` copied to folder, the mutant's texts replaced. ValueError if one is not found."""
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / mutant.file
    source = path.read_text()
    for text, replacement in mutant.edits:
        found = source.count(text)
        if found != mutant.times:
            raise ValueError(
                f"mutant {mutant.name!r}: kernels/{mutant.file} has {text!r} {found} times, not "
                f"{mutant.times}; the table in tests/mutants/table.py must follow the kernels"
            )
        source = source.replace(text, replacement)
    path.write_text(source)


def run(mutant: Mutant) -> Result:
    """Runs the mutant's tests until the first failure."""
    with tempfile.TemporaryDirectory() as temporary:
        kernels, report_file = Path(temporary) / "kernels", Path(temporary) / "report.json"
        copy_with_fault(mutant, kernels)
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "BERTKERN"))
        }
        environment |= {
            "BERTKERN_MUTANT_KERNELS": str(kernels),
            "BERTKERN_MUTANT_REPORT": str(report_file),
            "BERTKERN_FUZZ_CASES": str(FUZZ_CASES),
            "BERTKERN_FUZZ_OPS": ",".join(mutant.fuzz),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "tests"),
            "TRITON_INTERPRET": "1",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "mutants.load"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", *mutant.tests]
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        seconds = time.perf_counter() - start
        if not report_file.exists():
            tail = (done.stdout + done.stderr)[-2000:]
            return Result(None, seconds, f"pytest ended with {done.returncode}: {tail}")
        report = json.loads(report_file.read_text())
    if report["elsewhere"] or (mutant.edits and mutant.file not in report["loaded"]):
        return Result(None, seconds, f"the copy was not what ran: {report}")
    if not report["failures"]:
        return Result(None, seconds, f"survived {report['ran']} tests")
    failure = report["failures"][0]
    first_line = next((x for x in failure["message"].splitlines() if x.strip(": \n")), "")
    by_assertion = failure["message"].startswith(
        ("AssertionError", "assert", "tolerance.", "Failed")
    )
    if not by_assertion or failure["when"] != "call":
        return Result(None, seconds, f"{failure['test']} crashed: {first_line}")
    return Result(failure["test"], seconds, failure["message"])


def without_fault(mutants: list[Mutant]) -> list[str]:
    """What fails among the tests of these mutants on a copy that has no fault."""
    broken = []
    for fuzz, tests in sorted({(m.fuzz, m.tests) for m in mutants}):
        sound = Mutant("no fault", mutants[0].file, "", (), fuzz, tests)
        result = run(sound)
        if result.caught_by is not None or not result.message.startswith("survived"):
            broken.append(f"{', '.join(fuzz)}: {result.caught_by}: {result.message}")
    return broken


def _row(mutant: Mutant, result: Result) -> str:
    caught = f"`{result.caught_by.split('/')[-1]}`" if result.caught_by else "**survived**"
    return (
        f"| {mutant.name} | `{mutant.file}` | {mutant.suffers} | {caught} | {result.seconds:.0f} |"
    )


HEAD = """# Deliberately wrong kernels, and the tests that fail on them

Written by `make mutants` from the table in `tests/mutants/table.py`; not edited by hand. Each row
is a copy of `kernels/` with one fault, on which tests were run (in Triton's interpreter, the sample
of `make test`) until the first of them failed. The same tests pass on a copy without a fault.

| fault | file | what a user would suffer | caught by | seconds |
|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("names", nargs="*", help="mutants; all of them if none is named")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if not arguments.names or m.name in arguments.names]
    for failure in (broken := without_fault(chosen)):
        print(f"fails on the kernels as they are: {failure}", flush=True)
    rows, survivors = [], 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for mutant, result in zip(chosen, pool.map(run, chosen), strict=True):
            survivors += result.caught_by is None
            rows.append(_row(mutant, result))
            print(rows[-1] if result.caught_by else f"{rows[-1]} {result.message}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants are caught")
    if arguments.write and not broken:
        arguments.write.write_text(HEAD + "\n".join(rows) + "\n")
    return 1 if survivors or broken else 0


if __name__ == "__main__":
    sys.exit(main())
