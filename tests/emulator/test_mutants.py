"""The emulator finds wrong CUDA kernels: a sample of them, or all with BERTKERN_MUTANTS=all."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import emulated
from emulator.mutants.equivalent import EQUIVALENT, argument_of
from emulator.mutants.sites import SOURCES, WATCHED, mutants, sources

TESTS = Path(__file__).resolve().parents[1]
ALL = os.environ.get("BERTKERN_MUTANTS") == "all"
EVERY = mutants()
SHARE = 1 if ALL else 60  # of the mutants of each kind one in so many, and at least one


def _sample():
    """Of each kind the first, and each 60th; those that are equivalent left out."""
    real = [m for m in EVERY if argument_of(m) is None]
    kinds = {kind: [m for m in real if m.kind == kind] for kind in {m.kind for m in real}}
    return [m for kind in sorted(kinds) for m in kinds[kind][::SHARE]]


CHOSEN = _sample()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name -> [name, how, case, message] of the chosen mutants, by one run of run.py: it
    forks, which a test's process, with threads of others, should not."""
    if (reason := emulated.unusable()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "names").write_text("\n".join(m.name for m in CHOSEN))
    command = [sys.executable, "-m", "emulator.mutants.run", "--names", str(folder / "names")]
    command += ["--json", str(folder / "results"), "--workers", "1"]
    command += [] if ALL else ["--sound-seeds", "2"]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (folder / "results").exists(), done.stdout + done.stderr
    found = json.loads((folder / "results").read_text())
    return {"output": done.stdout, **{result[0]: result for result in found}}


def test_cases_pass_on_the_sources_as_they_are(results):
    failed = re.search(r"^FAILED .*the sources as they are.*$", results["output"], re.M)
    assert failed is None, failed[0]


@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda m: f"{m.file[:-4]}-{m.kind}-{m.start}")
def test_mutant_is_caught(mutant, results):
    assert results[mutant.name][1] != "survived", mutant.name


def test_names_are_unique():
    assert len({m.name for m in EVERY}) == len(EVERY)


def test_arguments_are_of_mutants():
    """An argument for what is no longer in the sources is an argument for nothing."""
    for equivalent in EQUIVALENT:
        assert any(equivalent.is_of(m) for m in EVERY), equivalent


@pytest.mark.parametrize("file", sources())
@pytest.mark.parametrize("function", WATCHED)
def test_every_call_has_a_mutant(file, function):
    """Each place where a watched function is called lies in the text of some mutant, or its
    arguments do."""
    text = (SOURCES / file).read_text()
    ranges = [(m.start, m.start + len(m.before)) for m in EVERY if m.file == file]
    for call in _calls(text, function):
        assert any(start < call[1] and call[0] < end for start, end in ranges), (
            f"{file}, line {text.count(chr(10), 0, call[0]) + 1}: no mutant of this {function}"
        )


@functools.cache
def _calls(text: str, function: str) -> list[tuple[int, int]]:
    """Where calls of a function begin and end; found by another way than sites.py finds them."""
    without_comments = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)
    found = []
    for match in re.finditer(rf"\b{function}(<[^<>;]*>)?[({{]", without_comments):
        before = without_comments[: match.start()].rsplit("\n", 1)[-1]
        if re.search(r"\b(BERTKERN_DEVICE|struct)\b", before):
            continue  # the definition
        end = without_comments.index(";", match.end()) if ";" in without_comments else len(text)
        found.append((match.start(), end))
    return found
