"""One of several endings goes on from a start: SWAG's files, and a user's own.

    [CLS] start [SEP] continuation + ending [SEP]    for each ending; one logit each

SWAG (Zellers et al. 2018, arXiv 1808.05326): CSV with sent1, sent2, ending0..3, label (test files
have none), or in its full form with sent1, sent2, gold-ending, distractor-0..3, of which the first
three are used. Otherwise JSON lines with "sent1" (or startphrase, context, question), perhaps
"sent2", "endings" (or choices) and "label".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .features import Features, check_max_length, kept_of_pair, sequence_of
from .tables import Row, Table, UniqueIds, read_table
from .tokenizer import SpecialIds

START_COLUMNS = ("sent1", "startphrase", "context", "question", "premise")
ENDINGS_COLUMNS = ("endings", "choices")
_GOLD = "gold-ending"
_DISTRACTORS = ("distractor-0", "distractor-1", "distractor-2")


@dataclass(frozen=True)
class ChoiceExamples:
    """The examples of a file.

    Attributes:
        source: the file.
        starts: what every choice goes on from, [E] texts.
        endings: C texts of each example, the continuation in front of each.
        labels: number of the right ending, int64 [E]; None without labels.
        ids: of each example, for a predictions file.
        notes: what was passed over, for people.
    """

    source: str
    starts: list[str]
    endings: list[list[str]]
    labels: NDArray[np.int64] | None
    ids: list[str]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def choices(self) -> int:
        """C."""
        return len(self.endings[0])

    def subset(self, examples: Sequence[int]) -> ChoiceExamples:
        """The examples of the given numbers."""
        return replace(
            self,
            starts=[self.starts[i] for i in examples],
            endings=[self.endings[i] for i in examples],
            labels=None if self.labels is None else self.labels[np.asarray(examples)],
            ids=[self.ids[i] for i in examples],
            notes=[],
        )


def read_multiple_choice(
    path: str | os.PathLike[str], *, labelled: bool | None = None
) -> ChoiceExamples:
    """Read a file of examples.

    Args:
        path: .csv, .tsv, .jsonl or .json, see above and `tables`.
        labelled: True: a file without labels is an error; None: either way.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as read_table; columns that are missing; examples with another number of endings
            or fewer than two; a label that is none of theirs; an id that comes twice. File and line
            are named.
    """
    table = read_table(path)
    start = table.find(START_COLUMNS)
    if start is None:
        raise ValueError(
            f"{path}: no column for the start ({', '.join(START_COLUMNS)}); {table.found}"
        )
    notes = [f"{table.blank_lines} blank line(s) passed over"] if table.blank_lines else []
    columns = _ending_columns(table)
    texts = [_endings(row, columns) for row in table.rows]
    choices = len(texts[0])
    for row, endings in zip(table.rows, texts, strict=True):
        if len(endings) != choices or choices < 2:
            raise row.error(
                f"{len(endings)} ending(s), but every example must have the same number, two or "
                f"more (the first has {choices})"
            )
    labels = None
    if _GOLD in columns:
        # the file puts the right one first; here it stands at each place in turn
        labels = np.arange(len(texts)) % choices
        for label, endings in zip(labels, texts, strict=True):
            endings.insert(label, endings.pop(0))
    elif "label" in table.columns:
        labels = np.array([_label(row, choices) for row in table.rows], dtype=np.int64)
    elif labelled:
        raise ValueError(f"{path}: no column 'label'; {table.found}")
    if "sent2" in table.columns and start == "sent1":
        for row, endings in zip(table.rows, texts, strict=True):
            endings[:] = [f"{row.text('sent2')} {ending}".strip() for ending in endings]
    id_column = table.find(("id", "idx", "index", ""))  # SWAG's first column has no name
    seen = UniqueIds()
    ids = [str(number) for number in range(len(table.rows))]
    if id_column is not None:
        ids = [seen.add(str(row.value(id_column)), row.where) for row in table.rows]
    starts = [row.text(start) for row in table.rows]
    return ChoiceExamples(str(path), starts, texts, labels, ids, notes)


class MultipleChoiceData:
    """Examples as token ids, C sequences each.

    Args:
        examples: what read_multiple_choice gives.
        tokenizer: with BERT's special tokens.
        max_length: most tokens of a sequence; the longer text is cut first.

    Attributes:
        examples, tokenizer: what was given.
        features: the examples' ids, with `labels` where there are any.
        notes: the examples', and how many sequences were cut.
    """

    def __init__(
        self, examples: ChoiceExamples, tokenizer: Tokenizer, max_length: int = 128
    ) -> None:
        check_max_length(max_length, 3)
        special = SpecialIds.of(tokenizer)
        choices = examples.choices
        starts = tokenizer.encode_batch(examples.starts, add_special_tokens=False)
        flat = [ending for endings in examples.endings for ending in endings]
        sequences = []
        cut = 0
        for i, ending in enumerate(tokenizer.encode_batch(flat, add_special_tokens=False)):
            a, b = starts[i // choices].ids, ending.ids
            keep_a, keep_b = kept_of_pair(len(a), len(b), max_length - 3)
            cut += keep_a < len(a) or keep_b < len(b)
            sequences.append(sequence_of(a[:keep_a], b[:keep_b], special))
        labels = {} if examples.labels is None else {"labels": examples.labels}
        self.examples, self.tokenizer = examples, tokenizer
        self.features = Features.of(sequences, choices=choices, example_labels=labels)
        self.notes = list(examples.notes)
        if cut:
            self.notes.append(f"{cut} of {len(flat)} sequences cut to {max_length} tokens")

    def __len__(self) -> int:
        return len(self.features)


def _ending_columns(table: Table) -> list[str]:
    """The column of the lists of endings, or one column for each ending."""
    numbered = [f"ending{n}" for n in range(len(table.columns)) if f"ending{n}" in table.columns]
    if numbered:
        return numbered
    if _GOLD in table.columns:
        return [_GOLD, *(table.require(name, "an ending") for name in _DISTRACTORS)]
    listed = table.find(ENDINGS_COLUMNS)
    if listed is None:
        raise ValueError(
            f"{table.path}: no columns for the endings (ending0, ending1, ..; {_GOLD}; "
            f"{', '.join(ENDINGS_COLUMNS)}); {table.found}"
        )
    return [listed]


def _endings(row: Row, columns: Sequence[str]) -> list[str]:
    if columns[0] in ENDINGS_COLUMNS:
        return list(row.texts(columns[0]))
    return [row.text(column) for column in columns]


def _label(row: Row, choices: int) -> int:
    value = row.value("label")
    if not isinstance(value, bool) and str(value).strip() in map(str, range(choices)):
        return int(value)
    allowed = ", ".join(map(str, range(choices)))
    raise row.error(f"label {value!r} is not allowed; allowed: {allowed}")
