"""Pre-trains one small BERT twice: with bertkern and with transformers, step by step in turns.

    python -m bertkern.benchmarks.tasks.pretraining OUT [--steps N]

    OUT/pretraining-<machine>-<date>.json    losses, held-out figures, seconds of each step
    OUT/pretraining.png                      both curves

The text is the English that every Python carries. Both models begin with the same weights, see the
same batches, and are updated by torch's AdamW with the same settings and without dropout: what
they compute is the same function, so their losses may differ by rounding alone, and what is
compared is time. transformers gets the batch padded to its longest sequence, with its own
attention over SDPA; making and padding the batch count in each one's time. In every step the two
run one after the other, so what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertkern.data import Corpus, MaskingSettings, PretrainingData, train_tokenizer
from bertkern.data.files import write_text
from bertkern.data.pretraining import PackedPretrainingBatch, PretrainingBatch
from bertkern.data.text import split_documents, standard_library_text
from bertkern.models import BertConfig, BertForPreTraining
from bertkern.train import History, PretrainingSettings, PretrainingTask, StepRecord, train
from bertkern.train.evaluation import evaluation_batches

from ..engines import quiet_transformers
from ..machine import file_name, progress, provenance

STEPS = 400
VOCABULARY = 8192
IGNORED = -100
SETTINGS = PretrainingSettings(
    steps=STEPS,
    tokens_per_batch=2048,
    learning_rate=1e-3,
    evaluate_every=50,
    evaluation_tokens=16384,
    checkpoint_every=STEPS,
    masking=MaskingSettings(max_length=128, max_predictions=20),
)
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class HuggingFace:
    """transformers' BertForPreTraining, trained as its users would write the loop."""

    def __init__(self, folder: Path, settings: PretrainingSettings) -> None:
        import transformers

        with quiet_transformers():
            self.model = transformers.BertForPreTraining.from_pretrained(
                folder, attn_implementation="sdpa"
            )
        self.settings, self.updates = settings, 0
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    def step(self, part: PackedPretrainingBatch) -> float:
        """One update; returns the loss."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.updates)
        self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**padded(part)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PretrainingBatch]) -> float:
        """The mean masked-LM loss over the batches' masked tokens."""
        self.model.eval()
        total = count = 0.0
        for batch in batches:
            arguments = padded(batch.part(0, len(batch)))
            labels = arguments.pop("labels")
            del arguments["next_sentence_label"]
            logits = self.model(**arguments).prediction_logits
            chosen = labels != IGNORED
            total += torch.nn.functional.cross_entropy(
                logits[chosen], labels[chosen], reduction="sum"
            ).item()
            count += int(chosen.sum())
        return total / count


def padded(part: PackedPretrainingBatch) -> dict[str, Tensor]:
    """The part as transformers takes it: [B, S], padded to its longest sequence."""
    lengths = part.cu_seqlens.diff().long()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    labels = torch.full_like(part.input_ids, IGNORED)
    labels[part.label_tokens] = part.labels

    def pad(values: Tensor, fill: int) -> Tensor:
        return torch.full(mask.shape, fill).masked_scatter(mask, values)

    return {
        "input_ids": pad(part.input_ids, 0),
        "token_type_ids": pad(part.token_type_ids, 0),
        "attention_mask": mask.long(),
        "labels": pad(labels, IGNORED),
        "next_sentence_label": part.next_sentence_label,
    }


class Comparison(PretrainingTask):
    """bertkern's pre-training, in which transformers takes each step after it.

    Attributes:
        seconds: of each step, by who took it.
        other_losses: of transformers' steps.
        held_out_losses: transformers' masked-LM losses, at each of bertkern's evaluations.
    """

    def __init__(
        self,
        config: BertConfig,
        data: PretrainingData,
        held_out: PretrainingData,
        settings: PretrainingSettings,
        other: HuggingFace,
    ) -> None:
        super().__init__(config, data, held_out, settings)
        self.other = other
        self.seconds: dict[str, list[float]] = {"bertkern": [], "transformers": []}
        self.other_losses: list[float] = []
        self.held_out_losses: list[float] = []
        self._batch: PretrainingBatch | None = None
        self._since = 0.0

    def batches(self, epoch: int, start: int, step: int) -> Any:
        """As ever; the clock of bertkern's step starts before its batch is made."""
        planned = super().batches(epoch, start, step)
        while True:
            self._since = time.perf_counter()
            self._batch = next(planned, None)  # type: ignore[assignment]
            if self._batch is None:
                return
            yield self._batch

    def stepped(self, record: StepRecord) -> None:
        """bertkern took a step; now transformers takes it."""
        self.seconds["bertkern"].append(time.perf_counter() - self._since)
        assert self._batch is not None
        start = time.perf_counter()
        self.other_losses.append(self.other.step(self._batch.part(0, len(self._batch))))
        self.seconds["transformers"].append(time.perf_counter() - start)
        if record.step % 20 == 0:
            ours, theirs = (float(np.median(s[-20:])) for s in self.seconds.values())
            progress(
                f"step {record.step} of {self.settings.steps}: loss {record.loss:.4f} and "
                f"{self.other_losses[-1]:.4f}, {ours:.2f} s and {theirs:.2f} s"
            )

    def evaluate(self, model: torch.nn.Module, processes: Any) -> dict[str, float]:
        """As ever, and transformers' loss on the same batches."""
        settings = self.settings
        batches = list(
            evaluation_batches(self.held_out, settings.tokens_per_batch, settings.evaluation_tokens)
        )
        self.held_out_losses.append(self.other.evaluate(batches))
        return super().evaluate(model, processes)


def compare(settings: PretrainingSettings) -> tuple[Comparison, History]:
    """Both runs."""
    kept, rest = split_documents(standard_library_text(), 0.05, settings.seed)
    tokenizer = train_tokenizer((s for d in kept for s in d), VOCABULARY)
    data, held_out = (
        PretrainingData(
            Corpus.from_documents(part, tokenizer), tokenizer, settings.masking, settings.seed
        )
        for part in (kept, rest)
    )
    torch.manual_seed(settings.seed)
    model = BertForPreTraining(BertConfig(vocab_size=tokenizer.get_vocab_size(), **SIZES))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = HuggingFace(Path(folder), settings)
    task = Comparison(model.config, data, held_out, settings, other)
    return task, train(model, task, settings, progress=False, on_step=task.stepped)


def result_of(task: Comparison, history: History) -> dict[str, Any]:
    """What was measured, as JSON."""
    ours = [record.loss for record in history.steps]
    differences = [abs(a - b) for a, b in zip(ours, task.other_losses, strict=True)]
    steps, held_out = history.curve("mlm_loss")
    return {
        "machine": provenance(torch.device("cpu")),
        "settings": {"steps": len(ours), "tokens_per_batch": task.settings.tokens_per_batch},
        "sizes": {**SIZES, "vocab_size": task.config.vocab_size},
        "baselines": history.baselines,
        "losses": {"bertkern": ours, "transformers": task.other_losses},
        "largest_difference": {
            "steps 1 to 20": max(differences[:20]),
            "all steps": max(differences),
        },
        "held_out_steps": steps,
        "held_out_mlm_loss": {"bertkern": held_out, "transformers": task.held_out_losses},
        "step_seconds": task.seconds,
        "median_step_seconds": {who: float(np.median(s)) for who, s in task.seconds.items()},
        "total_step_seconds": {who: float(np.sum(s)) for who, s in task.seconds.items()},
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out loss of both against the time that each needed, and against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    by_time, by_step = figure.subplots(1, 2, sharey=True)
    looks = {"bertkern": ("#c0392b", "o-"), "transformers": ("#2c6fab", "s--")}
    for who, (colour, style) in looks.items():
        spent = np.concatenate(([0.0], np.cumsum(result["step_seconds"][who])))
        losses = result["held_out_mlm_loss"][who]
        seconds = spent[result["held_out_steps"]]
        by_time.plot(seconds, losses, style, color=colour, markersize=4, label=who)
        by_step.plot(result["held_out_steps"], losses, style, color=colour, markersize=4)
    for axis, label in ((by_time, "seconds of training"), (by_step, "step")):
        axis.axhline(result["baselines"]["mlm_loss"], color="#888888", linestyle=":")
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    by_time.set_ylabel("held-out masked-word loss, nats")
    by_time.legend(frameon=False)
    by_step.text(0, result["baselines"]["mlm_loss"], "word frequency", va="bottom", color="#888888")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates ({STEPS})")
    given = parser.parse_args(arguments)
    settings = PretrainingSettings(**{**SETTINGS.__dict__, "steps": given.steps})
    result = result_of(*compare(settings))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{file_name('pretraining', result['machine'])}"
    write_text(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    draw(result, given.out / "pretraining.png")
    for name in ("largest_difference", "median_step_seconds", "total_step_seconds"):
        progress(f"{name}: {result[name]}")
    last = {who: losses[-1] for who, losses in result["held_out_mlm_loss"].items()}
    progress(f"held-out masked-word loss: {last}; word frequency {result['baselines']['mlm_loss']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
