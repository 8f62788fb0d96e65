"""TensorBoard's view of a run: losses, learning rate and held-out figures against steps."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from .history import Evaluation, StepRecord


class TensorBoard:
    """Writes to `<folder>/tensorboard`, or nowhere.

    Args:
        folder: of the run.
        done: steps already done; what an interrupted run wrote after them is hidden.
        wanted: nothing is written where False.

    Raises:
        ModuleNotFoundError: wanted, but the package `tensorboard` is not installed.
        ValueError: wanted, but there is no folder.
    """

    def __init__(self, folder: Path | None, done: int, wanted: bool) -> None:
        self._writer: Any = None
        if not wanted:
            return
        if folder is None:
            raise ValueError("tensorboard = True needs a folder to write to")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"tensorboard = True needs the package tensorboard ({error}): "
                "pip install 'bertkern[train]'"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(self, record: StepRecord) -> None:
        """A record of the history."""
        if self._writer is not None:
            for name, loss in record.losses.items():
                self._writer.add_scalar(f"train/{name}_loss", loss, record.step)
            self._writer.add_scalar("train/learning_rate", record.learning_rate, record.step)

    def evaluation(self, result: Evaluation) -> None:
        """An evaluation of the history."""
        if self._writer is not None:
            for name, value in result.figures.items():
                self._writer.add_scalar(f"held-out/{name}", value, result.step)
