"""Inference of whole models: BERT-mini, base and large, by every engine.

Weights are random and the same for all. FLOPs of a sequence of n tokens:
n L (8 h^2 + 4 h f + 4 n h) for L layers of hidden size h and FFN size f. Bytes: the weights of the
layers once, the rows of the embeddings that are looked up, and the hidden states out. Real tokens
only: padding is nobody's floor.

A result counts when its error against fp64 is at most ERROR_FACTOR times that of plain torch ops in
the same dtype, both as a root mean square over the real tokens.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertkern.models import BertConfig

from .attention_cases import mixed_lengths
from .engines import Engine, bertkern_engine, makers, write_random_model
from .harness import Outcome, reason, relative_error, rows_of, time_outcomes
from .limits import Limits, measure_limits
from .machine import added_bytes, progress
from .peers import Peers
from .row import Row

ERROR_FACTOR = 10.0
Emit = Callable[[Iterable[Row]], None]


@dataclass
class Run:
    """What the cases of a run share."""

    who: Peers
    limits: Limits
    facts: dict[str, Any]
    samples: int
    budget: float  # seconds that the samples of one case may take
    quick: bool
    emit: Emit


def mini(layers: int = 4) -> BertConfig:
    """BERT-mini (Turc et al. 2019)."""
    return BertConfig(
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=1024,
    )


CONFIGS = {"mini": mini, "base": BertConfig.base, "large": BertConfig.large}


@dataclass
class Batch:
    """A padded batch of random words, padding on the right."""

    ids: Tensor  # int64 [B, S]
    mask: Tensor  # int64 [B, S]
    lengths: list[int]
    shape: dict[str, int | str]
    curve: str = ""


def batch_of(
    lengths: Sequence[int], shape: dict[str, int | str] | None = None, curve: str = ""
) -> Batch:
    """Sequences of these lengths."""
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    words = torch.randint(
        1000, 30000, mask.shape, generator=torch.Generator().manual_seed(len(lengths))
    )
    if shape is None:
        spread = f"{min(lengths)}..{longest}" if min(lengths) < longest else longest
        shape = {"B": len(lengths), "S": spread}
        if min(lengths) < longest:
            shape["T"] = sum(lengths)
    return Batch(words * mask, mask, list(lengths), shape, curve)


def encoder_flops(config: BertConfig, lengths: Sequence[int]) -> float:
    """FLOPs of the layers for sequences of these lengths."""
    hidden, inner = config.hidden_size, config.intermediate_size
    per_layer = sum(n * (8 * hidden**2 + 4 * hidden * inner + 4 * n * hidden) for n in lengths)
    return float(config.num_hidden_layers * per_layer)


def layer_parameters(config: BertConfig) -> int:
    """Elements of the layers' weights, biases and norms."""
    hidden, inner = config.hidden_size, config.intermediate_size
    per_layer = 4 * hidden**2 + 2 * hidden * inner + 9 * hidden + inner
    return config.num_hidden_layers * per_layer


def encoder_bytes(config: BertConfig, tokens: int, dtype: torch.dtype) -> float:
    """Bytes that the encoder must move."""
    elements = layer_parameters(config) + 2 * tokens * config.hidden_size
    return float(elements * torch.empty((), dtype=dtype).element_size())


@contextmanager
def engines_of(
    config: BertConfig, dtype: torch.dtype, run: Run, convert: bool, compiled: bool
) -> Iterator[tuple[dict[str, Engine | str], Callable[[Batch], tuple[Tensor, Tensor]]]]:
    """Every engine of a fresh model, or why it could not be made; and the truth of a batch: real
    tokens [T, hidden] in fp64, and by plain ops in the dtype."""
    with tempfile.TemporaryDirectory(prefix="bertkern-bench-") as name:
        folder = Path(name) / "model"
        folder.mkdir()
        write_random_model(config, folder)
        made: dict[str, Engine | str] = {}
        for peer, make in makers(
            folder, Path(name) / "work", dtype, run.who, convert, compiled
        ).items():
            try:
                made[peer] = make()
            except Exception as problem:  # whatever a peer raises, the others are measured
                made[peer] = reason(problem)
        exact = bertkern_engine(folder, torch.float64, run.who.device)
        plain = bertkern_engine(folder, dtype, run.who.device, backend="reference")

        def truth(batch: Batch) -> tuple[Tensor, Tensor]:
            return tuple(  # type: ignore[return-value]
                engine(batch.ids, batch.mask).cpu()[batch.mask.bool()].double()
                for engine in (exact, plain)
            )

        yield made, truth


def root_mean_square(tensor: Tensor) -> float:
    """sqrt(mean(x^2))."""
    return float(tensor.double().square().mean().sqrt())


def check_engine(
    engine: Engine | str, batch: Batch, exact: Tensor, plain: Tensor, device: torch.device
) -> Outcome:
    """The engine bound to the batch, or what is wrong with it."""
    if isinstance(engine, str):
        return Outcome(call=lambda: None, error=engine)

    def call() -> Tensor:
        return engine(batch.ids, batch.mask)

    outcome = Outcome(call=call)
    try:
        call()
        out, outcome.peak_bytes = added_bytes(call, device)
        out = out.cpu()[batch.mask.bool()].double()
        outcome.max_error = relative_error(out, exact)
        error, allowed = root_mean_square(out - exact), root_mean_square(plain - exact)
        if not error <= ERROR_FACTOR * allowed:  # a NaN is wrong, too
            outcome.error = (
                f"wrong: rms error {error:.1e}, plain torch ops in the same dtype {allowed:.1e}"
            )
    except Exception as problem:  # whatever a peer raises, the others are measured
        outcome.error = reason(problem)
    return outcome


def infer(
    op: str,
    config: BertConfig,
    dtype: torch.dtype,
    engines: dict[str, Engine | str],
    truth: Callable[[Batch], tuple[Tensor, Tensor]],
    batch: Batch,
    run: Run,
) -> None:
    """Check and time every engine on one batch."""
    progress(f"  {op} {' '.join(f'{k}={v}' for k, v in batch.shape.items())}")
    exact, plain = truth(batch)
    device = run.who.device
    outcomes = {
        name: check_engine(engine, batch, exact, plain, device) for name, engine in engines.items()
    }
    time_outcomes(outcomes, device, run.samples, run.budget)
    tokens = sum(batch.lengths)
    common = {
        "suite": "models",
        "op": op,
        "direction": "forward",
        "shape": batch.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "flops": encoder_flops(config, batch.lengths),
        "bytes": encoder_bytes(config, tokens, dtype),
        "items": float(tokens),
        "unit": "tokens",
        "curve": batch.curve,
        "provenance": run.facts,
    }
    run.emit(rows_of(outcomes, run.limits, common))


def batches_of(name: str, device: torch.device, quick: bool) -> list[Batch]:
    """The batches of one size of model: full ones, mixed lengths, and the curves of the small."""
    if device.type == "cuda":
        return _gpu_batches(name, quick)
    if name == "large":
        return [batch_of([128])]
    if name == "base":
        return [batch_of([128] * 2), batch_of([32])]
    batches = [batch_of([128] * 8), batch_of(mixed_lengths(8, 256))]
    if not quick:
        batches += [batch_of([n] * 8, {"B": 8, "S": n}, "S") for n in (32, 512)]
        batches += [batch_of([32] * n, {"B": n, "S": 32}, "B") for n in (1, 64)]
    return batches


def _gpu_batches(name: str, quick: bool) -> list[Batch]:
    if quick:
        if name == "mini":
            return [batch_of([128] * 32)]
        return [batch_of([128] * 32), batch_of([384] * 32), batch_of(mixed_lengths(64, 512))]
    batches = [batch_of([n] * 32, {"B": 32, "S": n}, "S") for n in (32, 64, 128, 384, 512)]
    batches += [batch_of([128] * n, {"B": n, "S": 128}, "B") for n in (1, 2, 8, 64, 256)]
    return [*batches, batch_of(mixed_lengths(16, 512)), batch_of(mixed_lengths(128, 512))]


def inference(run: Run, dtypes: Sequence[torch.dtype], only: str) -> None:
    """Every case whose name contains `only`."""
    device, quick = run.who.device, run.quick
    for name, make_config in CONFIGS.items():
        op = f"bert-{name}"
        if only not in op or (quick and name != "mini" and device.type == "cpu"):
            continue
        config = make_config()
        for dtype in dtypes:
            progress(f"{op}, {dtype}: making the engines")
            # On a CPU a large model is converted, and a base model compiled, for minutes.
            convert = name != "large"
            compiled = device.type == "cuda" or name == "mini"
            with engines_of(config, dtype, run, convert, compiled) as (engines, truth):
                for batch in batches_of(name, device, quick):
                    infer(op, config, dtype, engines, truth, batch, run)
    if not quick and only in "bert-mini":
        scaling(run, dtypes[0])


def scaling(run: Run, dtype: torch.dtype) -> None:
    """Time against the number of layers and, on a CPU, of threads."""
    for layers in (1, 2, 8):
        config = mini(layers)
        with engines_of(config, dtype, run, convert=False, compiled=False) as (engines, truth):
            batch = batch_of([128] * 2, {"B": 2, "S": 128, "L": layers}, "L")
            infer("bert-mini", config, dtype, engines, truth, batch, run)
    if run.who.device.type != "cpu":
        return
    threads = torch.get_num_threads()
    facts, limits = run.facts, run.limits
    names = tuple(run.limits.rates)
    try:
        for count in sorted({1, 2, 4, 8, 16, threads} & set(range(1, threads + 1))):
            torch.set_num_threads(count)
            run.facts = {**facts, "threads": count}
            torch_names = tuple(name for name in names if hasattr(torch, name) and "float" in name)
            run.limits = measure_limits(run.who.device, torch_names, run.facts, quick=True)
            run.emit(run.limits.rows)
            with engines_of(mini(), dtype, run, convert=False, compiled=False) as (engines, truth):
                batch = batch_of([128] * 2, {"B": 2, "S": 128, "threads": count}, "threads")
                infer("bert-mini", mini(), dtype, engines, truth, batch, run)
    finally:
        torch.set_num_threads(threads)
        run.facts, run.limits = facts, limits
