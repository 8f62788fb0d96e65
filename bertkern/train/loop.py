"""The training loop of the house: BERT's pre-training, its fine-tuning, and translation run in it.

A step of batch x, divided over n processes and into `accumulate` pieces on each, computes

    loss = Σ_name Σ_piece mean_name(piece) · labels_name(piece) / labels_name(x)

so its gradient is that of the undivided batch. Dropout is seeded by (seed, step), and its masks
depend on the place in the whole batch: neither the division nor an interruption changes a run.

`Task` is what a training defines: its batches, its losses, its evaluation.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from bertkern.data.packing import Batch, PackedBatch

from .board import TensorBoard
from .checkpoint import (
    TrainingState,
    load_average,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from .history import Evaluation, History, StepRecord
from .interruption import Interruption, TrainingInterrupted
from .optimizer import make_optimizer
from .processes import Processes
from .progress import TrainingProgress, matrix_rate
from .settings import LoopSettings

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
HISTORY = "history.json"
WEIGHTS_OF_STEP = "weights-{}.safetensors"
LOOK_EVERY = 10  # steps between two looks at the losses, each of which waits for a GPU
MOST_RECORDS = 10000  # of a history: a long run keeps means over several steps
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Task(ABC):
    """What is trained: batches, losses, and what is measured on held-out data.

    Attributes:
        description: on the progress bar, such as "fine-tuning".
        metric, higher_is_better: the figure of `evaluate` that says which weights are best.
    """

    description: str
    metric: str
    higher_is_better: bool

    @abstractmethod
    def batches(self, epoch: int, start: int, step: int) -> Iterator[Batch]:
        """The whole batches of an epoch in order, from batch `start` on; the same in each process.

        `step` updates are done before the epoch's batch 0; an epoch may end early where the data
        change during a run.
        """

    @abstractmethod
    def label_counts(self, part: PackedBatch) -> dict[str, int]:
        """How many labels of each loss a part has."""

    @abstractmethod
    def losses(self, output: Any) -> dict[str, Tensor]:
        """Each loss of the model's output: a mean over the part's labels."""

    @abstractmethod
    def evaluate(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        """Held-out figures, the same in each process; the model is in evaluation mode."""

    def baselines(self) -> dict[str, float]:
        """Held-out figures of one who has not learnt, computed once before the first step."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What the run is a function of besides settings and config; plain JSON values."""
        return {}

    def flops(self, batch: Batch) -> float:
        """FLOPs that the mathematics of a step needs; 0 where they are not counted."""
        return 0.0


def train(
    model: nn.Module,
    task: Task,
    settings: LoopSettings,
    processes: Processes | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    keep_best: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    console: Console | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> History:
    """Update `model` in place, on the device where it is.

    Args:
        model: to be trained, with a `config` that has `to_dict`; with resume, its weights are
            replaced by the checkpoint's.
        task: what to train on.
        settings: how to train.
        processes: the processes of this run; None: this one alone.
        folder: where checkpoints go; None for none.
        resume: go on from the folder's checkpoint.
        keep_best: end with the weights of the best evaluation, in place of the last ones.
        tensorboard: write losses and figures to the folder's `tensorboard`, too.
        progress: show a progress bar, on `console`.
        on_step: called with every record, in the first process.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM; the checkpoint is written.
        FloatingPointError: the loss is no longer finite; the last checkpoint is from before.
        ValueError: the checkpoint is damaged, or of another run; or settings.average without a
            folder or with keep_best.
    """
    if settings.average > 1 and (keep_best or folder is None):
        raise ValueError("average needs a folder for its checkpoints, and excludes keep_best")
    run = _Run(model, task, settings, processes or Processes(), folder, keep_best, on_step)
    if resume:
        run.resume()
    show = progress and run.processes.is_main
    bar = run.progress_bar(show, console)
    board = TensorBoard(folder, run.state.step, tensorboard and run.processes.is_main)
    try:
        with bar, board, Interruption() as interruption, own_random_state(run.device):
            run.go(bar, board, interruption)
    finally:
        model.eval()
    return run.state.history


class _Run:
    """One run of the loop: its optimizer, its state, and what happens at a step."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: LoopSettings,
        processes: Processes,
        folder: Path | None,
        keep_best: bool,
        on_step: Callable[[StepRecord], None] | None,
    ) -> None:
        self.task, self.settings, self.processes = task, settings, processes
        self.folder, self.keep_best, self.on_step = folder, keep_best, on_step
        self.device = next(model.parameters()).device
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        self.config = model.config.to_dict()  # type: ignore[operator, union-attr]
        self.model = processes.wrap(model, settings.sharding)
        self.optimizer = make_optimizer(self.model, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.state = TrainingState(run=self._identity(), history=History(task.baselines()))
        self.loss_names: list[str] = []
        self.pending: list[tuple[StepRecord, Tensor]] = []  # steps whose losses were not looked at
        self.record_every = max(1, settings.steps // MOST_RECORDS)

    def _identity(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "config": self.config,
            "data": self.task.describe(),
        }

    def resume(self) -> None:
        """Go on where the folder's checkpoint stands."""
        assert self.folder is not None, "there is nothing to resume from without a folder"
        path = self.folder / CHECKPOINT
        self.state = load_checkpoint(path, self.model, self.optimizer, self.scaler, self.state.run)

    def progress_bar(self, show: bool, console: Console | None) -> TrainingProgress:
        """The bar, which knows how fast this machine multiplies."""
        rate = None
        if show:
            rate = matrix_rate(self.device, _DTYPES[self.settings.precision])
            rate *= self.processes.count
        return TrainingProgress(
            self.task.description,
            self.settings.steps,
            self.state.step,
            rate,
            self.task.metric,
            show,
            console,
        )

    def go(self, bar: TrainingProgress, board: TensorBoard, interruption: Interruption) -> None:
        """All steps that are left."""
        settings, state = self.settings, self.state
        self._start_sharding()
        if state.step == 0 and settings.evaluate_first and not state.history.evaluations:
            self._evaluate(bar, board)
        batches = self._batches()
        while state.step < settings.steps and not self._is_patience_over():
            batch = next(batches)
            start = time.perf_counter()
            losses = self._step(batch)
            state.step += 1
            tokens = int(batch.lengths.sum())
            self.pending.append(
                (StepRecord(state.step, tokens, settings.rate(state.step - 1)), losses)
            )
            last = state.step == settings.steps
            evaluates = state.step % settings.evaluate_every == 0 or last
            saves = state.step % settings.checkpoint_every == 0 or last
            looks = self.device.type == "cpu" or len(self.pending) == LOOK_EVERY
            stops = False
            if looks or evaluates or saves:
                self._look(board)
                stops = self.processes.any(interruption.asked)
            elapsed = time.perf_counter() - start
            bar.stepped(tokens, len(batch), self.task.flops(batch), elapsed, state.history)
            if evaluates and not (last and settings.average > 1):
                self._evaluate(bar, board)
            if saves or stops or self._is_patience_over():
                self._save(saves)
            if stops and not last:
                path = self.folder / CHECKPOINT if self.folder is not None else None
                raise TrainingInterrupted(state.step, settings.steps, path)
        if self.keep_best:
            load_weights(self._best_path(), self.model)
        if settings.average > 1:
            load_average(self._weights_to_average(), self.model)
            self._evaluate(bar, board)

    def _start_sharding(self) -> None:
        """Let FSDP2 see a whole forward first, by which it learns which module is the root."""
        if self.settings.sharding == "ddp" or self.processes.count == 1:
            return
        state = self.state
        for batch in self.task.batches(state.epoch, state.batch, state.epoch_step):
            with torch.no_grad():
                self.model(**self.processes.part_of(batch)[0].arguments(self.device))
            return

    def _batches(self) -> Iterator[Batch]:
        """Batches without end, from where the state stands; it moves on as they are taken."""
        state = self.state
        while True:
            before = state.batch
            for batch in self.task.batches(state.epoch, state.batch, state.epoch_step):
                state.batch += 1
                yield batch
            if before == 0 and state.batch == 0:
                raise ValueError(f"epoch {state.epoch} of the data is empty: nothing to train on")
            state.epoch, state.batch, state.epoch_step = state.epoch + 1, 0, state.step

    def _step(self, batch: Batch) -> Tensor:
        """One update; returns this process's share of each loss, and the gradients' norm.

        They are still on the device. fp16 passes over updates that are not finite: its norm is 0.
        """
        settings, task, processes = self.settings, self.task, self.processes
        self.model.train()
        parts = processes.parts_of(batch, settings.accumulate)
        counts = [task.label_counts(part) for part, _ in parts]
        names = self.loss_names = list(counts[0])
        shares = self._shares(counts, [counted for _, counted in parts])
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.state.step)
        seed = _step_seed(settings.seed, self.state.step)
        losses = torch.zeros(len(names), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (part, _) in enumerate(parts):
            torch.manual_seed(seed)
            with processes.without_sync(self.model, pending=index < len(parts) - 1):
                with torch.autocast(
                    self.device.type,
                    _DTYPES[settings.precision],
                    enabled=settings.precision != "fp32",
                ):
                    means = task.losses(self.model(**part.arguments(self.device)))
                weighted = torch.stack([means[name].float() for name in names]) * shares[index]
                # data-parallel gradients are means over processes, and a sum is wanted
                self.scaler.scale(weighted.sum() * processes.count).backward()
            losses += weighted.detach()
        self.scaler.unscale_(self.optimizer)
        most = math.inf if settings.max_gradient_norm is None else settings.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = torch.zeros_like(norm) if settings.precision == "fp16" else norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.cat([losses, norm.reshape(1).to(losses)])

    def _shares(self, counts: list[dict[str, int]], counted: list[bool]) -> Tensor:
        """Each piece's weight in the mean of each loss over the whole batch, [pieces, losses]."""
        own = torch.tensor(
            [
                [of_piece[name] * float(counts_here) for name in self.loss_names]
                for of_piece, counts_here in zip(counts, counted, strict=True)
            ]
        )
        own = own.to(self.device, non_blocking=True)
        return own / self.processes.total(own.sum(0)).clamp(min=1.0)

    def _look(self, board: TensorBoard) -> None:
        """Read the losses of the last steps from the device."""
        if not self.pending:
            return
        values = self.processes.total(torch.stack([losses for _, losses in self.pending]))
        state = self.state
        for (record, _), (*row, norm) in zip(self.pending, values.tolist(), strict=True):
            record.losses = dict(zip(self.loss_names, row, strict=True))
            if not math.isfinite(record.loss + norm):
                what = "gradient" if math.isfinite(record.loss) else "loss"
                raise FloatingPointError(
                    f"the {what} of step {record.step} is not finite; a lower learning_rate "
                    f"({self.settings.learning_rate}) may help"
                )
            state.since_record.append((record.tokens, record.losses))
            if record.step % self.record_every == 0 or record.step == self.settings.steps:
                self._record(record, board)
        self.pending.clear()

    def _record(self, last: StepRecord, board: TensorBoard) -> None:
        """One record of the steps since the last one."""
        state = self.state
        count = len(state.since_record)
        record = StepRecord(
            last.step,
            sum(tokens for tokens, _ in state.since_record),
            last.learning_rate,
            {n: sum(losses[n] for _, losses in state.since_record) / count for n in last.losses},
        )
        state.since_record = []
        state.history.steps.append(record)
        board.step(record)
        if self.on_step is not None and self.processes.is_main:
            self.on_step(record)

    @torch.no_grad()
    def _evaluate(self, bar: TrainingProgress, board: TensorBoard) -> None:
        self._look(board)
        self.model.eval()
        with self.processes.bare(self.model) as model:
            result = Evaluation(self.state.step, self.task.evaluate(model, self.processes))
        self.state.history.evaluations.append(result)
        bar.evaluated(result)
        board.evaluation(result)
        best = self.state.history.best(self.task.metric, self.task.higher_is_better)
        if self.keep_best and best is result:
            save_weights(self._best_path(), self.model, self.processes)

    def _is_patience_over(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        evaluations = self.state.history.evaluations
        best = self.state.history.best(self.task.metric, self.task.higher_is_better)
        if self.settings.patience is None or best is None:
            return False
        return len(evaluations) - 1 - evaluations.index(best) >= self.settings.patience

    def _save(self, to_average: bool) -> None:
        """Write a checkpoint, and where wanted its weights for the mean at the end."""
        if self.folder is not None:
            if to_average and self.settings.average > 1:
                path = self.folder / WEIGHTS_OF_STEP.format(self.state.step)
                save_weights(path, self.model, self.processes)
                kept = self._weights_to_average()
                for old in set(self.folder.glob(WEIGHTS_OF_STEP.format("*"))) - set(kept):
                    if self.processes.is_main:
                        old.unlink(missing_ok=True)
            save_checkpoint(
                self.folder / CHECKPOINT,
                self.model,
                self.optimizer,
                self.scaler,
                self.state,
                self.processes,
            )

    def _weights_to_average(self) -> list[Path]:
        """The files of the last checkpoints, of which there were fewer in a short run."""
        assert self.folder is not None
        every, step = self.settings.checkpoint_every, self.state.step
        steps = [s for s in range(every, step, every)] + [step]
        return [self.folder / WEIGHTS_OF_STEP.format(s) for s in steps[-self.settings.average :]]

    def _best_path(self) -> Path:
        assert self.folder is not None, "the best weights are kept in a folder"
        return self.folder / BEST


def _step_seed(seed: int, step: int) -> int:
    """What torch's generators are seeded with for a step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """A block whose random numbers leave torch's global generators as they were."""
    cuda_devices = []
    if device.type == "cuda":
        cuda_devices = [torch.cuda.current_device() if device.index is None else device.index]
    return torch.random.fork_rng(devices=cuda_devices)
