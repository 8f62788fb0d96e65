"""transformers' BERT on the same batches in the same order: what ours is compared with.

A batch that our model reads packed is padded for transformers', to its longest sequence as their
collators do; the optimizer, the learning rates and the clipping are ours. The loop is the plain one
of PyTorch, so that it also says whether our own loop does what it should.

Legend: B sequences, S the longest of them, T their tokens, C choices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
    """What a training run was like: the loss of every step, and when the step was done.

    Attributes:
        losses: what was minimised, before each update.
        times: seconds of a clock, after each update.
        tokens: of all steps together, padding apart.
    """

    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    tokens: int = 0

    def add(self, loss: float, tokens: int) -> None:
        """A step that is done just now."""
        self.losses.append(loss)
        self.times.append(time.perf_counter())
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        """From the end of the first step, which warms up, to the end of the last."""
        return self.times[-1] - self.times[0]


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


def train(model: nn.Module, task: Task, settings: LoopSettings) -> Course:
    """The plain loop: AdamW, linear warm-up and decay, clipped gradients."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )
    course = Course()
    model.train()
    torch.manual_seed(settings.seed)
    for step, batch in zip(range(settings.steps), _batches(task), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        loss = loss_of(model, *padded(batch.part(0, len(batch)).arguments()))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        course.add(loss.item(), int(batch.lengths.sum()))
    model.eval()
    return course


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


def agreement(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The relative difference of each step's loss."""
    return [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)]
