"""Pre-trains a small BERT from Python's documentation, here and in transformers, and compares them.

    python -m bertkern.benchmarks.tasks.pretraining [--steps N] [--dropout RATE]
        [--results FOLDER] [--picture FILE] [--seed N]

Both have the same size, begin with the same weights, and read the same masked pairs in the same
order, with the same optimizer: without dropout they compute the same function, and their losses may
differ by rounding alone. In every step transformers runs after ours, so that what else the machine
does meets both; making and padding the batch count in each one's time. Written are the losses and
the seconds of every step, and the held-out losses on the way. Exit code 1 where ours is not as good
and faster, or the curves part at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from bertkern.data.corpus import Corpus
from bertkern.data.files import write_text
from bertkern.data.masking import MaskingSettings
from bertkern.data.packing import Batch
from bertkern.data.pretraining import PretrainingData
from bertkern.data.text import Document, split_documents, standard_library_text
from bertkern.data.tokenizer import train_tokenizer
from bertkern.models.bert import BertForPreTraining
from bertkern.models.config import BertConfig
from bertkern.train.evaluation import evaluation_batches
from bertkern.train.history import StepRecord
from bertkern.train.loop import train
from bertkern.train.pretraining import PretrainingSettings, PretrainingTask
from bertkern.train.processes import Processes

from ..machine import ROOT, file_name, progress, provenance
from ..row import RESULTS
from . import curves, twin
from .run import APART, NEVER, TOGETHER
from .twin import Course

PICTURE = ROOT / "docs" / "pretraining.png"
VOCABULARY = 8192
_MAX_LENGTH = 64
HELD_OUT = 0.05  # of the documents
CLOSE = 0.01  # nats by which held-out losses may differ: what rounding grows to


def small_config(vocab_size: int, dropout: float) -> BertConfig:
    """2 layers of 256, a size of Turc et al. (2019): deeper ones need more steps than these."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=_MAX_LENGTH,
        initializer_range=0.05,  # 0.02 is for 768 columns; small models start slowly with it
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def small_settings(steps: int, seed: int) -> PretrainingSettings:
    """How both are trained."""
    return PretrainingSettings(
        steps=steps,
        learning_rate=1.5e-3,
        tokens_per_batch=1024,
        evaluation_tokens=16384,
        evaluate_every=100,
        checkpoint_every=NEVER,
        seed=seed,
        masking=MaskingSettings(max_length=_MAX_LENGTH),
    )


def compare(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    config: BertConfig,
    settings: PretrainingSettings,
    folder: Path,
) -> dict[str, Any]:
    """Pre-train both in turns and say what they reached.

    Args:
        documents: the text, of which HELD_OUT is not trained on.
        tokenizer, config, settings: of both.
        folder: for the weights that both begin with.

    Returns:
        Of bertkern and of transformers the losses, the seconds and the held-out losses; the
        held-out figures of one who knows only frequencies; how far the losses are apart.
    """
    parts = split_documents(documents, HELD_OUT, settings.seed)
    data, held_out = (
        PretrainingData(
            Corpus.from_documents(part, tokenizer), tokenizer, settings.masking, settings.seed
        )
        for part in parts
    )
    torch.manual_seed(settings.seed)
    model = BertForPreTraining(config)
    model.save_pretrained(folder)
    other = twin.load("BertForPreTraining", folder)
    task = InTurns(config, data, held_out, settings, twin.Trainer(other, settings))
    history = train(model, task, settings, progress=False, on_step=task.stepped)
    theirs = task.other.course
    apart = twin.agreement(task.course.losses, theirs.losses)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "baselines": history.baselines,
        "held_out_steps": [evaluation.step for evaluation in history.evaluations],
        **{
            who: {
                "held_out_mlm_loss": held_out_losses,
                "seconds": course.seconds,
                "tokens": course.tokens,
                "losses": course.losses,
                "durations": course.durations,
            }
            for who, course, held_out_losses in (
                ("bertkern", task.course, history.curve("mlm_loss")[1]),
                ("transformers", theirs, task.other_losses),
            )
        },
        "largest_difference_of_first_losses": max(apart[:TOGETHER]),
        "relative_difference_of_losses": apart,
    }


class InTurns(PretrainingTask):
    """Our pre-training, in which transformers takes each step after it.

    Attributes:
        course: our steps.
        other: transformers' model and its steps.
        other_losses: its held-out masked-LM losses, at each of our evaluations.
    """

    def __init__(
        self,
        config: BertConfig,
        data: PretrainingData,
        held_out: PretrainingData,
        settings: PretrainingSettings,
        other: twin.Trainer,
    ) -> None:
        super().__init__(config, data, held_out, settings)
        self.other, self.course, self.other_losses = other, Course(), list[float]()
        self._batch: Batch | None = None
        self._since, self._making = 0.0, 0.0

    def batches(self, epoch: int, start: int, step: int) -> Iterator[Batch]:
        """As ever; the clock of a step starts before its batch is made."""
        made = super().batches(epoch, start, step)
        while True:
            self._since = time.perf_counter()
            self._batch = next(made, None)
            self._making = time.perf_counter() - self._since
            if self._batch is None:
                return
            yield self._batch

    def stepped(self, record: StepRecord) -> None:
        """Ours took a step; now transformers takes it, as if it had made the batch, too."""
        now = time.perf_counter()
        self.course.add(record.loss, record.tokens, now - self._since)
        assert self._batch is not None
        self.other.step(self._batch, time.perf_counter() - self._making)
        if record.step % 20 == 0:
            ours, theirs = self.course, self.other.course
            progress(
                f"  step {record.step} of {self.settings.steps}: losses {ours.losses[-1]:.4f} and "
                f"{theirs.losses[-1]:.4f}, {ours.seconds:.0f} s and {theirs.seconds:.0f} s"
            )

    def evaluate(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        """As ever, and transformers' loss on the same batches, as its own forward gives it."""
        settings = self.settings
        batches = evaluation_batches(
            self.held_out, settings.tokens_per_batch, settings.evaluation_tokens
        )
        self.other_losses.append(twin.masked_lm_loss(self.other.model, batches))
        return super().evaluate(model, processes)


def verdict(found: dict[str, Any], dropout: float) -> list[str]:
    """What is wrong with the result; empty where all is well."""
    ours, theirs = found["bertkern"], found["transformers"]
    loss, other = (side["held_out_mlm_loss"][-1] for side in (ours, theirs))
    wrong = []
    if not loss <= other + CLOSE:
        wrong.append(f"held-out masked-LM loss {loss:.4f}, transformers' {other:.4f}")
    if not loss < found["baselines"]["mlm_loss"]:
        wrong.append(f"held-out masked-LM loss {loss:.4f}: no better than word frequencies")
    if not ours["seconds"] < theirs["seconds"]:
        wrong.append(f"{ours['seconds']:.0f} s, transformers {theirs['seconds']:.0f} s")
    apart = found["largest_difference_of_first_losses"]
    if dropout == 0 and not apart <= APART:
        wrong.append(f"losses of the first {TOGETHER} steps differ by {apart:.1e} of their size")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Pre-train both, write and judge."""
    parser = argparse.ArgumentParser(
        prog="python -m bertkern.benchmarks.tasks.pretraining",
        description="Pre-train a small BERT from Python's documentation, here and in transformers, "
        "from the same weights on the same batches.",
    )
    parser.add_argument("--steps", type=int, default=1000, help="updates (default: 1000)")
    parser.add_argument("--dropout", type=float, default=0.0, help="rate (default: 0)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG of the loss curves")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and masks")
    options = parser.parse_args(arguments)
    facts = provenance(torch.device("cpu"))
    settings = small_settings(options.steps, options.seed)
    progress("reading the text")
    documents = standard_library_text()
    training, _ = split_documents(documents, HELD_OUT, options.seed)
    tokenizer = train_tokenizer([s for document in training for s in document], VOCABULARY)
    config = small_config(tokenizer.get_vocab_size(), options.dropout)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(documents, tokenizer, config, settings, Path(folder))
    result = {
        "provenance": facts,
        "dropout": options.dropout,
        "config": config.to_dict(),
        "settings": asdict(settings),
        **found,
    }
    path = (options.results / file_name("pretraining", facts)).with_suffix(".json")
    write_text(path, json.dumps(result, indent=1) + "\n")
    losses = tuple(found[who]["losses"] for who in ("bertkern", "transformers"))
    name = f"{found['parameters']:,} parameters, {options.steps} steps"
    curves.draw(
        options.picture,
        f"Pre-training from the same weights\non the same batches, dropout {options.dropout:g}",
        {name: (losses[0], losses[1])},
        {name: found["relative_difference_of_losses"]},
    )
    print(f"held-out masked-LM loss, by frequency alone: {found['baselines']['mlm_loss']:.4f}")
    for who in ("bertkern", "transformers"):
        print(f"{who:14} {found[who]['held_out_mlm_loss'][-1]:.4f}  {found[who]['seconds']:5.0f} s")
    apart = found["largest_difference_of_first_losses"]
    print(f"losses of the first {TOGETHER} steps differ by at most {apart:.1e} of their size")
    print(f"-> {path}, {options.picture}")
    problems = verdict(found, options.dropout)
    print("\n".join(problems) or "as good as transformers, in less time")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
