"""The line of a training run says what was measured last."""

import io

import torch
from rich.console import Console

from bertkern.train import Evaluation, History, StepRecord
from bertkern.train.progress import WIDE, TrainingProgress, matrix_rate


def shown(width, *evaluations):
    """What stands in the last line after one step and these evaluations."""
    file = io.StringIO()
    console = Console(file=file, width=width)
    history = History(steps=[StepRecord(1, 100, 0.1, {"a": 1.5, "b": 0.25})])
    with TrainingProgress("testing", 10, 0, 1e9, "accuracy", True, console) as bar:
        bar.stepped(100, 4, 5e8, 2.0, history)
        for value in evaluations:
            bar.evaluated(Evaluation(1, {"accuracy": value}))
    return file.getvalue().strip().splitlines()[-1]


def test_all_figures_of_a_wide_terminal():
    line = shown(WIDE, 0.25, 0.75)
    for part in ("testing", "1/10", "loss 1.750", "held-out accuracy 0.750", "50 tokens/s"):
        assert part in line
    assert "2.0 sequences/s" in line
    assert "MFU 25%" in line


def test_a_narrow_one_has_whole_words():
    line = shown(100, 0.5)
    assert "testing" in line
    assert "held-out accuracy 0.500" in line
    assert "50 tokens/s" in line
    assert "…" not in line


def test_matrix_rate_is_a_rate():
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
