"""A tag for each word: CoNLL's files and JSON lines.

    [CLS] pieces of the words [SEP]    the first piece of a word carries its tag, the others none

CoNLL (Tjong Kim Sang and De Meulder 2003): a word a line, its tag in the last column, blank lines
between sentences, `-DOCSTART-` lines between documents. JSON lines: {"tokens": [...], "tags":
[...]}. A sentence that is longer than max_length becomes several sequences, cut between words: no
word is lost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .features import Features, check_max_length, sequence_of
from .tables import KINDS, lines_of, read_table, read_utf8
from .tokenizer import SpecialIds

IGNORE_INDEX = -100
TAG_COLUMNS = ("tags", "ner_tags", "labels")
_DOCUMENT_START = "-DOCSTART-"


@dataclass(frozen=True)
class TaggedSentences:
    """The sentences of a file.

    Attributes:
        source: the file.
        sentences: words of each.
        tags: a tag for each word; None without tags.
        tag_names: the tags that there are, "O" first, then sorted; empty without tags.
        places: where each sentence stands, for messages.
        notes: what was passed over, for people.
    """

    source: str
    sentences: list[list[str]]
    tags: list[list[str]] | None
    tag_names: list[str]
    places: list[str]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sentences)

    def subset(self, examples: Sequence[int]) -> TaggedSentences:
        """The sentences of the given numbers."""
        return replace(
            self,
            sentences=[self.sentences[i] for i in examples],
            tags=None if self.tags is None else [self.tags[i] for i in examples],
            places=[self.places[i] for i in examples],
            notes=[],
        )


def read_token_classification(
    path: str | os.PathLike[str],
    *,
    tag_names: Sequence[str] | None = None,
    labelled: bool | None = None,
) -> TaggedSentences:
    """Read a file of tagged sentences.

    Args:
        path: .jsonl or .json for JSON lines, any other ending for CoNLL's form.
        tag_names: the tags that are allowed, in order; None: those of the file.
        labelled: True: a file without tags is an error; None: either way.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8; a line with a word and no tag where others have one; another number
            of tags than of words; a tag that is not allowed; no sentence. File and line are named.
    """
    path = Path(path)
    read = _read_json if KINDS.get(path.suffix.lower()) in ("jsonl", "json") else _read_conll
    found = read(path)
    if labelled and found.tags is None:
        raise ValueError(f"{path}: no tags; a word and its tag are wanted on each line")
    if found.tags is None or tag_names is None:
        return found
    allowed = set(tag_names)
    for place, tags in zip(found.places, found.tags, strict=True):
        for word, tag in enumerate(tags):
            if tag not in allowed:
                raise ValueError(
                    f"{place}: tag {tag!r} of word {word + 1} is not allowed; allowed: "
                    f"{', '.join(map(repr, tag_names))}"
                )
    return replace(found, tag_names=list(tag_names))


class TokenClassificationData:
    """Sentences as token ids.

    Args:
        examples: what read_token_classification gives.
        tokenizer: with BERT's special tokens. A word that it leaves nothing of becomes [UNK].
        max_length: most tokens of a sequence; a word of more pieces than fit is cut.

    Attributes:
        examples, tokenizer: what was given.
        features: the sentences' ids, with `labels` (-100 at all but the first piece of a word)
            where there are tags.
        first_pieces: bool [N], tokens that are the first piece of a word: in order, those of all
            words of all sentences.
        notes: the sentences', and how many were divided or cut.
    """

    def __init__(
        self, examples: TaggedSentences, tokenizer: Tokenizer, max_length: int = 128
    ) -> None:
        check_max_length(max_length, 3)
        special = SpecialIds.of(tokenizer)
        room = max_length - 2
        number_of = {tag: number for number, tag in enumerate(examples.tag_names)}
        sequences, labels, first_pieces = [], [], []
        divided = cut = unknown = 0
        encodings = tokenizer.encode_batch(
            examples.sentences, is_pretokenized=True, add_special_tokens=False
        )
        for sentence, (words, encoding) in enumerate(
            zip(examples.sentences, encodings, strict=True)
        ):
            pieces: list[list[int]] = [[] for _ in words]
            for word, token in zip(encoding.word_ids, encoding.ids, strict=True):
                assert word is not None  # only special tokens belong to no word
                pieces[word].append(token)
            unknown += sum(not ids for ids in pieces)
            cut += sum(len(ids) > room for ids in pieces)
            pieces = [ids[:room] or [special.unk] for ids in pieces]
            parts = _parts([len(ids) for ids in pieces], room)
            divided += len(parts) > 1
            for first, last in parts:
                sequence = sequence_of(list(chain(*pieces[first:last])), None, special)
                starts = np.zeros(len(sequence.input_ids), dtype=np.bool_)
                starts[np.cumsum([1, *(len(ids) for ids in pieces[first : last - 1])])] = True
                sequences.append(sequence)
                first_pieces.append(starts)
                if examples.tags is not None:
                    numbers = np.full(len(starts), IGNORE_INDEX, dtype=np.int64)
                    numbers[starts] = [number_of[t] for t in examples.tags[sentence][first:last]]
                    labels.append(numbers)
        token_labels = {"labels": np.concatenate(labels)} if labels else {}
        self.examples, self.tokenizer = examples, tokenizer
        self.features = Features.of(sequences, token_labels=token_labels)
        self.first_pieces: NDArray[np.bool_] = np.concatenate(first_pieces)
        self.notes = list(examples.notes)
        for count, what in (
            (divided, f"sentence(s) divided into sequences of at most {max_length} tokens"),
            (cut, f"word(s) of more than {room} pieces cut"),
            (unknown, "word(s) of which the tokenizer leaves nothing read as [UNK]"),
        ):
            if count:
                self.notes.append(f"{count} {what}")

    def __len__(self) -> int:
        return len(self.features)

    def by_sentence(self, values: Sequence[str]) -> list[list[str]]:
        """One value for each word of the file, [words], as lists by sentence."""
        ends = np.cumsum([len(words) for words in self.examples.sentences])
        return [
            list(values[end - len(words) : end])
            for words, end in zip(self.examples.sentences, ends, strict=True)
        ]


def _parts(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Words first .. last - 1 of each sequence: as many as fit, in order."""
    parts = []
    first = total = 0
    for word, length in enumerate(lengths):
        if total + length > room:
            parts.append((first, word))
            first, total = word, 0
        total += length
    return [*parts, (first, len(lengths))]


def _named(tags: list[list[str]] | None) -> list[str]:
    names = {tag for sentence in tags or [] for tag in sentence}
    return sorted(names, key=lambda name: (name != "O", name))


def _read_conll(path: Path) -> TaggedSentences:
    sentences: list[list[str]] = []
    tags: list[list[str]] = []
    places: list[str] = []
    columns = documents = 0
    inside = False
    for number, line in lines_of(read_utf8(path)):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            inside = False
            continue
        if fields[0] == _DOCUMENT_START:
            documents += 1
            inside = False
            continue
        columns = columns or len(fields)
        if len(fields) != columns or not fields[0].strip() or not fields[-1].strip():
            raise ValueError(
                f"{path}: line {number}: {len(fields)} column(s), but the lines before have "
                f"{columns}: a word, and its tag in the last"
            )
        if not inside:
            sentences.append([])
            tags.append([])
            places.append(f"{path}: sentence at line {number}")
            inside = True
        sentences[-1].append(fields[0])
        tags[-1].append(fields[-1])
    if not sentences:
        raise ValueError(f"{path}: no sentence")
    notes = [f"{documents} {_DOCUMENT_START} line(s) passed over"] if documents else []
    known = tags if columns > 1 else None
    return TaggedSentences(str(path), sentences, known, _named(known), places, notes)


def _read_json(path: Path) -> TaggedSentences:
    table = read_table(path)
    table.require("tokens", "the words")
    column = table.find(TAG_COLUMNS)
    sentences, tags = [], []
    for row in table.rows:
        words = row.texts("tokens")
        if not words or not all(word.strip() for word in words):
            raise row.error("'tokens' must be one word or more, none of them empty")
        sentences.append(words)
        if column is not None:
            own = row.texts(column)
            if len(own) != len(words):
                raise row.error(f"{len(own)} {column!r}, but {len(words)} 'tokens'")
            tags.append(own)
    notes = [f"{table.blank_lines} blank line(s) passed over"] if table.blank_lines else []
    known = tags if column is not None else None
    places = [row.where for row in table.rows]
    return TaggedSentences(str(path), sentences, known, _named(known), places, notes)
