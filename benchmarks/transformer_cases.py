"""One training step of the Transformer (Vaswani et al. 2017): forward, backward and AdamW, on pairs
of mixed lengths, with dropout 0.1 and label smoothing 0.1. decoding_cases.py has its decoding.

Ours takes the pairs packed, the others padded. Before a step is timed, its loss and its gradients
are compared with fp64, dropout off, as in training_cases.py.

FLOPs of the forward, causal attention with its (m + 1)/2 keys a token:

    encoder    n L (8 h^2 + 4 h f + 4 n h)
    decoder    m L (12 h^2 + 4 h f + 2 (m + 1) h + 4 n h) + n L 4 h^2
    prediction m 2 h V

and three times their sum for a step. Bytes as in training_cases.py.

Legend: n source and m target tokens of a pair, L layers of each stack, h hidden size, f FFN size,
V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertkern.models import Transformer, TransformerConfig

from .attention_cases import mixed_lengths
from .harness import Outcome, reason, rows_of, time_outcomes
from .machine import added_bytes, progress
from .model_cases import Run
from .peers import without_warnings
from .row import Row
from .training_cases import (
    ERROR_FACTOR,
    LEAST_ERROR,
    PROBES,
    WEIGHT_MOVES,
    Loss,
    errors_of,
    probes,
    step_of,
)
from .transformer_peers import (
    MARIAN_EPS,
    TorchTransformer,
    marian_of,
    own_transformer,
)

DROPOUT, SMOOTHING, IGNORED = 0.1, 0.1, -100
Shape = dict[str, int | str]


def mini(**changes: Any) -> TransformerConfig:
    """A small one for CPUs."""
    sizes: dict[str, Any] = {
        "vocab_size": 8000,
        "hidden_size": 256,
        "num_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    return TransformerConfig(**{**sizes, **changes})


CONFIGS = {"mini": mini, "base": TransformerConfig.base, "big": TransformerConfig.big}


def config_of(name: str) -> TransformerConfig:
    """The sizes, with the rates of all peers."""
    return CONFIGS[name](dropout=DROPOUT, label_smoothing=SMOOTHING, layer_norm_eps=MARIAN_EPS)


def sizes_of(device: torch.device, quick: bool) -> tuple[str, ...]:
    """The models that are timed on a device."""
    names = ("mini", "base") if device.type == "cpu" else ("base", "big")
    return names[:1] if quick else names


@dataclass
class Texts:
    """A batch of random ids, padding on the right."""

    ids: Tensor  # int64 [B, S]
    mask: Tensor  # bool [B, S]
    lengths: list[int]

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return min(self.lengths) == self.ids.shape[1]

    def packed(self, side: str, device: torch.device) -> dict[str, Any]:
        """As Transformer takes it."""
        cu_seqlens = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int()
        return {
            f"{side}_ids": self.ids[self.mask].to(device),
            f"{side}_cu_seqlens": cu_seqlens.to(device),
            f"{side}_max_seqlen": max(self.lengths),
        }


def texts_of(lengths: Sequence[int], config: TransformerConfig, seed: int) -> Texts:
    """Texts of these lengths, without tokens that have a meaning."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    first = 1 + max(config.pad_token_id, config.bos_token_id, config.eos_token_id)
    words = torch.randint(first, config.vocab_size, mask.shape, generator=generator)
    return Texts(words.where(mask, config.pad_token_id), mask, list(lengths))


def spread(lengths: Sequence[int]) -> int | str:
    """13..64, or 64."""
    return f"{min(lengths)}..{max(lengths)}" if min(lengths) < max(lengths) else max(lengths)


def encoder_flops(config: TransformerConfig, sources: Sequence[int]) -> float:
    """FLOPs of the encoder."""
    hidden, inner = config.hidden_size, config.intermediate_size
    per_layer = sum(n * (8 * hidden**2 + 4 * hidden * inner + 4 * n * hidden) for n in sources)
    return float(config.num_layers * per_layer)


def decoder_flops(
    config: TransformerConfig, sources: Sequence[int], targets: Sequence[int]
) -> float:
    """FLOPs of the decoder and the prediction."""
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = sum(
        m * (12 * hidden**2 + 4 * hidden * inner + 2 * (m + 1) * hidden + 4 * n * hidden)
        + n * 4 * hidden**2
        for n, m in zip(sources, targets, strict=True)
    )
    return float(config.num_layers * layers + 2 * hidden * config.vocab_size * sum(targets))


@dataclass
class Pairs:
    """Sources, targets that begin with bos, and the token to predict at each."""

    source: Texts
    target: Texts
    labels: Tensor  # int64 [B, T], IGNORED at padding
    shape: Shape

    @property
    def tokens(self) -> int:
        """Of both sides."""
        return sum(self.source.lengths) + sum(self.target.lengths)


def pairs_of(sources: Sequence[int], targets: Sequence[int], config: TransformerConfig) -> Pairs:
    """Pairs of these lengths."""
    source, target = texts_of(sources, config, 1), texts_of(targets, config, 2)
    labels = target.ids.masked_fill(~target.mask, IGNORED)
    target.ids = F.pad(target.ids, (1, 0), value=config.bos_token_id)[:, :-1]
    shape: Shape = {"B": len(sources), "S": spread(sources), "T": spread(targets)}
    pairs = Pairs(source, target, labels, shape)
    shape["tokens"] = pairs.tokens
    return pairs


# A dropout rate -> a model in training mode, and its loss.
Way = Callable[[float], tuple[nn.Module, Loss]]


def own_way(model: Transformer, pairs: Pairs, device: torch.device, dropout: float) -> Any:
    """Ours, packed."""
    own = own_transformer(model, dropout).to(device)
    inputs = {**pairs.source.packed("source", device), **pairs.target.packed("target", device)}
    labels = pairs.labels[pairs.target.mask].to(device)

    def loss() -> Tensor:
        value = own(**inputs, labels=labels).loss
        assert value is not None
        return value

    return own, loss


def logits_way(
    make: Callable[[Transformer, float], nn.Module],
    call: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor],
    compiled: bool,
    model: Transformer,
    pairs: Pairs,
    device: torch.device,
    dropout: float,
) -> Any:
    """A peer that gives logits of padded texts.

    Args:
        call: (model, source ids, target ids, source mask or None where it is full) -> logits.
    """
    peer = make(model, dropout).to(device)
    function = torch.compile(peer, dynamic=False) if compiled else peer
    source, target = pairs.source.ids.to(device), pairs.target.ids.to(device)
    mask = None if pairs.source.full else pairs.source.mask.to(device)
    labels = pairs.labels.to(device).flatten()

    def loss() -> Tensor:
        logits = call(function, source, target, mask)
        return F.cross_entropy(
            logits.flatten(0, 1), labels, ignore_index=IGNORED, label_smoothing=SMOOTHING
        )

    return peer, loss


def _torch_logits(peer: Any, source: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    return peer(source, target, None if mask is None else ~mask)


def _marian_logits(peer: Any, source: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    mask = None if mask is None else mask.long()
    return peer(
        input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False
    ).logits


def training_ways(model: Transformer, pairs: Pairs, run: Run, compiled: bool) -> dict[str, Way]:
    """Everyone who trains, by name."""
    device, about = run.who.device, (model, pairs, run.who.device)

    def marian(attention: str) -> Callable[[Transformer, float], nn.Module]:
        return lambda model, dropout: marian_of(model, attention, dropout)

    ways: dict[str, Way] = {"bertkern": functools.partial(own_way, model, pairs, device)}
    if "eager" in run.who:
        ways["torch nn.Transformer"] = functools.partial(
            logits_way, TorchTransformer, _torch_logits, False, *about
        )
    if "transformers" in run.who:
        for attention in ("eager", "sdpa"):
            ways[f"transformers {attention}"] = functools.partial(
                logits_way, marian(attention), _marian_logits, False, *about
            )
    if compiled and "compile" in run.who:
        if "eager" in run.who:
            ways["torch nn.Transformer compiled"] = functools.partial(
                logits_way, TorchTransformer, _torch_logits, True, *about
            )
        if "transformers" in run.who:
            ways["transformers compiled"] = functools.partial(
                logits_way, marian("sdpa"), _marian_logits, True, *about
            )
    return ways


def check_step(
    way: Way,
    dtype: torch.dtype,
    device: torch.device,
    exact: Sequence[float],
    plain: Sequence[float],
    parts: int,
) -> Outcome:
    """A step ready to be timed, or what is wrong with it."""
    outcome = Outcome(call=lambda: None, note="checked with dropout off")
    try:
        with without_warnings():
            model, loss = way(0.0)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                found = probes(model, loss)
            errors, allowed = errors_of(found, exact), errors_of(plain, exact)
            outcome.max_error = max(errors)
            for name, error, yardstick in zip(PROBES, errors, allowed, strict=True):
                if not error <= ERROR_FACTOR * yardstick + LEAST_ERROR:
                    outcome.error = (
                        f"wrong: {name} off by {error:.1e}, plain torch by {yardstick:.1e}"
                    )
            model, loss = way(DROPOUT)
            outcome.call = step_of(model, loss, dtype, device, parts)
            outcome.call()
            _, outcome.peak_bytes = added_bytes(outcome.call, device)
    except Exception as problem:  # whatever a peer raises, the others are measured
        outcome.error = outcome.error or reason(problem)
    return outcome


def train(
    op: str, config: TransformerConfig, dtype: torch.dtype, pairs: Pairs, run: Run, compiled: bool
) -> list[Row]:
    """Check and time every way on one batch; `compiled`: torch.compile, too."""
    import bertkern

    device = run.who.device
    parts = max(1, 65536 // pairs.tokens) if device.type == "cuda" and not run.quick else 1
    torch.manual_seed(0)
    model = Transformer(config)
    ways = training_ways(model, pairs, run, compiled)
    mixed = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with mixed, bertkern.backend("reference"):
        plain = probes(*ways["bertkern"](0.0))
    own, loss = ways["bertkern"](0.0)
    exact = probes(own.double(), loss)
    del own, loss
    outcomes = {
        peer: check_step(way, dtype, device, exact, plain, parts) for peer, way in ways.items()
    }
    time_outcomes(outcomes, device, run.samples, run.budget)
    lengths = pairs.source.lengths, pairs.target.lengths
    flops = encoder_flops(config, lengths[0]) + decoder_flops(config, *lengths)
    common = {
        "suite": "training",
        "op": op,
        "direction": "step",
        "shape": pairs.shape if parts == 1 else {**pairs.shape, "accumulated": parts},
        "dtype": str(dtype).removeprefix("torch."),
        "flops": 3.0 * parts * flops,
        "bytes": float(WEIGHT_MOVES * 4 * sum(p.numel() for p in model.parameters())),
        "items": float(pairs.tokens * parts),
        "unit": "tokens",
        "provenance": run.facts,
    }
    return rows_of(outcomes, run.limits, common)


def training_lengths(name: str, device: torch.device, quick: bool) -> list[tuple[list[int], ...]]:
    """Lengths of sources and of targets: mixed, and on a GPU all alike."""
    if device.type == "cuda":
        mixed = mixed_lengths(256, 128), mixed_lengths(256, 112)
        return [mixed] if quick else [mixed, ([64] * 256, [64] * 256)]
    count = 8 if name == "mini" else 4
    return [(mixed_lengths(count, 64), mixed_lengths(count, 56))]


def transformer_training(run: Run, dtypes: Sequence[torch.dtype], only: str) -> None:
    """Every training case whose name contains `only`."""
    device = run.who.device
    for name in sizes_of(device, run.quick):
        op = f"transformer-{name}"
        if only not in op:
            continue
        config = config_of(name)
        for dtype in dtypes:
            for number, lengths in enumerate(training_lengths(name, device, run.quick)):
                pairs = pairs_of(*lengths, config)
                progress(f"  {op} training {dtype} {pairs.shape}")
                # on a CPU for one shape of the small model: it compiles for minutes
                compiled = device.type == "cuda" or (name == "mini" and number == 0)
                run.emit(train(op, config, dtype, pairs, run, compiled))
