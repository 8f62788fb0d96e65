"""SWAG-style endings: which of four sentences comes next?

    sent1      a sentence of the text
    sent2      the first word of the sentence that follows it
    endings    how that sentence goes on (the right one), and how three others go on that begin
               with the same word and are about as long

The wrong endings are those that have most words in common with `sent1`, the same document's before
other documents': as in SWAG (Zellers et al. 2018), what a rule of words can tell is filtered out.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bertkern.data.text import Document

CHOICES = 4
_WORDS = range(6, 17)  # of a sentence
_LONGER = 3  # words by which endings may differ in length
_NEAR = 2  # sentences before and after that give no wrong ending: they might be right


@dataclass(frozen=True)
class Ending:
    """A start, the endings, and which is right."""

    sent1: str
    sent2: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class _Place:
    document: int
    index: int
    sentence: str


def endings(
    documents: Sequence[Document], random: np.random.Generator
) -> Iterator[tuple[int, Ending]]:
    """(number of the document, example) for every two neighbouring sentences.

    Those for which no three wrong endings are found in `documents` are passed over.
    """
    by_first_word = defaultdict(list)
    for number, document in enumerate(documents):
        for index, sentence in enumerate(document):
            if len(sentence.split()) in _WORDS:
                place = _Place(number, index, sentence)
                by_first_word[sentence.split()[0]].append(place)
    for number, document in enumerate(documents):
        for index in range(len(document) - 1):
            start, right = document[index : index + 2]
            if len(start.split()) not in _WORDS or len(right.split()) not in _WORDS:
                continue
            first, _, rest = right.partition(" ")
            wrong = _wrong_endings(_Place(number, index, start), right, by_first_word[first])
            if len(wrong) == CHOICES - 1:
                label = int(random.integers(CHOICES))
                wrong.insert(label, rest)
                yield number, Ending(start, first, tuple(wrong), label)


def _wrong_endings(start: _Place, right: str, candidates: Sequence[_Place]) -> list[str]:
    """Those with most words in common with the start; the same document's before others'."""
    words, length = _words(start.sentence), len(right.split())
    found = {}
    for place in candidates:
        near = place.document == start.document and abs(place.index - start.index) <= _NEAR
        similar = abs(len(place.sentence.split()) - length) <= _LONGER
        if near or not similar or place.sentence in (start.sentence, right):
            continue
        common = len(words & _words(place.sentence))
        found[place.sentence] = (-common, place.document != start.document, place.sentence)
    chosen = sorted(found, key=found.__getitem__)[: CHOICES - 1]
    return [sentence.partition(" ")[2] for sentence in chosen]


def baselines(train: Sequence[Ending], held_out: Sequence[Ending]) -> dict[str, list[float]]:
    """Points on the held-out examples (1 where right, shared where endings are equal) of rules.

    chance              one in four
    word overlap        the ending with the greatest part of its words in the start
    weighted overlap    likewise, each word by its weight log(N / n), n of the N training sentences
                        having it
    """
    sentences = [_words(text) for example in train for text in (example.sent1, *example.endings)]
    counts = Counter(word for words in sentences for word in words)

    def weight(word: str) -> float:
        return math.log((1 + len(sentences)) / (1 + counts[word]))

    return {
        "chance": [1 / CHOICES] * len(held_out),
        "word overlap": [_by_overlap(example, lambda word: 1.0) for example in held_out],
        "weighted overlap": [_by_overlap(example, weight) for example in held_out],
    }


def _by_overlap(example: Ending, weight: Callable[[str], float]) -> float:
    start = _words(example.sent1)
    parts = []
    for ending in example.endings:
        words = sorted(_words(ending))
        common = sum(weight(word) for word in words if word in start)
        parts.append(common / max(sum(weight(word) for word in words), 1e-9))
    best = max(parts)
    return (parts[example.label] == best) / parts.count(best)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
