"""One training step of BERT's pre-training model: masked words and next sentence, forward, backward
and AdamW, with dropout 0.1.

Before a step is timed, its loss and its gradients' norm and direction are compared with fp64,
dropout off.

FLOPs: three times the forward's (layers as in model_cases.py; the head, P predictions of
2 h^2 + 2 h V, by the tokens that have a label). Bytes: each weight read forward and backward, its
gradient written; AdamW reads weight, gradient and two moments and writes three.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertkern.models import BertConfig, BertForPreTraining

from .attention_cases import mixed_lengths
from .engines import quiet_transformers
from .harness import Outcome, reason, rows_of, time_outcomes
from .machine import added_bytes, progress
from .model_cases import CONFIGS, Batch, Run, batch_of, encoder_flops
from .row import Row

LABELLED = 0.15
IGNORED = -100
ERROR_FACTOR = 10.0
# Relative, a hundred roundings of float32: the yardstick, plain torch's error of one number, may
# happen to be 0.
LEAST_ERROR = 1e-5
ADAMW = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
WEIGHT_MOVES = 2 + 1 + 4 + 3

Loss = Callable[[], Tensor]


@dataclass
class Labels:
    """What a batch is to predict."""

    words: Tensor  # int64 [B, S], IGNORED where there is none
    next_sentence: Tensor  # int64 [B]


def labels_of(batch: Batch) -> Labels:
    """15 % of the real tokens, evenly spread."""
    index = torch.arange(batch.ids.numel()).reshape(batch.ids.shape)
    chosen = (index % round(1 / LABELLED) == 0) & batch.mask.bool()
    words = torch.where(chosen, batch.ids, IGNORED)
    return Labels(words, torch.arange(len(batch.lengths)) % 2)


def own_model(folder: Path, device: torch.device) -> nn.Module:
    """Ours."""
    return BertForPreTraining.from_pretrained(folder).to(device)


def hugging_face_model(folder: Path, device: torch.device, attention: str) -> nn.Module:
    """transformers' BertForPreTraining."""
    import transformers

    import bertkern.integrations.transformers  # noqa: F401  registers "bertkern"

    with quiet_transformers():
        return transformers.BertForPreTraining.from_pretrained(
            folder, attn_implementation=attention
        ).to(device)


def loss_of(model: Any, batch: Batch, labels: Labels, device: torch.device) -> Loss:
    """The model's loss of the batch; both kinds of model name their arguments alike."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": labels.words}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    next_sentence = labels.next_sentence.to(device)

    def loss() -> Tensor:
        return model(**inputs, next_sentence_label=next_sentence).loss

    return loss


PROBES = ("loss", "gradient norm", "gradient's direction")


def probes(model: nn.Module, loss: Loss) -> tuple[float, ...]:
    """The loss; the norm of all gradients; and their inner product with a fixed function of each
    weight, over the norms, which is the same however a model groups its weights into tensors."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    sums = torch.zeros(3, dtype=torch.float64, device=value.device)
    for p in model.parameters():
        if p.grad is not None:
            gradient = p.grad.double()
            direction = torch.sin(50.0 * p.detach().double())
            sums += torch.stack(
                [(a * b).sum() for a, b in ((gradient, gradient), (gradient, direction))]
                + [direction.square().sum()]
            )
    model.zero_grad(set_to_none=True)
    norm = float(sums[0].sqrt())
    return float(value.detach()), norm, float(sums[1]) / (norm * float(sums[2].sqrt()))


def errors_of(found: Sequence[float], exact: Sequence[float]) -> list[float]:
    """Relative of loss and norm; absolute of the direction, which is a cosine."""
    loss, norm, cosine = (abs(f - e) for f, e in zip(found, exact, strict=True))
    return [loss / abs(exact[0]), norm / exact[1], cosine]


def step_of(
    model: nn.Module, loss: Loss, dtype: torch.dtype, device: torch.device, parts: int
) -> Callable[[], None]:
    """One optimizer step over `parts` times the batch, mixed precision where the dtype is short."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    mixed = dtype != torch.float32

    def step() -> None:
        for _ in range(parts):
            with torch.autocast(device.type, dtype=dtype, enabled=mixed):
                value = loss()
            (value / parts).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def check_step(
    make: Callable[[], nn.Module],
    compiled: bool,
    batch: Batch,
    dtype: torch.dtype,
    run: Run,
    exact: Sequence[float],
    plain: Sequence[float],
    parts: int,
) -> Outcome:
    """A model's step ready to be timed, or what is wrong with it."""
    device, labels = run.who.device, labels_of(batch)
    outcome = Outcome(call=lambda: None, note="checked with dropout off")
    try:
        model = make()
        function = torch.compile(model, dynamic=False) if compiled else model
        loss = loss_of(function, batch, labels, device)
        model.eval()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            found = probes(model, loss)
        errors, allowed = errors_of(found, exact), errors_of(plain, exact)
        outcome.max_error = max(errors)
        for name, error, yardstick in zip(PROBES, errors, allowed, strict=True):
            if not error <= ERROR_FACTOR * yardstick + LEAST_ERROR:
                outcome.error = f"wrong: {name} off by {error:.1e}, plain torch by {yardstick:.1e}"
        model.train()
        outcome.call = step_of(model, loss, dtype, device, parts)
        outcome.call()
        _, outcome.peak_bytes = added_bytes(outcome.call, device)
    except Exception as problem:  # whatever a peer raises, the others are measured
        outcome.error = outcome.error or reason(problem)
    return outcome


def train(
    op: str, config: BertConfig, dtype: torch.dtype, batch: Batch, run: Run, compiled: bool = False
) -> list[Row]:
    """Check and time every model on one batch; `compiled`: torch.compile, too."""
    import bertkern

    device = run.who.device
    tokens = sum(batch.lengths)
    # One optimizer step for at most 65,536 tokens; on a CPU for one batch.
    parts = max(1, 65536 // batch.ids.numel()) if device.type == "cuda" and not run.quick else 1
    with tempfile.TemporaryDirectory(prefix="bertkern-bench-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        BertForPreTraining(config).save_pretrained(folder)
        labels = labels_of(batch)
        model = own_model(folder, device).eval()
        mixed = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        with mixed, bertkern.backend("reference"):
            plain = probes(model, loss_of(model, batch, labels, device))
        model = model.double()
        exact = probes(model, loss_of(model, batch, labels, device))
        del model

        who: dict[str, tuple[Callable[[], nn.Module], bool]] = {
            "bertkern": (lambda: own_model(folder, device), False)
        }
        if "transformers" in run.who:
            few = device.type == "cpu" and op == "bert-base"  # a step takes seconds
            for attention in ("sdpa",) if few else ("eager", "sdpa", "bertkern"):
                shown = f"transformers {attention}"
                if attention == "bertkern":
                    shown = "bertkern in transformers"
                who[shown] = (lambda a=attention: hugging_face_model(folder, device, a), False)  # type: ignore[misc]
            if "compile" in run.who and compiled:
                who["transformers compiled"] = (
                    lambda: hugging_face_model(folder, device, "sdpa"),
                    True,
                )
        outcomes = {
            peer: check_step(make, compiled, batch, dtype, run, exact, plain, parts)
            for peer, (make, compiled) in who.items()
        }
        time_outcomes(outcomes, device, run.samples, run.budget)
        parameters = sum(p.numel() for p in own_model(folder, torch.device("cpu")).parameters())
    predictions = int((labels.words != IGNORED).sum())
    head = predictions * (2 * config.hidden_size**2 + 2 * config.hidden_size * config.vocab_size)
    common = {
        "suite": "training",
        "op": op,
        "direction": "step",
        "shape": batch.shape if parts == 1 else {**batch.shape, "accumulated": parts},
        "dtype": str(dtype).removeprefix("torch."),
        "flops": 3.0 * parts * (encoder_flops(config, batch.lengths) + head),
        "bytes": float(WEIGHT_MOVES * parameters * 4),
        "items": float(tokens * parts),
        "unit": "tokens",
        "provenance": run.facts,
    }
    return rows_of(outcomes, run.limits, common)


def batches_of(name: str, device: torch.device, quick: bool) -> list[Batch]:
    """S = 128 and 512, and mixed lengths."""
    if device.type == "cuda":
        batches = [batch_of([128] * 128), batch_of(mixed_lengths(64, 512))]
        return batches if quick else [*batches, batch_of([512] * 32)]
    if name == "mini":
        full = batch_of([128] * 4)
        return [full] if quick else [full, batch_of([512]), batch_of(mixed_lengths(4, 128))]
    return [batch_of([128] * 2)]


def training(run: Run, dtypes: Sequence[torch.dtype], only: str) -> None:
    """Every case whose name contains `only`."""
    device = run.who.device
    names = ("mini", "base") if device.type == "cpu" else ("base", "large")
    for name in names[:1] if run.quick else names:
        op = f"bert-{name}"
        if only not in op:
            continue
        for dtype in dtypes:
            for batch in batches_of(name, device, run.quick):
                progress(f"  {op} training {dtype} {batch.shape}")
                compiled = device.type == "cuda"  # a CPU would compile for a minute or two
                run.emit(train(op, CONFIGS[name](), dtype, batch, run, compiled))
