"""Help, version, and how errors arrive."""

import subprocess
import sys

import pytest

import bertkern
from bertkern.cli.main import app

COMMANDS = (
    *("info", "demo", "embed", "fill-mask", "classify", "answer", "attention-map", "pretrain"),
    *("train-translation", "translate", "convert", "tune", "bench"),
)
GROUPS = {
    "data": ("tokenizer", "prepare", "inspect"),
    "words": ("train", "nearest", "similarity", "analogy", "picture", "convert"),
    "finetune": ("classification", "token-classification", "qa", "multiple-choice"),
}
# Those that take --device.
COMPUTING = {(name,) for name in COMMANDS if name not in ("info", "convert")}
COMPUTING |= {("finetune", name) for name in GROUPS["finetune"]} | {("words", "train")}


def test_version(run):
    assert run("--version").stdout.strip() == f"bertkern {bertkern.__version__}"


def test_help_names_every_command(run):
    text = run("--help").stdout
    assert all(command in text for command in (*COMMANDS, *GROUPS))
    assert {command.name for command in app.registered_commands} == set(COMMANDS)
    groups = {
        g.name: [c.name for c in g.typer_instance.registered_commands]
        for g in app.registered_groups
    }
    assert {name: set(commands) for name, commands in groups.items()} == {
        name: set(commands) for name, commands in GROUPS.items()
    }


@pytest.mark.parametrize(
    "command",
    [*[(c,) for c in COMMANDS], *[(g, c) for g in GROUPS for c in GROUPS[g]]],
    ids=" ".join,
)
def test_every_command_and_option_explains_itself(run, command):
    result = run(*command, "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert ("--device" in result.stdout) == (command in COMPUTING)


def test_a_bug_of_ours_shows_its_traceback(run, monkeypatch):
    def broken():
        raise RuntimeError("not the user's fault")

    monkeypatch.setattr(bertkern, "info", broken)
    assert isinstance(run("info").exception, RuntimeError)


def test_an_error_shows_its_traceback_when_asked(run, monkeypatch):
    monkeypatch.setenv("BERTKERN_TRACEBACK", "1")
    assert isinstance(run("embed", "/no/such.txt").exception, FileNotFoundError)


def test_interruption_is_one_line_and_exit_code_130(run, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(bertkern, "info", stopped)
    result = run("info")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_unknown_command_is_a_usage_error():
    done = subprocess.run(
        [sys.executable, "-m", "bertkern.cli.main", "fly"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr
    assert "Traceback" not in done.stderr
