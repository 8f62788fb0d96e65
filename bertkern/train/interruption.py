"""Ctrl-C and SIGTERM end a training run between two steps, where its state is whole."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """A run was ended by Ctrl-C or SIGTERM; the message says how it goes on.

    Attributes:
        step, steps: updates done, updates planned.
        checkpoint: the file to resume from, or None.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path | None) -> None:
        how = "no checkpoint was asked for"
        if checkpoint is not None:
            how = f"checkpoint written to {checkpoint}; --resume (resume=True) goes on from there"
        super().__init__(f"interrupted after step {step} of {steps}: {how}")
        self.step, self.steps, self.checkpoint = step, steps, checkpoint


class Interruption:
    """A block in which SIGTERM and the first SIGINT only set `asked`; a later SIGINT acts as ever.

    Python delivers signals to the main thread: in another one, this does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        # Ctrl-C twice acts as ever; launchers send SIGTERM again and again
        signal.signal(signal.SIGINT, self._before.get(signal.SIGINT) or signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
