"""A tokenised text: the token ids of the sentences of documents, in memory or mapped from files.

    ids              [N]      uint16 where the vocabulary fits, else uint32: all tokens in order
    sentence_starts  [S + 1]  int64: sentence s owns tokens sentence_starts[s] ..
                              sentence_starts[s + 1] - 1
    document_starts  [D + 1]  int64: document d owns sentences document_starts[d] ..
                              document_starts[d + 1] - 1

A folder holds these as files of little-endian numbers, and meta.json, which says what they should
be. Files are mapped: a corpus larger than memory takes from it what is read at a time. Documents
with fewer than two sentences cannot give a sentence pair and are left out.

Legend: N tokens, S sentences, D documents, V vocabulary size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .files import write_text
from .packing import Ids, cumulative_lengths
from .text import Document
from .tokenizer import vocabulary_digest

FORMAT = 1
META = "meta.json"
_META_TYPES = {
    **dict.fromkeys(("documents", "sentences", "tokens", "left_out", "vocab_size"), int),
    **dict.fromkeys(("vocabulary", "fingerprint"), str),
}
_FILES = ("ids.bin", "sentences.bin", "documents.bin")
_CHUNK_CHARACTERS = 1 << 20  # text that is tokenised at once
_CHUNK_TOKENS = 1 << 24  # tokens that are read at once


class Corpus:
    """Documents as token ids. Made by `from_documents`, `build`, `open` and `split`.

    Attributes:
        ids, sentence_starts, document_starts: as above, of the whole text.
        chosen: int64 [documents], the numbers of this corpus's documents in the whole text.
        vocab_size: V.
        vocabulary: digest of the vocabulary that the ids belong to.
        fingerprint: digest of the ids and of where sentences and documents end; equal for equal
            texts under equal vocabularies, in memory or on disk.
        left_out: documents that had fewer than two sentences.
        folder: where the files are, None in memory.
    """

    def __init__(
        self,
        arrays: tuple[NDArray[Any], Ids, Ids],
        meta: dict[str, Any],
        folder: Path | None = None,
        chosen: Ids | None = None,
    ) -> None:
        self.ids, self.sentence_starts, self.document_starts = arrays
        self._meta = meta
        self.folder = folder
        self.vocab_size: int = meta["vocab_size"]
        self.vocabulary: str = meta["vocabulary"]
        self.fingerprint: str = meta["fingerprint"]
        self.left_out: int = meta["left_out"]
        self._whole = chosen is None
        self.chosen = np.arange(meta["documents"]) if chosen is None else chosen
        if not self._whole:
            part = hashlib.sha256(self.fingerprint.encode())
            part.update(self.chosen.astype("<i8").tobytes())
            self.fingerprint = part.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """For another process: mapped files are named, not copied."""
        state = dict(self.__dict__)
        if self.folder is not None:
            for name in ("ids", "sentence_starts", "document_starts"):
                del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.folder is not None:
            arrays = _map_files(self.folder, self._meta)
            self.ids, self.sentence_starts, self.document_starts = arrays

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.chosen)

    @property
    def sentences(self) -> int:
        """How many sentences there are."""
        return int(self.sentences_of_documents().sum())

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return int(self.tokens_of_documents().sum())

    def sentences_of_documents(self) -> Ids:
        """How many sentences each document has, [documents]."""
        return self.document_starts[self.chosen + 1] - self.document_starts[self.chosen]

    def tokens_of_documents(self) -> Ids:
        """How many tokens each document has, [documents]."""
        starts, ends = self.document_starts[self.chosen], self.document_starts[self.chosen + 1]
        return self.sentence_starts[ends] - self.sentence_starts[starts]

    def document(self, index: int) -> list[Ids]:
        """The token ids of each sentence of a document."""
        first, last = self.document_starts[self.chosen[index] : self.chosen[index] + 2]
        starts = self.sentence_starts[first : last + 1]
        return [self.ids[a:b].astype(np.int64) for a, b in pairwise(starts)]

    def split(self, held_out: float = 0.05, seed: int = 0) -> tuple[Corpus, Corpus]:
        """(training, held-out) views: a random part of the documents, at least two, is held out.

        Raises:
            ValueError: held_out is not in 0..1, or there are fewer than four documents: pairs of
                unrelated sentences need two documents on either side.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, not {held_out}")
        if self.documents < 4:
            raise ValueError(
                f"{self.documents} document(s) with two or more sentences: sentence pairs and a "
                "held-out part need at least 4; separate documents by empty lines"
            )
        count = min(max(2, round(held_out * self.documents)), self.documents - 2)
        order = np.random.default_rng(seed).permutation(self.documents)
        arrays = (self.ids, self.sentence_starts, self.document_starts)
        held, rest = self.chosen[np.sort(order[:count])], self.chosen[np.sort(order[count:])]
        return (
            Corpus(arrays, self._meta, self.folder, rest),
            Corpus(arrays, self._meta, self.folder, held),
        )

    def unigram_counts(self) -> Ids:
        """How often each vocabulary id occurs, int64 [V].

        Raises:
            ValueError: an id outside of the vocabulary: the file is damaged.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for first, last in self._runs():
            for start in range(first, last, _CHUNK_TOKENS):
                ids = self.ids[start : min(start + _CHUNK_TOKENS, last)]
                self.check(ids)
                counts += np.bincount(ids, minlength=self.vocab_size)
        return counts

    def check(self, ids: NDArray[Any]) -> None:
        """Be sure that ids read from here are in the vocabulary.

        Raises:
            ValueError: one is not.
        """
        if len(ids) and int(ids.max()) >= self.vocab_size:
            where = "the corpus" if self.folder is None else str(self.folder / _FILES[0])
            raise ValueError(
                f"{where}: damaged: id {int(ids.max())} in a vocabulary of {self.vocab_size}"
            )

    def verify(self) -> None:
        """Read everything and compare it with the fingerprint.

        Raises:
            ValueError: the files are damaged.
        """
        digest = _start_digest(self.vocab_size, self.vocabulary)
        starts = self.document_starts
        for first, last in pairwise(starts):
            bounds = self.sentence_starts[first : last + 1]
            _add_to_digest(digest, np.diff(bounds), self.ids[bounds[0] : bounds[-1]])
        if digest.hexdigest() != self._meta["fingerprint"]:
            raise ValueError(
                f"{self.folder}: damaged: the text is not the one that {META} tells of; "
                "prepare it again"
            )

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Tokens first .. last - 1 of neighbouring documents, which are read at once."""
        begins = self.sentence_starts[self.document_starts[self.chosen]]
        ends = self.sentence_starts[self.document_starts[self.chosen + 1]]
        new = np.flatnonzero(begins[1:] != ends[:-1]) + 1
        firsts, lasts = np.append(0, new), np.append(new, len(ends)) - 1
        yield from zip(begins[firsts].tolist(), ends[lasts].tolist(), strict=True)

    @classmethod
    def from_documents(cls, documents: Iterable[Document], tokenizer: Tokenizer) -> Corpus:
        """Tokenise documents in memory.

        Raises:
            ValueError: no document has two sentences or more.
        """
        tokenised = _Tokenised(documents, tokenizer)
        ids, lengths, counts = map(np.concatenate, zip(*tokenised, strict=True))
        arrays = (ids, cumulative_lengths(lengths), cumulative_lengths(counts))
        return cls(arrays, tokenised.meta())

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        tokenizer: Tokenizer,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        on_document: Callable[[], object] | None = None,
    ) -> Corpus:
        """Tokenise documents into a folder, some at a time, and open it.

        The folder comes to its name when it is whole; until then, and if the work is ended, there
        is none, or the old one.

        Args:
            documents: read once; may be larger than memory.
            tokenizer: with BERT's special tokens.
            folder: a new one.
            overwrite: replace a corpus that is there.
            on_document: called after each document.

        Raises:
            FileExistsError: the folder exists and is not to be replaced, or is not a corpus.
            ValueError: no document has two sentences or more.
            OSError: a full disk; it names the file.
        """
        folder = Path(folder)
        if folder.exists() and not (overwrite and (folder / META).is_file()):
            raise FileExistsError(
                f"{folder} exists: choose another folder"
                + (", or allow overwriting (--overwrite)" if (folder / META).is_file() else "")
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        temporary.mkdir()
        try:
            tokenised = _Tokenised(documents, tokenizer, on_document)
            _write_files(temporary, tokenised)
            write_text(temporary / META, json.dumps(tokenised.meta(), indent=2) + "\n")
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(temporary, folder)
        finally:
            if replaced.exists() and not folder.exists():
                os.replace(replaced, folder)  # interrupted between the two
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Corpus:
        """Map the files that `build` wrote.

        Raises:
            FileNotFoundError: the folder is none of a corpus, or a file is missing.
            ValueError: a file is damaged or of another format; it is named.
        """
        folder = Path(folder)
        path = folder / META
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: not a corpus: there is no {META}")
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, where {FORMAT} is known")
            for name, kind in _META_TYPES.items():
                if not isinstance(meta[name], kind):
                    raise ValueError(f"{name} is {meta[name]!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged, or not of a corpus ({error})") from error
        return cls(_map_files(folder, meta), meta, folder)


def _id_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _start_digest(vocab_size: int, vocabulary: str) -> Any:
    return hashlib.sha256(f"{FORMAT} {vocab_size} {vocabulary}".encode())


def _add_to_digest(digest: Any, lengths: Ids, ids: NDArray[Any]) -> None:
    """Add a document: how many sentences, the tokens of each, the ids."""
    digest.update(len(lengths).to_bytes(8, "little"))
    digest.update(lengths.astype("<i8").tobytes())
    digest.update(ids.tobytes())


class _Tokenised:
    """Iterates over (ids, tokens of each sentence, sentences of each document), some at a time."""

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Tokenizer,
        on_document: Callable[[], object] | None = None,
    ) -> None:
        self._documents, self._tokenizer, self._on_document = documents, tokenizer, on_document
        self.vocab_size = tokenizer.get_vocab_size()
        self.dtype = _id_type(self.vocab_size)
        self._vocabulary = vocabulary_digest(tokenizer)
        self._digest = _start_digest(self.vocab_size, self._vocabulary)
        self._counts = {"documents": 0, "sentences": 0, "tokens": 0, "left_out": 0}

    def __iter__(self) -> Iterator[tuple[NDArray[Any], Ids, Ids]]:
        chunk: list[Document] = []
        characters = 0
        for document in self._documents:
            chunk.append(document)
            characters += sum(map(len, document))
            if characters >= _CHUNK_CHARACTERS:
                yield self._encode(chunk)
                chunk, characters = [], 0
        yield self._encode(chunk)
        if not self._counts["documents"]:
            if not self._counts["left_out"]:
                raise ValueError("there is no text in the sources: no document at all")
            raise ValueError(
                f"none of {self._counts['left_out']} document(s) has two sentences or more; "
                "sentence pairs need them"
            )

    def _encode(self, documents: list[Document]) -> tuple[NDArray[Any], Ids, Ids]:
        sentences = list(chain.from_iterable(documents))
        encodings = self._tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
        flat = iter(encodings)
        kept_ids: list[NDArray[Any]] = []
        kept_lengths: list[int] = []
        kept_counts: list[int] = []
        for document in documents:
            found = [e.ids for e in islice(flat, len(document)) if len(e)]
            if len(found) < 2:
                self._counts["left_out"] += 1
            else:
                lengths = [len(ids) for ids in found]
                tokens = np.fromiter(chain.from_iterable(found), self.dtype, sum(lengths))
                _add_to_digest(self._digest, np.array(lengths), tokens)
                kept_ids.append(tokens)
                kept_lengths += lengths
                kept_counts.append(len(found))
            if self._on_document is not None:
                self._on_document()
        ids = np.concatenate([np.zeros(0, self.dtype), *kept_ids])
        self._counts["documents"] += len(kept_counts)
        self._counts["sentences"] += len(kept_lengths)
        self._counts["tokens"] += len(ids)
        return ids, np.array(kept_lengths, dtype=np.int64), np.array(kept_counts, dtype=np.int64)

    def meta(self) -> dict[str, Any]:
        """What meta.json says, after everything has been iterated over."""
        return {
            "format": FORMAT,
            **self._counts,
            "vocab_size": self.vocab_size,
            "vocabulary": self._vocabulary,
            "fingerprint": self._digest.hexdigest(),
        }


def _write_files(folder: Path, tokenised: _Tokenised) -> None:
    """Write the three files as the tokens come, and be sure that they are on the disk."""
    paths = [folder / name for name in _FILES]
    ends = [0, 0]
    files = [path.open("wb") for path in paths]
    try:
        for file in files[1:]:
            file.write(np.zeros(1, dtype="<i8").tobytes())
        for ids, lengths, counts in tokenised:
            files[0].write(ids.tobytes())
            for i, sizes in enumerate((lengths, counts)):
                sums = ends[i] + np.cumsum(sizes)
                files[i + 1].write(sums.astype("<i8").tobytes())
                ends[i] = int(sums[-1]) if len(sums) else ends[i]
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:  # a full disk does not say whose file it is
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    finally:
        for file in files:
            file.close()


def _map_files(folder: Path, meta: dict[str, Any]) -> tuple[NDArray[Any], Ids, Ids]:
    """The three arrays; their sizes and their ends are those that meta.json tells."""
    types = (_id_type(meta["vocab_size"]), np.dtype("<i8"), np.dtype("<i8"))
    counts = (meta["tokens"], meta["sentences"] + 1, meta["documents"] + 1)
    arrays = []
    for name, dtype, count in zip(_FILES, types, counts, strict=True):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing")
        size, expected = path.stat().st_size, count * dtype.itemsize
        if size != expected:
            raise ValueError(f"{path}: damaged: {size} bytes, not the {expected} of {META}")
        arrays.append(np.memmap(path, dtype, "r").view(np.ndarray))
    ids, sentence_starts, document_starts = arrays
    for name, starts, end in (
        (_FILES[1], sentence_starts, meta["tokens"]),
        (_FILES[2], document_starts, meta["sentences"]),
    ):
        if starts[0] != 0 or starts[-1] != end or np.any(starts[1:] <= starts[:-1]):
            raise ValueError(f"{folder / name}: damaged: its numbers do not rise from 0 to {end}")
    return ids, sentence_starts, document_starts
