"""transformers' BERT on the same batches in the same order: what ours is compared with.

A batch that our model reads packed is padded for transformers', to its longest sequence as their
collators do; the optimizer, the learning rates and the clipping are ours. The loop is the plain one
of PyTorch, so that it also says whether our own loop does what it should.

Legend: B sequences, S the longest of them, T their tokens, C choices.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bertkern.data.packing import Batch
from bertkern.nn.layout import IGNORE_INDEX
from bertkern.train.finetuning_tasks import FinetuningTask
from bertkern.train.loop import Task
from bertkern.train.settings import LoopSettings


@dataclass
class Course:
    """What a training run was like.

    Attributes:
        losses: what each step minimised, before its update.
        durations: seconds of each step, the making of its batch included.
        tokens: of all steps together, padding apart.
    """

    losses: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    tokens: int = 0

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        """A step that is done."""
        self.losses.append(loss)
        self.durations.append(seconds)
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        """Of all steps but the first, which warms up."""
        return sum(self.durations[1:])


def load(head: str, folder: Path) -> nn.Module:
    """transformers' model of that class name, with the weights of a folder."""
    import transformers

    model = getattr(transformers, head).from_pretrained(folder)
    assert isinstance(model, nn.Module)
    return model


def padded(arguments: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """(arguments of transformers' forward, which places hold tokens [B, S]) of a packed batch.

    Args:
        arguments: what PackedBatch.arguments gives: tokens [T], cu_seqlens, labels of examples, or
            of the tokens `label_tokens`.
    """
    cu_seqlens: Tensor = arguments["cu_seqlens"]
    lengths = cu_seqlens.diff()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]

    def pad(values: Tensor, fill: int) -> Tensor:
        return values.new_full(mask.shape, fill).masked_scatter(mask, values)

    found = {
        "input_ids": pad(arguments["input_ids"], 0),
        "token_type_ids": pad(arguments["token_type_ids"], 0),
        "attention_mask": mask.long(),
    }
    for name in ("labels", "start_positions", "end_positions", "next_sentence_label"):
        if name in arguments:
            found[name] = arguments[name]
    if "label_tokens" in arguments:
        labels = torch.full_like(arguments["input_ids"], IGNORE_INDEX)
        labels[arguments["label_tokens"]] = arguments["labels"]
        found["labels"] = pad(labels, IGNORE_INDEX)
    if "num_choices" in arguments:
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            found[name] = found[name].unflatten(0, (-1, arguments["num_choices"]))
    return found, mask


class Trainer:
    """The plain loop's step: AdamW, linear warm-up and decay, clipped gradients.

    Attributes:
        course: the steps so far.
    """

    def __init__(self, model: nn.Module, settings: LoopSettings) -> None:
        self.model, self.settings, self.course = model, settings, Course()
        self.parameters = list(model.parameters())
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    def step(self, batch: Batch, since: float) -> None:
        """One update; its batch was begun at the time `since`."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(len(self.course.losses))
        loss = loss_of(self.model, *padded(batch.part(0, len(batch)).arguments()))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = int(batch.lengths.sum())
        self.course.add(loss.item(), tokens, time.perf_counter() - since)
        self.model.eval()


def train(model: nn.Module, task: Task, settings: LoopSettings) -> Course:
    """All steps of a task."""
    trainer = Trainer(model, settings)
    torch.manual_seed(settings.seed)
    batches = _batches(task)
    for _ in range(settings.steps):
        since = time.perf_counter()
        trainer.step(next(batches), since)
    return trainer.course


def loss_of(model: nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """transformers' own loss; for spans, of logits without those of padding.

    Its head for questions counts padding among the places where an answer may begin or end, so that
    the loss of a question depends on how long the others of the batch are. Here it does not.
    """
    result = model(**inputs)
    if "start_positions" not in inputs:
        return result.loss
    losses = [
        nn.functional.cross_entropy(logits.masked_fill(~mask, -torch.inf), inputs[positions])
        for logits, positions in (
            (result.start_logits, "start_positions"),
            (result.end_logits, "end_positions"),
        )
    ]
    return (losses[0] + losses[1]) / 2


def _batches(task: Task) -> Iterator[Batch]:
    """Those of one epoch after the other."""
    epoch = step = 0
    while True:
        for batch in task.batches(epoch, 0, step):
            step += 1
            yield batch
        epoch += 1


@torch.no_grad()
def outputs(model: nn.Module, task: FinetuningTask[Any], data: Any) -> dict[str, Any]:
    """What `task.figures` and `task.write` need of a model in evaluation mode."""
    features = data.features
    size = len(features.input_ids) if task.outputs_of_tokens else len(features)
    found: dict[str, Any] = {}
    for batch in features.evaluation_batches(task.settings.evaluation_tokens):
        part = batch.part(0, len(batch))
        inputs, mask = padded(part.arguments())
        result = model(**inputs)
        places = part.places if task.outputs_of_tokens else part.examples
        for name in task.output_names:
            values = getattr(result, name)
            values = (values[mask] if task.outputs_of_tokens else values).numpy()
            found.setdefault(name, np.empty((size, *values.shape[1:]), np.float32))
            found[name][places] = values
    return found


@torch.no_grad()
def masked_lm_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean masked-LM loss of a BertForPreTraining over the batches' masked tokens."""
    total = count = 0.0
    for batch in batches:
        inputs, _ = padded(batch.part(0, len(batch)).arguments())
        labels = inputs.pop("labels")
        del inputs["next_sentence_label"]
        logits = model(**inputs).prediction_logits
        chosen = labels != IGNORE_INDEX
        total += float(nn.functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum"))
        count += int(chosen.sum())
    return total / count


def agreement(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The relative difference of each step's loss."""
    return [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)]
