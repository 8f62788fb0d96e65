"""The demo's first half: one pretrained model embedded three ways, and a semantic search.

All three get the same texts, the same tokenizer and the same batching rule: sentences in order of
falling length, BATCH_SIZE a batch. transformers computes a batch padded to its longest sentence,
bertkern computes its tokens only. Tokenisation, pooling and normalisation are inside the time.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

BATCH_SIZE = 32
SENTENCES = 300
REPEATS = 3
QUERIES = (
    "opening a web page",
    "adding two numbers",
    "waiting for work that runs in the background",
)
_WORDS = range(6, 41)  # sentences of so many words

Encode = Callable[[list[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class Contender:
    """One way to embed: its measured speed, and how far its vectors are from the baseline's."""

    name: str
    seconds: float
    fastest: float
    slowest: float
    sentences_per_second: float
    max_difference: float


@dataclass(frozen=True)
class Search:
    """A query and the best sentences with their cosine similarity."""

    query: str
    hits: list[tuple[float, str]]


@dataclass
class EmbeddingResult:
    """What this half of the demo found."""

    sentences: int
    device: str
    contenders: list[Contender] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def pick_sentences(documents: list[list[str]], count: int) -> list[str]:
    """`count` different sentences of ordinary length, the same ones for the same documents."""
    usable = dict.fromkeys(
        sentence
        for document in documents
        for sentence in document
        if len(sentence.split()) in _WORDS and sentence[0].isupper() and sentence.endswith(".")
    )
    texts = list(usable)
    chosen = np.random.default_rng(0).permutation(len(texts))[:count]
    return [texts[i] for i in sorted(chosen.tolist())]


def bertkern_encoder(folder: Path, device: torch.device) -> tuple[Encode, int]:
    """bertkern's SentenceEncoder, and the longest sentence it takes."""
    from bertkern.models import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(folder, device)
    return lambda texts: encoder.encode(texts, BATCH_SIZE), encoder.max_seq_length


def compare(
    encoders: dict[str, Encode], texts: list[str], repeats: int, advance: Callable[[], None]
) -> tuple[list[Contender], NDArray[np.float32]]:
    """Time the encoders on the texts, interleaved, after one warm-up each.

    Args:
        encoders: the first is the baseline of the differences.
        repeats: how often each is timed; medians are kept.
        advance: called after every encoding, for a progress bar.

    Returns:
        The measurements, and the vectors [n, hidden] of the last encoder.
    """
    vectors: dict[str, NDArray[np.float32]] = {}
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for name, encode in encoders.items():
        vectors[name] = encode(texts)
        advance()
    names = list(encoders)
    for _ in range(repeats):
        for name in names:
            start = time.perf_counter()
            encoders[name](texts)
            times[name].append(time.perf_counter() - start)
            advance()
        names.append(names.pop(0))
    baseline = next(iter(vectors.values()))
    measured = []
    for name, taken in times.items():
        seconds = statistics.median(taken)
        difference = float(np.abs(vectors[name] - baseline).max())
        measured.append(
            Contender(
                name,
                seconds,
                min(taken),
                max(taken),
                len(texts) / seconds,
                max_difference=difference,
            )
        )
    return measured, vectors[name]


def search(
    queries: tuple[str, ...], texts: list[str], vectors: NDArray[np.float32], encode: Encode
) -> list[Search]:
    """The three texts nearest to each query by cosine similarity (the vectors have length 1)."""
    similarity = encode(list(queries)) @ vectors.T  # [queries, texts]
    found = []
    for query, row in zip(queries, similarity, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        found.append(Search(query, [(float(row[i]), texts[i]) for i in best]))
    return found
