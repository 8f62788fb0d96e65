"""The progress bar of a training run: losses, speed, time left."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from rich import get_console
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

WIDE = 140  # columns that all figures take; narrower terminals get fewer
SMOOTHING = 0.95  # weight of the past in the shown averages


class TrainingProgress:
    """A line that is rewritten after each step.

    Args:
        description: what runs.
        steps, done: of the run, and those already done.
        matrix_rate: FLOPs a second that all devices could multiply matrices at; None: no share of
            it is shown.
        shown_figure: the figure of an evaluation that is shown.
        show: nothing is written where False.
        console: where to; None for the terminal.
    """

    def __init__(
        self,
        description: str,
        steps: int,
        done: int,
        matrix_rate: float | None,
        shown_figure: str,
        show: bool,
        console: Console | None,
    ) -> None:
        console = console or get_console()
        self._is_wide = console.width >= WIDE
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            *([BarColumn(bar_width=20)] if self._is_wide else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not show,
        )
        self._task = self._progress.add_task(description, total=steps, completed=done, figures="")
        self._matrix_rate, self._shown_figure = matrix_rate, shown_figure
        self._held_out = ""
        # seconds a token, a sequence, a FLOP; smoothed
        self._rates: list[float | None] = [None, None, None]
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

    def stepped(
        self, tokens: int, sequences: int, flops: float, seconds: float, history: History
    ) -> None:
        """A step of so many tokens, sequences and FLOPs took so long."""
        for i, amount in enumerate((tokens, sequences, flops)):
            if amount:
                self._rates[i] = _smooth(self._rates[i], seconds / amount)
        if history.steps:
            self._loss = _smooth(self._loss, history.steps[-1].loss)
        self._progress.advance(self._task)
        self._show()

    def evaluated(self, result: Evaluation) -> None:
        """The held-out data were evaluated."""
        value = result.figures[self._shown_figure]
        self._held_out = f"held-out {self._shown_figure} {value:.3f}"
        self._show()

    def _show(self) -> None:
        parts = [] if self._loss is None else [f"loss {self._loss:.3f}"]
        parts += [self._held_out] if self._held_out else []
        a_token, a_sequence, a_flop = self._rates
        if a_token:
            parts.append(f"{1 / a_token:,.0f} tokens/s")
        if a_sequence and self._is_wide:
            parts.append(f"{1 / a_sequence:,.1f} sequences/s")
        if a_flop and self._matrix_rate and self._is_wide:
            parts.append(f"MFU {1 / a_flop / self._matrix_rate:.0%}")
        self._progress.update(self._task, figures="  ".join(parts))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square product on this device, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else SMOOTHING * average + (1 - SMOOTHING) * value
