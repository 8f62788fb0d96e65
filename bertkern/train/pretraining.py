"""Pre-training of BERT with masked tokens and next sentences (Devlin et al. 2018), from text.

    loss = masked-LM cross-entropy + next-sentence cross-entropy
    AdamW (β 0.9, 0.999; eps 1e-6; decay 0.01, none on biases and LayerNorm) or LAMB, gradient norm
    clipped at 1, learning rate with linear warm-up and linear decay to 0

`pretrain` goes from documents to a folder that `BertForPreTraining.from_pretrained` and
transformers read. For example:

    result = pretrain(
        read_documents(files),  # or standard_library_text(), or a Corpus larger than memory
        "out",
        config=BertConfig(...),
        settings=PretrainingSettings(steps=1000),
    )
    result.history.evaluations[-1].figures["mlm_loss"] < result.history.baselines["mlm_loss"]

A run is a function of (documents, config, settings). Ctrl-C and SIGTERM end it after the step at
hand with a checkpoint and raise TrainingInterrupted, whose message says how to go on; a run
resumed with `resume=True` ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor, nn

from bertkern.data.corpus import Corpus
from bertkern.data.files import write_text
from bertkern.data.packing import Batch, PackedBatch
from bertkern.data.pretraining import MaskingSettings, PretrainingData
from bertkern.data.text import Document, split_documents
from bertkern.data.tokenizer import SpecialIds, load_tokenizer, save_tokenizer, train_tokenizer
from bertkern.models.bert import BertForPreTraining, BertForPreTrainingOutput
from bertkern.models.checkpoint import WEIGHTS
from bertkern.models.config import BertConfig

from .checkpoint import read_state, save_model
from .evaluation import evaluate, frequency_baselines
from .flops import bert_training_flops
from .history import History, StepRecord
from .loop import (
    BEST,
    CHECKPOINT,
    HISTORY,
    WEIGHTS_OF_STEP,
    Task,
    own_random_state,
    train,
)
from .processes import Processes
from .resuming import finished_step, refuse_another_run, seen_by_all
from .settings import LoopSettings

_MEANINGS = {"train": "other text", "held_out": "another held-out part (--held-out)"}


@dataclass(frozen=True)
class PretrainingSettings(LoopSettings):
    """How to pre-train.

    Attributes:
        tokens_per_batch: most tokens of a step, of all processes together.
        evaluation_tokens: at most about so many held-out tokens are used.
        masking: how examples are made.
        long_length: tokens of a sequence in the last part of the run (BERT: 128, then 512); None
            for masking.max_length throughout.
        long_fraction: that part of the steps.
    """

    tokens_per_batch: int = 4096
    evaluation_tokens: int = 65536
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    long_length: int | None = None
    long_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluation_tokens < 1:
            raise ValueError(f"evaluation_tokens must be at least 1, not {self.evaluation_tokens}")
        if not 0 <= self.long_fraction <= 1:
            raise ValueError(f"long_fraction must be in 0..1, not {self.long_fraction}")
        if self.tokens_per_batch < self.longest:
            raise ValueError(
                f"tokens_per_batch = {self.tokens_per_batch} is less than a sequence of "
                f"{self.longest} tokens"
            )

    @property
    def longest(self) -> int:
        """The most tokens of a sequence in the whole run."""
        return max(self.masking.max_length, self.long_length or 0)

    @property
    def short_steps(self) -> int:
        """Steps with sequences of masking.max_length, the first ones."""
        return self.steps - (round(self.long_fraction * self.steps) if self.long_length else 0)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> PretrainingSettings:
        """The inverse of dataclasses.asdict, also after JSON."""
        return super().from_dict({**entries, "masking": MaskingSettings(**entries["masking"])})


@dataclass
class PretrainingResult:
    """What `pretrain` made; the same is in the folder `out`.

    Attributes:
        finished_before: the run that was to be resumed had ended; nothing was computed or written.
    """

    model: BertForPreTraining
    tokenizer: Tokenizer
    history: History
    out: Path
    finished_before: bool = False


class PretrainingTask(Task):
    """Masked tokens and next sentences of a corpus.

    Args:
        config: of the model.
        data, held_out: what to train on, what to evaluate on.
        settings: how to train.
    """

    description = "pre-training"
    metric = "mlm_loss"
    higher_is_better = False

    def __init__(
        self,
        config: BertConfig,
        data: PretrainingData,
        held_out: PretrainingData,
        settings: PretrainingSettings,
    ) -> None:
        self.config, self.data, self.held_out, self.settings = config, data, held_out, settings

    def batches(self, epoch: int, start: int, step: int) -> Iterator[Batch]:
        """Short sequences until settings.short_steps updates are done, then long ones."""
        settings = self.settings
        budget = settings.tokens_per_batch
        left = settings.short_steps - step - start
        if step < settings.short_steps:
            return islice(self.data.batches(epoch, budget, start), left) if left else iter(())
        return self.data.batches(epoch, budget, start, settings.long_length)

    def label_counts(self, part: PackedBatch) -> dict[str, int]:
        """Masked tokens and sentence pairs."""
        return {"mlm": part.predictions, "nsp": part.sequences}  # type: ignore[attr-defined]

    def losses(self, output: BertForPreTrainingOutput) -> dict[str, Tensor]:
        """The two losses that BERT minimises the sum of."""
        assert output.masked_lm_loss is not None
        assert output.next_sentence_loss is not None
        return {"mlm": output.masked_lm_loss, "nsp": output.next_sentence_loss}

    def evaluate(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        """As `evaluate`, on the held-out text."""
        assert isinstance(model, BertForPreTraining)
        settings = self.settings
        return evaluate(
            model, self.held_out, settings.tokens_per_batch, settings.evaluation_tokens, processes
        )

    def baselines(self) -> dict[str, float]:
        """Of one who knows only frequencies."""
        settings = self.settings
        return frequency_baselines(
            self.data, self.held_out, settings.tokens_per_batch, settings.evaluation_tokens
        )

    def describe(self) -> dict[str, Any]:
        """Digests of the tokenised text."""
        return {"train": self.data.corpus.fingerprint, "held_out": self.held_out.corpus.fingerprint}

    def flops(self, batch: Batch) -> float:
        """Of the layers, and of the head at the share of tokens that is masked."""
        predictions = round(self.settings.masking.masked_fraction * int(batch.lengths.sum()))
        return bert_training_flops(self.config, batch.lengths, predictions)


def pretrain(
    text: Sequence[Document] | Corpus,
    out: str | os.PathLike[str],
    *,
    config: BertConfig | None = None,
    start: str | os.PathLike[str] | None = None,
    vocab_size: int = 30522,
    tokenizer: Tokenizer | None = None,
    settings: PretrainingSettings | None = None,
    held_out: float = 0.05,
    device: str | torch.device = "cpu",
    workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    console: Console | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> PretrainingResult:
    """Pre-train a BERT from text; save it, its tokenizer, history and checkpoint in a folder.

    Started by `torchrun` or `accelerate launch`, all processes call it and train one model.

    Args:
        text: documents, lists of sentences, held in memory; or a Corpus, which needs `tokenizer`.
        out: the folder, made if need be.
        config: sizes; its vocab_size is replaced by the tokenizer's. None for BERT-base.
        start: a folder with a BERT (and, for documents, its tokenizer) to go on from, in place of
            random weights and `config`.
        vocab_size: of the tokenizer that is learned from the training part; fewer if the text is
            small.
        tokenizer: use this one and learn none.
        settings: how to train. A resumed run must repeat those that it was started with, and its
            config, or give None.
        held_out: part of the documents that is not trained on.
        device: where to compute.
        workers: processes that make examples ahead; 0 makes them in this one.
        resume: go on from out's checkpoint; a run that has ended is read and left as it is.
        overwrite: start anew although out holds a checkpoint or a model, which are removed.
        tensorboard: write curves to out's `tensorboard`, too.
        progress: show a progress bar, on `console`.
        on_step: called with every record of the history.

    Raises:
        ValueError: too little text, or a resumed run with other text or settings.
        FileExistsError: out holds a checkpoint or a model; neither resume nor overwrite is given.
        FileNotFoundError: resume, but no checkpoint, or one that not all processes see.
        TrainingInterrupted: Ctrl-C or SIGTERM; the checkpoint is written.
    """
    out = Path(out)
    processes = Processes(device)
    old = []
    if resume:
        checkpoint = existing_checkpoint(out, processes)
        tokenizer = load_tokenizer(out)
        settings, config = _resumed_settings(
            checkpoint, settings, config if start is None else None
        )
    else:
        old = runs_files(out)
        if not overwrite:
            refuse_to_overwrite(out)
    refuse_to_replace_the_start(out, start)
    settings = settings or PretrainingSettings()
    if start is not None and tokenizer is None:
        tokenizer = load_tokenizer(start)
    train_corpus, held_out_corpus, tokenizer = _corpora(
        text, tokenizer, vocab_size, held_out, settings.seed
    )
    data, held_out_data = (
        PretrainingData(corpus, tokenizer, settings.masking, settings.seed, workers=count)
        for corpus, count in ((train_corpus, workers), (held_out_corpus, 0))
    )
    with own_random_state(processes.device):
        torch.manual_seed(settings.seed)
        model = _model(start, config, tokenizer, resume)
    if settings.longest > model.config.max_position_embeddings:
        raise ValueError(
            f"max_length = {settings.longest} exceeds max_position_embeddings = "
            f"{model.config.max_position_embeddings}"
        )
    task = PretrainingTask(model.config, data, held_out_data, settings)
    if resume:
        refuse_another_run(out / CHECKPOINT, {"data": task.describe()}, _MEANINGS)
        if finished_step(out / CHECKPOINT, out / HISTORY) is not None:
            history = History.from_dict(json.loads((out / HISTORY).read_text(encoding="utf-8")))
            model = BertForPreTraining.from_pretrained(out).to(processes.device)
            return PretrainingResult(model, tokenizer, history, out, finished_before=True)
    model = model.to(processes.device)
    processes.wait()  # before the first one removes what the others looked for
    if processes.is_main and not resume:
        for path in old:
            path.unlink()
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
        write_text(out / HISTORY, history.to_json())
    return PretrainingResult(model, tokenizer, history, out)


def runs_files(folder: Path) -> list[Path]:
    """Files of an earlier run, which a new one would replace."""
    names = (CHECKPOINT, BEST, WEIGHTS, HISTORY)
    found = [folder / name for name in names if (folder / name).exists()]
    return [*found, *sorted(folder.glob(WEIGHTS_OF_STEP.format("*")))]


def refuse_to_replace_the_start(folder: Path, start: str | os.PathLike[str] | None) -> None:
    """Raise ValueError where a run would remove the weights that it begins with."""
    if start is not None and Path(start).resolve() == folder.resolve():
        raise ValueError(f"out = {folder} holds the weights to begin with: choose another folder")


def existing_checkpoint(folder: Path, processes: Processes | None = None) -> Path:
    """The checkpoint that a folder holds; all processes of a run call it.

    Raises:
        FileNotFoundError: it holds none, or not for all processes.
    """
    seen_by_all(folder / CHECKPOINT, processes or Processes())
    if not (folder / CHECKPOINT).is_file():
        raise FileNotFoundError(f"{folder / CHECKPOINT}: no checkpoint to resume from")
    return folder / CHECKPOINT


def refuse_to_overwrite(folder: Path) -> None:
    """Raise FileExistsError where the folder holds an earlier run's checkpoint or model."""
    if old := runs_files(folder):
        raise FileExistsError(
            f"{old[0]} exists: resume that run (--resume), choose another "
            "folder (--out), or allow overwriting (--overwrite)"
        )


def _corpora(
    text: Sequence[Document] | Corpus,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    held_out: float,
    seed: int,
) -> tuple[Corpus, Corpus, Tokenizer]:
    """What to train on, what to hold out, and the tokenizer, learned if none is given."""
    if isinstance(text, Corpus):
        if tokenizer is None:
            raise ValueError("a Corpus needs the tokenizer that it was made with")
        train_part, held_out_part = text.split(held_out, seed)
        return train_part, held_out_part, tokenizer
    train_documents, held_out_documents = split_documents(text, held_out, seed)
    if tokenizer is None:
        tokenizer = train_tokenizer((s for d in train_documents for s in d), vocab_size)
    return (
        Corpus.from_documents(train_documents, tokenizer),
        Corpus.from_documents(held_out_documents, tokenizer),
        tokenizer,
    )


def _model(
    start: str | os.PathLike[str] | None,
    config: BertConfig | None,
    tokenizer: Tokenizer,
    resume: bool,
) -> BertForPreTraining:
    """The model that the run begins with."""
    size = tokenizer.get_vocab_size()
    if start is not None and not resume:
        model = BertForPreTraining.from_pretrained(start, torch.float32, new_head=True)
        if model.config.vocab_size < size:
            raise ValueError(
                f"{start} has a vocabulary of {model.config.vocab_size}, the tokenizer {size}"
            )
        return model
    if not resume:
        entries = {**(config or BertConfig.base()).to_dict(), "vocab_size": size}
        entries["pad_token_id"] = SpecialIds.of(tokenizer).pad
        config = BertConfig.from_dict(entries)
    assert config is not None
    return BertForPreTraining(config)


def _resumed_settings(
    checkpoint: Path, settings: PretrainingSettings | None, config: BertConfig | None
) -> tuple[PretrainingSettings, BertConfig]:
    """What the interrupted run was started with; settings and config are that, or None."""
    if settings is not None:
        refuse_another_run(checkpoint, {"settings": asdict(settings)})
    if config is not None:
        sizes = config.to_dict()
        for name in ("vocab_size", "pad_token_id"):  # the tokenizer's
            del sizes[name]
        refuse_another_run(checkpoint, {"config": sizes})
    run = read_state(checkpoint).run
    return PretrainingSettings.from_dict(run["settings"]), BertConfig.from_dict(run["config"])
