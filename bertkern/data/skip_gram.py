"""Text as numbered words, and the pairs of near words that skip-gram vectors are learned from.

    a word of frequency f stays in an epoch's text with probability min(1, √(t / f))
    a centre word's window is drawn from 1 .. window, and each word in it makes a pair with it
    each pair gets K words drawn with probability ∝ count^(3/4), to be told from the near one
    (Mikolov et al. 2013)

What is drawn is a function of (seed, epoch, place in the text), not of when it is drawn. A word is
a run of letters and digits (with their combining marks) and of apostrophes inside (don't), in
Unicode's form NFC, lower-cased; all else separates words. Pairs do not reach from one sentence into
another.

A folder holds the text: ids.bin (int32 [N]), sentences.bin (int64 [S + 1]: where sentences begin)
and meta.json. The files are mapped, so that a text larger than memory takes of it what is read.

Legend: N words of the text, S sentences, V words of the vocabulary, P pairs, K negatives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import write_text
from .packing import Ids
from .random_bits import below, derive, uniform
from .text import Document

FORMAT = 1
META, _WORDS, _SENTENCES = "meta.json", "ids.bin", "sentences.bin"
LONGEST_SENTENCE = 1000  # words; what is longer is cut, as by word2vec
COUNTED_AT_MOST = 20_000_000  # different words that are counted at once
_CHUNK = 1 << 13  # words of the text that pairs are made of at once
_KEEP, _WINDOW, _NEGATIVE = range(3)  # what a number is drawn for


@cache
def _word_pattern() -> re.Pattern[str]:
    # \w has no combining marks, which words of Hindi, Arabic or Thai are written with
    bmp = map(chr, range(0x300, 0x10000))
    marks = "".join(c for c in bmp if unicodedata.category(c).startswith("M"))
    run = rf"[^\W_]+(?:[{marks}]+[^\W_]*)*"
    return re.compile(rf"{run}(?:'{run})*")


def words_of(text: str) -> list[str]:
    """The words of a text, by the rule above."""
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    return _word_pattern().findall(text)


@dataclass(frozen=True)
class WordCounts:
    """How often the words of a text occur.

    Attributes:
        counts: of each word, by falling count, then by the alphabet.
        total: all words that were read, those left out included.
        pruned: different words that were forgotten while counting, as memory was full; 0: none.
        pruned_up_to: these occurred at most so many times until then.
    """

    counts: dict[str, int]
    total: int
    pruned: int = 0
    pruned_up_to: int = 0


def count_words(
    documents: Iterable[Document], min_count: int = 1, counted_at_most: int = COUNTED_AT_MOST
) -> WordCounts:
    """Count words, and leave out those that occur fewer than min_count times.

    Args:
        documents: read once.
        min_count: 1 or more.
        counted_at_most: where there are more different words, the rarest are forgotten, first
            those that occurred once, next time those up to twice, and so on; their later
            occurrences count from 0.

    Raises:
        ValueError: min_count or counted_at_most is below 1.
    """
    for name, value in (("min_count", min_count), ("counted_at_most", counted_at_most)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    counter: Counter[str] = Counter()
    total = pruned = pruned_up_to = 0
    for document in documents:
        for sentence in document:
            words = words_of(sentence)
            total += len(words)
            counter.update(words)
        while len(counter) > counted_at_most:
            pruned_up_to += 1
            kept = Counter({word: c for word, c in counter.items() if c > pruned_up_to})
            pruned += len(counter) - len(kept)
            counter = kept
    kept_counts = [(word, c) for word, c in counter.items() if c >= min_count]
    kept_counts.sort(key=lambda entry: (-entry[1], entry[0]))
    return WordCounts(dict(kept_counts), total, pruned, pruned_up_to)


class WordText:
    """A text as numbered words, mapped from a folder. Made by `build` and `open`.

    Attributes:
        ids: int32 [N], the numbers of its words; those left out are not there.
        sentence_starts: int64 [S + 1].
        words: V words, by falling count.
        counts: int64 [V].
        total: words of the text that was read, with those left out.
        pruned, pruned_up_to: as of WordCounts.
        fingerprint: digest of words, ids and sentences.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.words: list[str] = meta["words"]
        self.counts: Ids = np.array(meta["counts"], dtype=np.int64)
        self.total: int = meta["total"]
        self.pruned: int = meta["pruned"]
        self.pruned_up_to: int = meta["pruned_up_to"]
        self.fingerprint: str = meta["fingerprint"]
        self.ids: NDArray[np.int32] = _mapped(folder / _WORDS, "<i4", meta["length"])
        self.sentence_starts: Ids = _mapped(folder / _SENTENCES, "<i8", meta["sentences"] + 1)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(
        cls,
        documents: Callable[[], Iterable[Document]],
        folder: str | os.PathLike[str],
        min_count: int = 5,
        counted_at_most: int = COUNTED_AT_MOST,
    ) -> WordText:
        """Count the words, number them, and write the text to a folder.

        The folder comes to its name when it is whole; an older one of this kind is replaced.

        Args:
            documents: gives the same documents each time it is called, which is twice.
            folder: where to.
            min_count, counted_at_most: as of `count_words`.

        Raises:
            ValueError: fewer than two words occur min_count times.
            FileExistsError: there is something else under the folder's name.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / META).is_file():
            raise FileExistsError(f"{folder} exists, and is not the text of a run")
        found = count_words(documents(), min_count, counted_at_most)
        if len(found.counts) < 2:
            raise ValueError(
                f"{len(found.counts)} word(s) occur {min_count} times or more among the "
                f"{found.total:,} of the text: give more text, or a smaller min_count"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir()
        try:
            meta = _write_files(temporary, documents(), found)
            write_text(temporary / META, json.dumps(meta, ensure_ascii=False) + "\n")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> WordText:
        """Map what `build` wrote.

        Raises:
            FileNotFoundError: the folder or a file is missing.
            ValueError: a file is damaged; it is named.
        """
        folder = Path(folder)
        path = folder / META
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {META}: not the text of a run")
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta["format"] != FORMAT or len(meta["words"]) != len(meta["counts"]):
                raise ValueError(f"format {meta['format']}, where {FORMAT} is known")
            return cls(folder, meta)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error})") from error


def _write_files(folder: Path, documents: Iterable[Document], found: WordCounts) -> dict[str, Any]:
    """Write ids and sentences as they come; what meta.json says of them."""
    number = {word: i for i, word in enumerate(found.counts)}
    digest = hashlib.sha256(json.dumps(list(found.counts.items())).encode())
    end = sentences = 0
    with (folder / _WORDS).open("wb") as ids_file, (folder / _SENTENCES).open("wb") as starts_file:
        starts_file.write(np.zeros(1, "<i8").tobytes())
        for document in documents:
            parts = list(_known(document, number))
            ends = end + np.cumsum([len(part) for part in parts], dtype="<i8")
            ids = np.fromiter(chain.from_iterable(parts), dtype="<i4")
            for file, numbers in ((ids_file, ids), (starts_file, ends)):
                file.write(numbers.tobytes())
                digest.update(numbers.tobytes())
            end, sentences = end + len(ids), sentences + len(parts)
    return {
        "format": FORMAT,
        "total": found.total,
        "pruned": found.pruned,
        "pruned_up_to": found.pruned_up_to,
        "length": end,
        "sentences": sentences,
        "fingerprint": digest.hexdigest(),
        "words": list(found.counts),
        "counts": list(found.counts.values()),
    }


def _known(document: Document, number: dict[str, int]) -> Iterator[list[int]]:
    """The numbers of the words of each sentence that are in the vocabulary, if any are."""
    for sentence in document:
        ids = [number[word] for word in words_of(sentence) if word in number]
        for first in range(0, len(ids), LONGEST_SENTENCE):
            yield ids[first : first + LONGEST_SENTENCE]


def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """The numbers of a file, that must be so many."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    size, expected = path.stat().st_size, count * np.dtype(dtype).itemsize
    if size != expected:
        raise ValueError(f"{path.name}: {size} bytes, not {expected}")
    return np.memmap(path, dtype, "r").view(np.ndarray)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a piece of the text, in its order.

    Attributes:
        centres: int64 [P], words.
        words: int64 [P, 1 + K]: the word near the centre, then the negatives.
    """

    centres: Ids
    words: Ids


class SkipGrams:
    """The pairs of a text, by epoch and chunk.

    Args:
        text: numbered words.
        window: most words on each side of a centre word.
        negative: K.
        sample: t; a word of that share of the text, or less, always stays. 0: all stay.
        seed: of everything that is drawn.

    Raises:
        ValueError: window or negative is below 1, or sample is not in 0..1.
    """

    def __init__(
        self,
        text: WordText,
        window: int = 2,
        negative: int = 5,
        sample: float = 1e-3,
        seed: int = 0,
    ) -> None:
        for name, value in (("window", window), ("negative", negative)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if not 0 <= sample <= 1:
            raise ValueError(f"sample must be in 0..1, not {sample}")
        self.text, self.window, self.negative, self._seed = text, window, negative, seed
        share = text.counts / text.counts.sum()
        self.stay = np.minimum(1.0, np.sqrt(sample / share)) if sample else np.ones(len(share))
        self._cumulative = np.cumsum(text.counts**0.75)
        self._offsets = np.array([*range(-window, 0), *range(1, window + 1)])
        begins = np.append(np.arange(0, len(text), _CHUNK), len(text))
        self._bounds = np.searchsorted(text.sentence_starts, begins)

    @property
    def chunks(self) -> int:
        """How many pieces of some 8,000 words the text has; they end where sentences do."""
        return len(self._bounds) - 1

    def words_before(self, chunk: int) -> int:
        """Words of the text before a chunk."""
        return int(self.text.sentence_starts[self._bounds[chunk]])

    def pairs(self, epoch: int, chunk: int) -> Pairs:
        """The pairs of a chunk in an epoch."""
        bounds = self._bounds[chunk : chunk + 2]
        starts = self.text.sentence_starts[bounds[0] : bounds[1] + 1]
        key = derive(self._seed, epoch)
        ids = self.text.ids[starts[0] : starts[-1]].astype(np.int64)
        places = np.arange(starts[0], starts[-1])
        stays = uniform(derive(derive(key, _KEEP), places)) < self.stay[ids]
        sentences = np.repeat(np.arange(len(starts) - 1), np.diff(starts))[stays]
        ids, places = ids[stays], places[stays]
        reach = 1 + below(derive(derive(key, _WINDOW), places), self.window)
        near = np.arange(len(ids))[:, None] + self._offsets  # [words that stay, 2 window]
        inside = (near >= 0) & (near < len(ids)) & (np.abs(self._offsets) <= reach[:, None])
        near = np.where(inside, near, 0)
        centre, slot = np.nonzero(inside & (sentences[near] == sentences[:, None]))
        keys = derive(derive(key, _NEGATIVE), places)[centre]
        numbers = slot[:, None] * self.negative + np.arange(self.negative)
        drawn = uniform(derive(keys[:, None], numbers)) * self._cumulative[-1]
        negatives = np.searchsorted(self._cumulative, drawn, side="right")
        context = ids[near[centre, slot]]
        return Pairs(ids[centre], np.column_stack((context, negatives)))
