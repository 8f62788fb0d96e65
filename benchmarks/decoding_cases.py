"""Decoding of the Transformer: NEW tokens for each source, the encoder's work included, greedily or
with a beam. The end token is never taken, so that everyone computes as much.

A result counts when its tokens are the search's. Near-ties may fall either way, so it is not the
tokens that are held to fp64 but what they are worth there: for greedy, how far each token's logit
is below the best one (at most ERROR_FACTOR times the error of a logit by plain ops); for a beam,
how far each text's log-probability is from that of the search in fp64 (for NEAR of the texts: a
near-tie may change a whole beam).

FLOPs are those of one forward over the same tokens, the decoder's for each beam. Bytes are the
encoder's weights once and, for every new token, all the decoder's weights, the embedding that
predicts, and the keys and values so far, the source's once for all its beams. A step needs the one
before, so the floor is the sum of the steps' floors.

Legend: B sources, V vocabulary.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertkern.models import Transformer, TransformerConfig

from .attention_cases import mixed_lengths
from .harness import Outcome, reason, rows_of, time_outcomes
from .limits import Limits
from .machine import added_bytes, progress
from .model_cases import Run
from .peers import without_warnings
from .row import Row, quantile
from .training_cases import ERROR_FACTOR, LEAST_ERROR
from .transformer_cases import Shape, Texts, config_of, encoder_flops, sizes_of, spread, texts_of
from .transformer_peers import ctranslate2_of, marian_of, own_transformer

NEW = 32
NEAR = 0.75
BEAM = 4

Search = Callable[[], Tensor]  # -> int64 [B, NEW]


def decoding_costs(
    config: TransformerConfig, sources: Sequence[int], beams: int, dtype: torch.dtype
) -> list[tuple[float, float]]:
    """(FLOPs, bytes) of the encoder, and of each of NEW steps."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    rows, size = len(sources) * beams, torch.empty((), dtype=dtype).element_size()
    network = 2 * hidden * inner + inner + hidden
    encoder = layers * (4 * hidden**2 + 4 * hidden + network + 4 * hidden)
    keys = layers * (2 * hidden**2 + 2 * hidden)  # the projections of the source: used once
    step = layers * (6 * hidden**2 + 6 * hidden + network + 6 * hidden) + config.vocab_size * hidden
    source_keys = layers * 2 * hidden * sum(sources)
    key_flops = 4.0 * layers * hidden**2 * sum(sources)
    costs = [(encoder_flops(config, sources) + key_flops, float((encoder + keys) * size))]
    matrices = layers * (12 * hidden**2 + 4 * hidden * inner) + 2 * hidden * config.vocab_size
    for length in range(1, NEW + 1):
        attended = layers * 4 * hidden * (beams * sum(sources) + rows * length)
        own_keys = layers * 2 * hidden * length * rows
        costs.append(
            (float(rows * matrices + attended), float((step + source_keys + own_keys) * size))
        )
    return costs


def floor_of(limits: Limits, costs: Sequence[tuple[float, float]], dtype: str) -> float | None:
    """Seconds of parts that run one after the other; None without a rate for the dtype."""
    floors = [limits.floor(moved, flops, dtype) for flops, moved in costs]
    return sum(f for f in floors if f is not None) if None not in floors else None


def decoding_model(config: TransformerConfig) -> Transformer:
    """Random weights whose texts are not one token over and over: attention is sharp, sublayers add
    little to a token, and the last LayerNorm has signs, so that a token does not predict itself. In
    evaluation mode.

    The tokens that nobody may produce are improbable, too: some leave them out of the softmax, some
    take them away behind it, and a beam would differ.
    """
    torch.manual_seed(0)
    model = Transformer(config).eval()
    signs = torch.randint(0, 2, (config.hidden_size,)) * 2.0 - 1.0
    away = F.normalize(torch.randn(config.hidden_size), dim=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("qkv.weight", "query.weight")):
                parameter[: config.hidden_size] *= 8.0
            elif name.endswith("down.weight"):
                parameter *= 0.25
            elif name.startswith("decoder") and name.endswith("output.weight"):
                parameter *= 0.5
        last: Any = model.decoder[-1]
        last.feed_forward_norm.weight *= signs
        last.feed_forward_norm.bias += 4.0 * away
        model.embedding.weight[never_of(config)] = -10.0 * away  # a logit of about -40
    return model


def never_of(config: TransformerConfig) -> list[int]:
    """What nobody may produce."""
    return [config.pad_token_id, config.bos_token_id, config.eos_token_id]


def own_search(model: Transformer, source: Texts, beams: int, device: torch.device) -> Search:
    """Ours."""
    inputs = source.packed("source", device)

    def search() -> Tensor:
        found = model.generate(
            **inputs, beam_size=beams, max_length=NEW, never=[model.config.eos_token_id]
        )
        return torch.tensor([hypotheses[0].ids for hypotheses in found])

    return search


def marian_search(
    model: Transformer, source: Texts, beams: int, dtype: torch.dtype, device: torch.device
) -> Search:
    """transformers' MarianMTModel."""
    marian = marian_of(model).eval().to(dtype).to(device)
    ids, mask = source.ids.to(device), source.mask.long().to(device)

    def search() -> Tensor:
        with torch.inference_mode(), without_warnings():
            found = marian.generate(
                input_ids=ids,
                attention_mask=mask,
                num_beams=beams,
                do_sample=False,
                use_cache=True,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                suppress_tokens=never_of(model.config),
            )
        return found[:, 1:]

    return search


def ctranslate2_search(
    model: Transformer, source: Texts, beams: int, dtype: torch.dtype, device: torch.device
) -> Search:
    """CTranslate2's Translator; it speaks in words, of which each is one token."""
    with tempfile.TemporaryDirectory(prefix="bertkern-bench-") as name:
        translator, vocabulary = ctranslate2_of(model, Path(name) / "model", dtype, device)
    number = {word: index for index, word in enumerate(vocabulary)}
    texts = [
        [vocabulary[i] for i in ids[:length]]
        for ids, length in zip(source.ids.tolist(), source.lengths, strict=True)
    ]
    never = [[vocabulary[i]] for i in never_of(model.config)]

    def search() -> Tensor:
        found = translator.translate_batch(
            texts,
            beam_size=beams,
            min_decoding_length=NEW,
            max_decoding_length=NEW,
            suppress_sequences=never,
        )
        return torch.tensor([[number[word] for word in text.hypotheses[0]] for text in found])

    return search


class Judge:
    """What found tokens are worth, in fp64.

    Args:
        model: float32, on the host.
        dtype: of the searches that are judged.
    """

    def __init__(
        self,
        model: Transformer,
        source: Texts,
        beams: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        import bertkern

        self.source, self.beams, self.device = source, beams, device
        self.exact = own_transformer(model, 0.0).eval().double().to(device)
        plain = own_transformer(model, 0.0).eval().to(dtype).to(device)
        best = own_search(self.exact, source, beams, device)().to(device)
        logits = self._logits(self.exact, best)
        with bertkern.backend("reference"):
            rough = self._logits(plain, best)
        self.best = _log_p(logits, best)
        if beams == 1:
            possible = logits.isfinite()
            self.allowed = float((rough - logits)[possible].abs().max())
            self.scale = float(logits[possible].abs().max())
        else:
            self.allowed = float((_log_p(rough, best) - self.best).abs().max())
            self.scale = float(self.best.abs().max())

    def error(self, found: Tensor) -> float:
        """How much worse than the search's: of a logit, or of a text's log-probability."""
        found = found.to(self.device)
        logits = self._logits(self.exact, found)
        if self.beams == 1:
            chosen = logits.gather(2, found[:, :, None]).squeeze(2)
            return float((logits.amax(2) - chosen).max())
        return quantile((_log_p(logits, found) - self.best).abs().tolist(), NEAR)

    @torch.no_grad()
    def _logits(self, model: Transformer, found: Tensor) -> Tensor:
        """float64 [B, NEW, V] of the tokens that were to be chosen from, -inf for the others."""
        shape = [len(self.source.lengths), NEW]
        if list(found.shape) != shape:
            raise ValueError(f"tokens of shape {list(found.shape)}, not {shape}")
        before = F.pad(found, (1, 0), value=model.config.bos_token_id)[:, :-1]
        source = self.source.ids.to(self.device), self.source.mask.to(self.device)
        logits = model(source[0], before, source[1]).logits
        assert logits is not None
        logits = logits.double()
        # log-probabilities are of the whole vocabulary: what is left out is so afterwards
        logits = logits.log_softmax(2) if self.beams > 1 else logits
        logits[:, :, never_of(model.config)] = -torch.inf
        return logits


def _log_p(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Of each text [B], from log-probabilities [B, NEW, V]."""
    return log_p.gather(2, tokens[:, :, None]).sum((1, 2))


def check_search(make: Callable[[], Search], judge: Judge, device: torch.device) -> Outcome:
    """A search ready to be timed, or what is wrong with it."""
    outcome = Outcome(call=lambda: None)
    try:
        outcome.call = make()
        outcome.call()
        found, outcome.peak_bytes = added_bytes(outcome.call, device)
        error = judge.error(found)
        outcome.max_error = error / judge.scale
        if not error <= ERROR_FACTOR * judge.allowed + LEAST_ERROR * judge.scale:
            what = "a token's logit" if judge.beams == 1 else "texts' log-probability"
            outcome.error = f"wrong: {what} off by {error:.1e}, plain torch by {judge.allowed:.1e}"
    except Exception as problem:  # whatever a peer raises, the others are measured
        outcome.error = reason(problem)
    return outcome


def decode(
    op: str, model: Transformer, dtype: torch.dtype, source: Texts, beams: int, run: Run
) -> list[Row]:
    """Check and time every search on one batch."""
    device, config = run.who.device, model.config
    about = (model, source, beams, dtype, device)
    judge = Judge(*about)

    def own() -> Search:
        here = own_transformer(model, 0.0).eval().to(dtype).to(device)
        return own_search(here, source, beams, device)

    searches: dict[str, Callable[[], Search]] = {"bertkern": own}
    if "transformers" in run.who:
        searches["transformers sdpa"] = functools.partial(marian_search, *about)
    if "ctranslate2" in run.who:
        searches["CTranslate2"] = functools.partial(ctranslate2_search, *about)
    outcomes = {name: check_search(make, judge, device) for name, make in searches.items()}
    del judge
    time_outcomes(outcomes, device, run.samples, run.budget)
    costs = decoding_costs(config, source.lengths, beams, dtype)
    shape: Shape = {"B": len(source.lengths), "S": spread(source.lengths), "new": NEW}
    common = {
        "suite": "models",
        "op": op,
        "direction": "forward",
        "shape": {**shape, "beams": beams} if beams > 1 else shape,
        "dtype": str(dtype).removeprefix("torch."),
        "flops": sum(flops for flops, _ in costs),
        "bytes": sum(moved for _, moved in costs),
        "items": float(len(source.lengths) * NEW),
        "unit": "tokens",
        "provenance": run.facts,
    }
    rows = rows_of(outcomes, run.limits, common)
    for row in rows:
        row.floor_s = floor_of(run.limits, costs, row.dtype)
    return rows


def cases_of(name: str, device: torch.device, quick: bool) -> list[tuple[list[int], int]]:
    """(lengths of the sources, beams)."""
    if device.type == "cpu" and name == "base":
        return [(mixed_lengths(1, 32), 1)]
    greedy: tuple[int, ...] = (1, 16) if quick else (1, 16, 64)
    beams: tuple[int, ...] = (16,) if quick else (1, 16)
    if device.type == "cpu":
        greedy, beams = ((1,), ()) if quick else ((1, 16), (16,))
    searches = [(count, 1) for count in greedy] + [(count, BEAM) for count in beams]
    return [(mixed_lengths(count, 32), width) for count, width in searches]


def decoding(run: Run, dtypes: Sequence[torch.dtype], only: str) -> None:
    """Every decoding case whose name contains `only`."""
    device = run.who.device
    for name in sizes_of(device, run.quick):
        op = f"transformer-{name} decode"
        if only not in op:
            continue
        model = decoding_model(config_of(name))
        for dtype in dtypes:
            for lengths, beams in cases_of(name, device, run.quick):
                progress(f"  {op} {dtype} B={len(lengths)} beams={beams}")
                source = texts_of(lengths, model.config, len(lengths))
                run.emit(decode(op, model, dtype, source, beams, run))
