"""The tests fail on deliberately wrong kernels: a sample, or all with BERTKERN_MUTANTS=all."""

import os

import pytest
from mutants.run import copy_with_fault, run
from mutants.table import MUTANTS, SAMPLE

ALL = os.environ.get("BERTKERN_MUTANTS") == "all"
CHOSEN = [m for m in MUTANTS if ALL or m.name in SAMPLE]


def test_names_are_unique():
    names = [m.name for m in MUTANTS]
    assert len(names) == len(set(names))
    assert set(names) >= set(SAMPLE)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_the_table_follows_the_kernels(mutant, tmp_path):
    """Of all, not of a sample: a text that is no longer found is a fault that nobody looks for."""
    copy_with_fault(mutant, tmp_path / "kernels")


@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda m: m.name.replace(" ", "-"))
def test_mutant_is_caught(mutant):
    result = run(mutant)
    assert result.caught_by is not None, f"{mutant.suffers}; but {result.message}"
