"""Pre-training of BERT with masked tokens and next sentences (Devlin et al. 2018), from raw text.

    loss = masked-LM cross-entropy + next-sentence cross-entropy
    AdamW (β 0.9, 0.999; eps 1e-6; decay 0.01, none on biases and LayerNorm), gradient norm clipped
    at 1, learning rate with linear warm-up and linear decay to 0

`pretrain_from_text` goes from documents to a folder that `BertForPreTraining.from_pretrained` and
transformers read; `train` is the loop alone; `steps_in` plans a run by time. For example:

    result = pretrain_from_text(
        read_documents(files),  # or standard_library_text()
        "out",
        config=BertConfig(...),
        settings=PretrainingSettings(steps=1000),
    )
    result.history.held_out[-1].mlm_loss < result.history.unigram_loss

A run is a function of (documents, config, settings). Ctrl-C and SIGTERM end it after the step at
hand with a checkpoint and raise TrainingInterrupted, whose message says how to go on; a run
resumed with `resume=True` ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from bertkern.data.files import write_text
from bertkern.data.pretraining import MaskingSettings, PackedBatch, PretrainingData
from bertkern.data.text import Document, split_documents
from bertkern.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from bertkern.models.bert import BertForPreTraining
from bertkern.models.checkpoint import WEIGHTS
from bertkern.models.config import BertConfig

from .checkpoint import TrainingState, load_checkpoint, read_state, save_checkpoint
from .evaluation import evaluate, unigram_loss
from .history import History, StepRecord
from .interruption import Interruption, TrainingInterrupted
from .progress import TrainingProgress

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.json"
RECORD_EVERY = 10  # steps between two looks at the losses, each of which waits for a GPU


@dataclass(frozen=True)
class PretrainingSettings:
    """How to train.

    Attributes:
        steps: updates of the weights.
        tokens_per_batch: most tokens of a batch.
        learning_rate: its peak.
        warmup_fraction: part of the steps in which the rate rises from 0.
        weight_decay, max_gradient_norm, betas, eps: of AdamW and of clipping.
        evaluate_every: steps between evaluations on the held-out text; there is one before the
            first step and one after the last in any case.
        evaluation_tokens: at most about so many held-out tokens are used.
        checkpoint_every: steps between checkpoints.
        bfloat16: compute matrix products in bfloat16 (autocast); weights stay float32.
        seed: of weights, data and dropout.
        masking: how examples are made.
    """

    steps: int = 1000
    tokens_per_batch: int = 4096
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    evaluate_every: int = 100
    evaluation_tokens: int = 65536
    checkpoint_every: int = 200
    bfloat16: bool = False
    seed: int = 0
    masking: MaskingSettings = field(default_factory=MaskingSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "checkpoint_every", "evaluation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must be in 0..1, not {self.warmup_fraction}")
        if self.tokens_per_batch < self.masking.max_length:
            raise ValueError(
                f"tokens_per_batch = {self.tokens_per_batch} is less than max_length = "
                f"{self.masking.max_length}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        warmup = round(self.warmup_fraction * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (self.steps - step) / max(self.steps - warmup, 1)

    @classmethod
    def from_dict(cls, entries: dict) -> PretrainingSettings:
        """The inverse of dataclasses.asdict, also after JSON."""
        entries = dict(entries)
        entries["betas"] = tuple(entries["betas"])
        entries["masking"] = MaskingSettings(**entries["masking"])
        return cls(**entries)


@dataclass
class PretrainingResult:
    """What pretrain_from_text made; the same is in the folder `out`."""

    model: BertForPreTraining
    tokenizer: Tokenizer
    history: History
    out: Path


def pretrain_from_text(
    documents: Sequence[Document],
    out: str | os.PathLike[str],
    *,
    config: BertConfig | None = None,
    vocab_size: int = 30522,
    tokenizer: Tokenizer | None = None,
    settings: PretrainingSettings | None = None,
    held_out: float = 0.05,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    console: Console | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> PretrainingResult:
    """Pre-train a BERT from text; save it, its tokenizer, history and checkpoint in a folder.

    Args:
        documents: lists of sentences, from `bertkern.data`.
        out: the folder, made if need be.
        config: sizes; its vocab_size is replaced by the tokenizer's. None for BERT-base.
        vocab_size: of the tokenizer that is learned from the training part; fewer if the text is
            small.
        tokenizer: use this one and learn none.
        settings: how to train. A resumed run must repeat those that it was started with, or give
            None.
        held_out: part of the documents that is not trained on.
        device: where to compute.
        resume: go on from out's checkpoint.
        overwrite: start anew although out holds a checkpoint or a model, which are removed.
        progress: show a progress bar, on `console`.
        on_step: called with the record of every step.

    Raises:
        ValueError: too little text, or a resumed run with other text or settings.
        FileExistsError: out holds a checkpoint or a model; neither resume nor overwrite is given.
        FileNotFoundError: resume, but no checkpoint.
        TrainingInterrupted: Ctrl-C or SIGTERM; the checkpoint is written.
    """
    out = Path(out)
    checkpoint = out / CHECKPOINT
    if resume:
        if not checkpoint.is_file():
            raise FileNotFoundError(f"{checkpoint}: no checkpoint to resume from")
        tokenizer = load_tokenizer(out)
        settings, config = _resumed_settings(checkpoint, settings, config)
    else:
        old = [out / name for name in (CHECKPOINT, WEIGHTS, HISTORY) if (out / name).exists()]
        if old and not overwrite:
            raise FileExistsError(
                f"{old[0]} exists: resume that run, choose another folder, or allow overwriting"
            )
    settings = settings or PretrainingSettings()
    train_documents, held_out_documents = split_documents(documents, held_out, settings.seed)
    if tokenizer is None:
        tokenizer = train_tokenizer((s for d in train_documents for s in d), vocab_size)
    data = PretrainingData(train_documents, tokenizer, settings.masking, settings.seed)
    held_out_data = PretrainingData(held_out_documents, tokenizer, settings.masking, settings.seed)
    config = config or BertConfig.base()
    entries = {**config.to_dict(), "vocab_size": tokenizer.get_vocab_size()}
    config = BertConfig.from_dict({**entries, "pad_token_id": data.special.pad})
    if settings.masking.max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length = {settings.masking.max_length} exceeds max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    with _own_random_state(device):
        torch.manual_seed(settings.seed)
        model = BertForPreTraining(config).to(device)
        if not resume:
            for path in old:
                path.unlink()
            save_tokenizer(tokenizer, out)
        history = train(
            model,
            data,
            held_out_data,
            settings,
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
            console=console,
            on_step=on_step,
        )
    model.eval().save_pretrained(out)
    write_text(out / HISTORY, history.to_json())
    return PretrainingResult(model, tokenizer, history, out)


def train(
    model: BertForPreTraining,
    data: PretrainingData,
    held_out: PretrainingData,
    settings: PretrainingSettings,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    console: Console | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> History:
    """The training loop: updates `model` in place, on the device where it is.

    Draws dropout from torch's global generators; seed them for a run that can be repeated.

    Args:
        model: to be trained; with resume, its weights are replaced by the checkpoint's.
        data, held_out: what to train on, what to evaluate on.
        settings: how to train.
        checkpoint: a file to which the whole state is written; None for no checkpoints.
        resume: go on from `checkpoint`.
        progress, console, on_step: as in pretrain_from_text.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM.
        FloatingPointError: the loss is no longer finite; the last checkpoint is from before.
        ValueError: the checkpoint is damaged, or of another run.
    """
    device = model.bert.embeddings.word.weight.device
    optimizer = make_optimizer(model, settings)
    run = {
        "settings": asdict(settings),
        "config": model.config.to_dict(),
        "data": fingerprint(data),
    }
    tokens_per_batch, evaluation_tokens = settings.tokens_per_batch, settings.evaluation_tokens
    baseline = unigram_loss(data, held_out, tokens_per_batch, evaluation_tokens)
    state = TrainingState(run=run, history=History(unigram_loss=baseline))
    if resume:
        assert checkpoint is not None, "there is nothing to resume from without a checkpoint"
        state = load_checkpoint(checkpoint, model, optimizer, run)
    history = state.history
    pending: list[tuple[StepRecord, Tensor, Tensor]] = []

    def record() -> None:
        """Read the losses of the last steps from the device."""
        for step_record, mlm_loss, nsp_loss in pending:
            step_record.mlm_loss, step_record.nsp_loss = mlm_loss.item(), nsp_loss.item()
            if not math.isfinite(step_record.mlm_loss + step_record.nsp_loss):
                raise FloatingPointError(
                    f"the loss of step {step_record.step} is not finite; a lower learning_rate "
                    f"({settings.learning_rate}) may help"
                )
            history.steps.append(step_record)
            if on_step is not None:
                on_step(step_record)
        pending.clear()

    def save() -> None:
        record()
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, optimizer, state)

    def assess() -> None:
        record()
        result = evaluate(model, held_out, tokens_per_batch, evaluation_tokens)
        result.step = state.step
        history.held_out.append(result)
        bar.evaluated(result)

    bar = TrainingProgress(settings.steps, state.step, progress, console)
    with bar, Interruption() as interruption:
        if state.step == 0 and not history.held_out:
            assess()
        for batch in _batches_from(data, tokens_per_batch, state):
            if state.step >= settings.steps:
                break
            start = time.perf_counter()
            model.train()
            rate = settings.rate(state.step)
            mlm_loss, nsp_loss = training_step(model, optimizer, batch, rate, settings)
            state.step += 1
            tokens = len(batch.input_ids)
            pending.append((StepRecord(state.step, tokens, rate), mlm_loss, nsp_loss))
            last = state.step == settings.steps
            if len(pending) == RECORD_EVERY or device.type == "cpu" or last:
                record()
            bar.stepped(tokens, time.perf_counter() - start, history)
            if state.step % settings.evaluate_every == 0 or last:
                assess()
            if state.step % settings.checkpoint_every == 0 or last or interruption.asked:
                save()
            if interruption.asked and not last:
                raise TrainingInterrupted(state.step, settings.steps, checkpoint)
    return history


def training_step(
    model: BertForPreTraining,
    optimizer: torch.optim.Optimizer,
    batch: PackedBatch,
    rate: float,
    settings: PretrainingSettings,
) -> tuple[Tensor, Tensor]:
    """One update; returns the masked-LM and the next-sentence loss, still on the device."""
    device = model.bert.embeddings.word.weight.device
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
        output = model(**batch.arguments(device))
    assert output.loss is not None
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
    optimizer.step()
    assert output.masked_lm_loss is not None
    assert output.next_sentence_loss is not None
    return output.masked_lm_loss.detach(), output.next_sentence_loss.detach()


def make_optimizer(model: torch.nn.Module, settings: PretrainingSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and LayerNorms, vectors, have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def steps_in(
    seconds: float,
    config: BertConfig,
    settings: PretrainingSettings,
    device: str | torch.device = "cpu",
) -> int:
    """How many training steps this machine makes in a time, measured on a few random batches."""
    rng = np.random.default_rng(0)
    length = settings.masking.max_length
    count = settings.tokens_per_batch // length
    tokens = torch.from_numpy(rng.integers(0, config.vocab_size, count * length))
    places = torch.from_numpy(
        np.flatnonzero(rng.random(count * length) < settings.masking.masked_fraction)
    )
    batch = PackedBatch(
        input_ids=tokens,
        token_type_ids=torch.zeros_like(tokens),
        position_ids=torch.arange(length).repeat(count),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * length,
        max_seqlen=length,
        labels=tokens[places],
        label_tokens=places,
        next_sentence_label=torch.zeros(count, dtype=torch.int64),
    )
    with _own_random_state(device):
        model = BertForPreTraining(config).to(device).train()
        optimizer = make_optimizer(model, settings)
        times = []
        for _ in range(5):  # the first ones warm up; the last one tells
            start = time.perf_counter()
            loss, _ = training_step(model, optimizer, batch, 0.0, settings)
            loss.item()
            times.append(time.perf_counter() - start)
    return max(1, round(seconds / min(times[1:])))


def fingerprint(data: PretrainingData) -> str:
    """A digest of the tokenised text, by which a resumed run recognises its data."""
    digest = hashlib.sha256()
    for document in data.documents:
        digest.update(len(document).to_bytes(8, "little"))
        for sentence in document:
            digest.update(sentence.astype("<i8").tobytes())
    return digest.hexdigest()


def _batches_from(
    data: PretrainingData, tokens_per_batch: int, state: TrainingState
) -> Iterator[PackedBatch]:
    """Batches without end, from where the state stands; it moves on as they are taken."""
    while True:
        epoch, batches = data.batches(state.epoch, tokens_per_batch)
        while state.batch < len(batches):
            batch = epoch.pack(batches[state.batch])
            state.batch += 1
            yield batch
        state.epoch, state.batch = state.epoch + 1, 0


def _resumed_settings(
    checkpoint: Path, settings: PretrainingSettings | None, config: BertConfig | None
) -> tuple[PretrainingSettings, BertConfig]:
    """What the interrupted run was started with."""
    run = read_state(checkpoint).run
    started = PretrainingSettings.from_dict(run["settings"])
    if settings is not None and settings != started:
        changed = [
            f"{name} = {value!r}, not {getattr(settings, name)!r}"
            for name, value in started.__dict__.items()
            if value != getattr(settings, name)
        ]
        raise ValueError(f"{checkpoint} belongs to a run with other settings: {'; '.join(changed)}")
    return started, BertConfig.from_dict(run["config"])


def _own_random_state(device: str | torch.device) -> AbstractContextManager[None]:
    """A block whose random numbers leave torch's global generators as they were."""
    device = torch.device(device)
    cuda_devices = []
    if device.type == "cuda":
        cuda_devices = [torch.cuda.current_device() if device.index is None else device.index]
    return torch.random.fork_rng(devices=cuda_devices)
