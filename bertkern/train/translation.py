"""Training of a Transformer for translation (Vaswani et al. 2017, section 5).

    loss = cross-entropy of the target's tokens, smoothed by 0.1
    Adam (β 0.9, 0.98; eps 1e-9); at step t the rate is (d · w)^-0.5 · min(t / w, √(w / t)), with d
    the hidden size and w = 4000 steps of warm-up; batches by tokens; at the end the mean of the
    weights at the last checkpoints

`train_translation` goes from pairs of texts to a folder that `Translate.from_pretrained` reads. For
example:

    pairs = read_parallel(["messages.de.po"])
    train, test = hold_out([pair.source for pair in pairs], 0.05)
    result = train_translation(
        [pairs[i] for i in train], [pairs[i] for i in test], "en-de", config=TransformerConfig(...)
    )
    result.history.evaluations[-1].figures["bleu"] > result.history.baselines["bleu"]

A run is a function of (pairs, config, settings). Ctrl-C and SIGTERM end it after the step at hand
with a checkpoint; a run resumed with `resume=True` ends with the same bits as one that was never
interrupted.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor, nn

from bertkern.data.files import write_text
from bertkern.data.packing import Batch, PackedBatch
from bertkern.data.parallel_text import Pair
from bertkern.data.tokenizer import (
    SpecialIds,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_digest,
)
from bertkern.data.translation import TranslationData
from bertkern.models.transformer import Transformer, TransformerOutput
from bertkern.models.transformer_config import TransformerConfig
from bertkern.models.translate import Translate

from .checkpoint import read_state, save_model
from .curves import CURVES, check_matplotlib, draw_curves
from .flops import transformer_training_flops
from .history import History, StepRecord
from .loop import HISTORY, WEIGHTS_OF_STEP, Task, own_random_state, train
from .pretraining import existing_checkpoint, refuse_to_overwrite, runs_files
from .processes import Processes
from .resuming import finished_step, refuse_another_run
from .settings import LoopSettings, noam_peak
from .translation_scores import check_sacrebleu, translation_scores

if TYPE_CHECKING:
    from bertkern.models.word_vectors import WordVectors

_EVALUATED_TOKENS = 8192  # at once: evaluation holds the logits, [tokens, vocabulary]
_MEANINGS = {"train": "other training pairs", "held_out": "other held-out pairs"}


@dataclass(frozen=True)
class TranslationSettings(LoopSettings):
    """How to train, by default as the paper's base model (hidden size 512).

    Attributes:
        learning_rate: its peak; `noam_peak` gives that of other sizes and warm-ups.
        tokens_per_batch: most tokens of a step, source and target, of all processes together.
        max_length: pairs with more tokens on a side are not trained on.
        evaluation_pairs: at most so many held-out pairs are translated at an evaluation.
    """

    steps: int = 100_000
    learning_rate: float = noam_peak(512, 4000)
    schedule: str = "noam"
    warmup_steps: int | None = 4000
    weight_decay: float = 0.0
    max_gradient_norm: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    evaluate_every: int = 1000
    evaluate_first: bool = False
    checkpoint_every: int = 1000
    average: int = 5
    tokens_per_batch: int = 50_000
    max_length: int = 256
    evaluation_pairs: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("tokens_per_batch", 4), ("max_length", 2), ("evaluation_pairs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass
class TranslationResult:
    """What `train_translation` made; the same is in the folder `out`.

    Attributes:
        model: with several processes and FSDP2, what this one holds of it; `out` has it whole.
        left_out: training and held-out pairs that were longer than settings.max_length.
        finished_before: the run that was to be resumed had ended; nothing was computed or written.
    """

    model: Transformer
    tokenizer: Tokenizer
    history: History
    left_out: tuple[int, int]
    out: Path
    finished_before: bool = False


class TranslationTask(Task):
    """Targets, given their sources.

    Args:
        config: of the model.
        data, held_out: what to train on, what to evaluate on.
        settings: how to train.

    Attributes:
        judged: the held-out pairs that evaluations translate, drawn at random.
    """

    description = "translation"
    metric = "bleu"
    higher_is_better = True

    def __init__(
        self,
        config: TransformerConfig,
        data: TranslationData,
        held_out: TranslationData,
        settings: TranslationSettings,
    ) -> None:
        self.config, self.data, self.held_out, self.settings = config, data, held_out, settings
        order = np.random.default_rng(settings.seed).permutation(len(held_out))
        self.judged = [held_out.pairs[i] for i in sorted(order[: settings.evaluation_pairs])]
        self._tokens = min(settings.tokens_per_batch, _EVALUATED_TOKENS)

    def batches(self, epoch: int, start: int, step: int) -> Iterator[Batch]:
        """Pairs of like length together, in an order of the epoch's own."""
        return self.data.batches(epoch, self.settings.tokens_per_batch, start)

    def label_counts(self, part: PackedBatch) -> dict[str, int]:
        """Target tokens, the end among them."""
        return {"translation": part.targets}  # type: ignore[attr-defined]

    def losses(self, output: TransformerOutput) -> dict[str, Tensor]:
        """The smoothed cross-entropy."""
        assert output.loss is not None
        return {"translation": output.loss}

    def evaluate(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        """Cross-entropy (nats for a token, not smoothed) and accuracy, and BLEU and chrF of greedy
        translations."""
        assert isinstance(model, Transformer)
        figures = self._next_token_figures(model, processes)
        translate = Translate(model, self.held_out.tokenizer, self.settings.max_length)
        chosen = range(processes.index, len(self.judged), processes.count)
        texts = [t.text for t in translate([self.judged[i].source for i in chosen], beam_size=1)]
        found = dict(processes.gather(list(zip(chosen, texts, strict=True))))
        translations = [found[i] for i in range(len(self.judged))]
        scores = translation_scores(translations, [pair.target for pair in self.judged])
        return {**figures, **scores}

    @torch.no_grad()
    def _next_token_figures(self, model: Transformer, processes: Processes) -> dict[str, float]:
        device = model.embedding.weight.device
        sums = torch.zeros(3, device=device, dtype=torch.float64)
        for batch in self.held_out.batches(0, self._tokens):
            part, counts = processes.part_of(batch)
            arguments = part.arguments(device)
            output = model(**arguments, return_logits=True)
            if counts:
                labels: Tensor = arguments["labels"]
                sums[0] += output.loss * len(labels)
                sums[1] += (output.logits.argmax(1) == labels).sum()
                sums[2] += len(labels)
        loss, right, count = processes.total(sums).tolist()
        return {"loss": loss / max(count, 1), "accuracy": right / max(count, 1)}

    def baselines(self) -> dict[str, float]:
        """BLEU and chrF of the sources as they are; cross-entropy and accuracy of one who knows
        only how frequent the target's tokens are."""
        counts: Counter[int] = Counter()
        for batch in self.data.batches(0, self._tokens):
            counts.update(_labels(batch))
        total = sum(counts.values()) + self.config.vocab_size  # one added to every count
        most_frequent = max(counts, key=lambda token: (counts[token], -token))
        loss, right, held_out = 0.0, 0, 0
        for batch in self.held_out.batches(0, self._tokens):
            for token in _labels(batch):
                loss -= math.log((counts[token] + 1) / total)
                right += token == most_frequent
                held_out += 1
        copied = translation_scores(
            [pair.source for pair in self.judged], [pair.target for pair in self.judged]
        )
        return {"loss": loss / max(held_out, 1), "accuracy": right / max(held_out, 1), **copied}

    def describe(self) -> dict[str, Any]:
        """Digests of the tokenised pairs."""
        return {"train": self.data.fingerprint, "held_out": self.held_out.fingerprint}

    def flops(self, batch: Batch) -> float:
        """Of the layers and the prediction of every target token."""
        return transformer_training_flops(
            self.config,
            batch.source_lengths,  # type: ignore[attr-defined]
            batch.target_lengths,  # type: ignore[attr-defined]
        )


def _labels(batch: Batch) -> list[int]:
    """The target tokens of a whole batch, ends among them."""
    return batch.part(0, len(batch)).arguments()["labels"].tolist()


def train_translation(
    train_pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    out: str | os.PathLike[str],
    *,
    config: TransformerConfig | None = None,
    vocab_size: int = 37000,
    tokenizer: Tokenizer | None = None,
    start_vectors: WordVectors | None = None,
    settings: TranslationSettings | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    console: Console | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TranslationResult:
    """Train; write model, tokenizer, history, curves and checkpoints to a folder.

    Started by `torchrun` or `accelerate launch`, all processes call it and train one model.

    Args:
        train_pairs, held_out: what to train on, what to evaluate on.
        out: the folder, made if need be.
        config: sizes; vocabulary and special tokens become the tokenizer's. None: the paper's base.
        vocab_size: of the byte-level BPE that both languages share, learned from the training
            pairs; fewer if the text is small.
        tokenizer: use this one and learn none.
        start_vectors: word vectors that embeddings of tokens which are words start from.
        settings: how to train. A resumed run must repeat those that it was started with, its
            config and its tokenizer, or give None; it looks at neither vocab_size nor
            start_vectors.
        device: where to compute.
        resume: go on from out's checkpoint; a run that has ended is read and left as it is.
        overwrite: start anew although out holds a checkpoint or a model, which are removed.
        tensorboard: write curves to out's `tensorboard`, too.
        progress: show a progress bar, on `console`.
        on_step: called with every record of the history.

    Raises:
        ValueError: no pairs, none that is short enough, start_vectors of which no word is a token,
            or a resumed run with other pairs, sizes or settings.
        FileExistsError: out holds a checkpoint or a model; neither resume nor overwrite is given.
        FileNotFoundError: resume, but no checkpoint, or one that not all processes see.
        ModuleNotFoundError: sacrebleu or matplotlib is not installed.
        TrainingInterrupted: Ctrl-C or SIGTERM; the checkpoint is written.
    """
    out = Path(out)
    processes = Processes(device)
    check_sacrebleu()
    check_matplotlib()
    if resume:
        checkpoint = existing_checkpoint(out, processes)
        own = load_tokenizer(out)
        if tokenizer is not None and vocabulary_digest(tokenizer) != vocabulary_digest(own):
            raise ValueError(f"{out} belongs to a run with another tokenizer: repeat that, or none")
        tokenizer = own
        settings, config = _resumed_settings(checkpoint, settings, config)
    elif not overwrite:
        refuse_to_overwrite(out)
    settings = settings or TranslationSettings()
    for name, pairs in (("train_pairs", train_pairs), ("held_out", held_out)):
        if not pairs:
            raise ValueError(f"{name} is empty: there is nothing to train or to evaluate on")
    if tokenizer is None:
        tokenizer = _learned_tokenizer(train_pairs, vocab_size, processes)
    data, held_out_data = (
        TranslationData(pairs, tokenizer, settings.max_length, settings.seed)
        for pairs in (train_pairs, held_out)
    )
    for name, part in (("train_pairs", data), ("held_out", held_out_data)):
        if not len(part):
            raise ValueError(f"no pair of {name} has at most max_length = {settings.max_length}")
    if not resume:
        config = _with_vocabulary(config or TransformerConfig.base(), tokenizer)
    assert config is not None
    left_out = (data.left_out, held_out_data.left_out)
    task = TranslationTask(config, data, held_out_data, settings)
    if resume:
        refuse_another_run(checkpoint, {"data": task.describe()}, _MEANINGS)
        if finished_step(checkpoint, out / HISTORY) is not None:
            history = History.from_dict(json.loads((out / HISTORY).read_text(encoding="utf-8")))
            model = Transformer.from_pretrained(out).to(processes.device)
            return TranslationResult(model, tokenizer, history, left_out, out, True)
    with own_random_state(processes.device):
        torch.manual_seed(settings.seed)
        model = Transformer(config)
    if start_vectors is not None and not resume:
        _start_embedding(model, start_vectors, tokenizer, settings.seed)
    model = model.to(processes.device)
    processes.wait()  # before the first one removes what the others looked for
    if processes.is_main and not resume:
        for path in [*runs_files(out), out / CURVES]:
            path.unlink(missing_ok=True)
        save_tokenizer(tokenizer, out)
    history = train(
        model,
        task,
        settings,
        processes,
        folder=out,
        resume=resume,
        tensorboard=tensorboard,
        progress=progress,
        console=console,
        on_step=on_step,
    )
    save_model(model, out, processes)
    if processes.is_main:
        draw_curves(history, task.metric, task.higher_is_better, out / CURVES)
        write_text(out / HISTORY, history.to_json())  # last: it says that the run has ended
        for path in out.glob(WEIGHTS_OF_STEP.format("*")):  # their mean is the model
            path.unlink()
    return TranslationResult(model, tokenizer, history, left_out, out)


def _learned_tokenizer(pairs: Sequence[Pair], vocab_size: int, processes: Processes) -> Tokenizer:
    """A byte-level BPE of both sides, learned in the first process."""
    learned = []
    if processes.is_main:
        texts = [text for pair in pairs for text in (pair.source, pair.target)]
        learned = [train_tokenizer(texts, vocab_size, lowercase=False, kind="bpe").to_str()]
    return Tokenizer.from_str(processes.gather(learned)[0])


def _with_vocabulary(config: TransformerConfig, tokenizer: Tokenizer) -> TransformerConfig:
    special = SpecialIds.of(tokenizer)
    return config.with_changes(
        vocab_size=tokenizer.get_vocab_size(),
        pad_token_id=special.pad,
        bos_token_id=special.cls,
        eos_token_id=special.sep,
    )


@torch.no_grad()
def _start_embedding(
    model: Transformer, vectors: WordVectors, tokenizer: Tokenizer, seed: int
) -> None:
    """Rows of tokens that are words of the vectors begin as these; the others are drawn as ever."""
    weight = model.embedding.weight
    generator = torch.Generator().manual_seed(seed)
    table, found = vectors.table_for(tokenizer, weight.shape[1], generator)
    if not found:
        raise ValueError(
            f"start_vectors: none of their {len(vectors):,} words is a token of the vocabulary of "
            f"{tokenizer.get_vocab_size():,}"
        )
    weight.copy_(table)


def _resumed_settings(
    checkpoint: Path, settings: TranslationSettings | None, config: TransformerConfig | None
) -> tuple[TranslationSettings, TransformerConfig]:
    """What the interrupted run was started with; settings and config are that, or None."""
    if settings is not None:
        refuse_another_run(checkpoint, {"settings": asdict(settings)})
    if config is not None:
        sizes = config.to_dict()
        for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
            del sizes[name]  # the tokenizer's
        refuse_another_run(checkpoint, {"config": sizes})
    run = read_state(checkpoint).run
    return TranslationSettings.from_dict(run["settings"]), TransformerConfig.from_dict(
        run["config"]
    )
