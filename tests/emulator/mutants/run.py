"""Runs the mutants of the CUDA kernels on the emulator.

    PYTHONPATH=tests python -m emulator.mutants.run [--write docs/cuda-mutants.md] [TEXT ...]

runs all of them, or those whose names have all of the texts, and prints how each was caught; only a
run of all is written. A mutant is caught if a case breaks the tolerance rule or the machine reports
a fault. The same cases must pass on the sources as they are, under SOUND_SEEDS scheduler seeds.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from emulator import build, emulated

import bertkern

from . import attention_cases, compiling, norm_cases
from .cases import Case
from .equivalent import argument_of
from .report import report
from .sites import Mutant, mutants

SEEDS = 2  # of a mutant's runs: the orders in which threads run and copies arrive
SOUND_SEEDS = 5
SECONDS = 40  # of processor time, for all of a mutant's runs
SOUND_SECONDS = 120

_CASES: dict[str, tuple[Callable[[], Any], ...]] = {
    "attention": attention_cases.CASES,
    "layer_norm": norm_cases.LAYER_NORM,
    "embedding_layer_norm": norm_cases.EMBEDDING,
}


def _ops_of(file: str) -> tuple[str, ...]:
    """Whose cases a kernel's file is run with."""
    name = Path(file).name
    if name.startswith("layer_norm"):
        return "layer_norm", "embedding_layer_norm"  # the second is built from the first's parts
    is_attention = name.startswith("attention") or file.startswith("sm90")
    return ("attention",) if is_attention else ("embedding_layer_norm",)


def _capabilities_of(file: str) -> tuple[int, ...]:
    """On what devices the file's kernels run."""
    if file.startswith("sm90"):
        return (90,)
    return (80,) if file.startswith("sm80") else (80, 90)


# By what a mutant is caught, from what the machine says.
_REPORTS = {
    "a race on": "race",
    "out of bounds": "out of bounds",
    "nobody has written": "uninitialised",
    "not aligned": "misaligned",
    "wait for ever": "deadlock",
}
SURVIVED = "survived"


class Result(NamedTuple):
    """`how` is one of a report's kinds, "tolerance", "crash", "time" or SURVIVED."""

    mutant: str
    how: str
    case: str = ""
    message: str = ""

    @property
    def caught(self) -> bool:
        return self.how != SURVIVED


class Bench:
    """What all mutants are run with, made once: the module, and cases with what is expected of
    them. A process that runs a mutant is forked from the one that has it."""

    def __init__(self, every: list[Mutant], files: set[str], seeds: int, sound_seeds: int) -> None:
        self.seeds, self.sound_seeds = seeds, sound_seeds
        torch.set_num_threads(1)
        path = compiling.module_of(every)
        module = build.load(path)
        emulated.module = lambda: module
        self.choose = ctypes.CDLL(str(path)).choose_mutant
        self.numbers = {mutant: number for number, mutant in enumerate(every, 1)}
        names = {name for file in files for name in _ops_of(file)}
        self.cases = {name: [make() for make in _CASES[name]] for name in sorted(names)}
        for case in chain(*self.cases.values()):
            case.prepare()

    def run(self, mutant: Mutant | None, sender: Connection) -> None:
        """In a process of its own: runs the cases until the first that fails, sends what came
        out. A loop without an end ends the process."""
        seconds = SOUND_SECONDS if mutant is None else SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        names, seeds, capabilities = self.cases.keys(), self.sound_seeds, (80, 90)
        if mutant is not None:
            self.choose(self.numbers[mutant])
            names, seeds = _ops_of(mutant.file), self.seeds
            capabilities = _capabilities_of(mutant.file)
        cases = list(chain(*(self.cases[name] for name in names)))
        sender.send(self._first_failure(cases, seeds, capabilities))

    @staticmethod
    def _first_failure(
        cases: list[Case], seeds: int, capabilities: tuple[int, ...]
    ) -> tuple[str, str, str]:
        """(how, case, message)"""
        for seed, capability in product(range(seeds), capabilities):
            for case in cases:
                emulator = emulated.emulated(seed, capability=capability)
                try:
                    with bertkern.backend("cuda"), emulator:
                        case.check()
                except AssertionError as error:
                    return "tolerance", case.name, str(error)
                except RuntimeError as error:
                    kinds = (kind for text, kind in _REPORTS.items() if text in str(error))
                    return next(kinds, "report"), case.name, str(error)
        return SURVIVED, "", ""


class _Running:
    """A process that runs a mutant."""

    def __init__(self, bench: Bench, mutant: Mutant | None) -> None:
        self.mutant = mutant
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=bench.run, args=(mutant, sender))
        self.process.start()
        sender.close()

    def result(self) -> Result:
        """Of the process, which has ended."""
        how = "time" if self.process.exitcode == -signal.SIGXCPU else "crash"
        found = (how, "", f"exit code {self.process.exitcode}")
        with contextlib.suppress(EOFError):
            found = self.receiver.recv()
        return Result(self.mutant.name if self.mutant else "the sources as they are", *found)


def run_all(
    every: list[Mutant], chosen: list[Mutant], workers: int, seeds: int, sound_seeds: int
) -> Iterator[tuple[Mutant | None, Result]]:
    """Runs the sources as they are, which stand for None, and each chosen mutant, `workers` at a
    time; as they end."""
    bench = Bench(every, {mutant.file for mutant in chosen}, seeds, sound_seeds)
    tasks, running = [None, *chosen], []
    tasks.reverse()
    while tasks or running:
        while tasks and len(running) < workers:
            running.append(_Running(bench, tasks.pop()))
        ended = wait([one.process.sentinel for one in running])
        for one in [one for one in running if one.process.sentinel in ended]:
            running.remove(one)
            one.process.join()
            yield one.mutant, one.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="scheduler seeds of a mutant")
    parser.add_argument(
        "--sound-seeds", type=int, default=SOUND_SEEDS, help="of the sources as they are"
    )
    parser.add_argument("--names", type=Path, help="a file with the names to run, one a line")
    parser.add_argument("texts", nargs="*", help="what the names must have; all mutants without")
    arguments = parser.parse_args()
    every = mutants()
    chosen = [m for m in every if all(t in m.name for t in arguments.texts)]
    if arguments.names:
        names = set(arguments.names.read_text().splitlines())
        chosen = [m for m in chosen if m.name in names]
    results, failures, sound = [], 0, False
    start = time.monotonic()
    for mutant, result in run_all(
        every, chosen, arguments.workers, arguments.seeds, arguments.sound_seeds
    ):
        if mutant is None:
            sound = not (failed := result.how != SURVIVED)
        else:
            results.append((mutant, result))
            failed = not result.caught and argument_of(mutant) is None
        failures += failed
        line = f"{result.how}: {result.mutant}"
        said = f" [{result.case}] {result.message}" if failed else ""
        print(f"{'FAILED ' if failed else ''}{line}{said}", flush=True)
    seconds = time.monotonic() - start
    caught = sum(result.caught for _, result in results)
    print(f"{caught} of {len(results)} mutants are caught, in {seconds:.0f} seconds")
    if arguments.json:
        arguments.json.write_text(json.dumps([result for _, result in results]))
    if arguments.write and sound and len(chosen) == len(every):
        arguments.write.write_text(report([(mutant, result.how) for mutant, result in results]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
