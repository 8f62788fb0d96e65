"""The progress bar of a training run: losses, tokens a second, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .history import Evaluation, History

SMOOTHING = 0.95  # weight of the past in the shown averages


class TrainingProgress:
    """A line that is rewritten after each step.

    Args:
        steps, done: of the run, and those already done.
        show: nothing is written where False.
        console: where to; None for the terminal.
    """

    def __init__(self, steps: int, done: int, show: bool, console: Console | None) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not show,
        )
        self._task = self._progress.add_task(
            "pre-training", total=steps, completed=done, figures=""
        )
        self._held_out = ""
        self._seconds_per_token: float | None = None
        self._loss: float | None = None

    def __enter__(self) -> TrainingProgress:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(exc_type, exc, traceback)

    def stepped(self, tokens: int, seconds: float, history: History) -> None:
        """A step of so many tokens took so long."""
        self._seconds_per_token = _smooth(self._seconds_per_token, seconds / tokens)
        if history.steps:
            self._loss = _smooth(self._loss, history.steps[-1].loss)
        loss = "" if self._loss is None else f"loss {self._loss:.3f}  "
        speed = f"{1 / self._seconds_per_token:,.0f} tokens/s"
        self._progress.update(self._task, advance=1, figures=f"{loss}{self._held_out}{speed}")

    def evaluated(self, result: Evaluation) -> None:
        """The held-out text was evaluated."""
        self._held_out = f"held-out MLM {result.mlm_loss:.3f}  "


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else SMOOTHING * average + (1 - SMOOTHING) * value
