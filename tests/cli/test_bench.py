"""`bertkern bench` hands its arguments, as they are, to the suite."""

import pytest
from bertkern.benchmarks import run as suite

from bertkern.cli.main import app


@pytest.mark.parametrize("code", [0, 1, 2])
def test_arguments_go_in_and_the_exit_code_comes_out(run, monkeypatch, code):
    given = []
    monkeypatch.setattr(suite, "main", lambda arguments: given.append(arguments) or code)
    arguments = ["ops", "--quick", "--peers", "eager,sdpa", "--only", "layer_norm[N=8"]
    assert run("bench", *arguments).exit_code == code
    assert given == [arguments]


def test_the_suites_own_errors_reach_the_user(run):
    result = run("bench", "opps")
    assert result.exit_code == 2
    assert "allowed are ops, models, training, report, compare" in result.output


def test_report_and_compare_are_found(run, tmp_path):
    missing = str(tmp_path / "no.jsonl")
    assert run("bench", "report", missing).exit_code == 1
    assert run("bench", "compare", missing, missing).exit_code == 2
    assert any(command.name == "bench" for command in app.registered_commands)
