"""Texts, or pairs of texts, with a class or a score: GLUE's files, SuperGLUE's, and a user's own.

    [CLS] A [SEP]    or    [CLS] A [SEP] B [SEP]

GLUE (Wang et al. 2019, arXiv 1804.07461): TSV files with a header, of which RTE's is
`index sentence1 sentence2 label` with 0 = entailment, 1 = not_entailment; CoLA's have none.
SuperGLUE's RTE: JSON lines with premise, hypothesis, label. Any other table (`tables`) whose
columns are named, or have common names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .features import Features, check_max_length, kept_of_pair, sequence_of
from .tables import Row, Table, UniqueIds, read_table
from .tokenizer import SpecialIds

PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("text1", "text2"),
)
"""Columns of the two texts, as GLUE, SuperGLUE and most others call them."""

TEXT_COLUMNS = ("sentence", "text", "review", "content", "title", "comment", "tweet")
KNOWN_COLUMNS = ", ".join([*(" and ".join(pair) for pair in PAIR_COLUMNS), *TEXT_COLUMNS])
LABEL_COLUMNS = (
    "label",
    "gold_label",
    "Quality",
    "is_duplicate",
    "score",
    "labels",
    "class",
    "category",
    "target",
)
INDEX_COLUMNS = ("index", "idx", "id")
NO_CONSENSUS = "-"  # MNLI's and SNLI's gold_label where the annotators disagree
MOST_GUESSED_CLASSES = 20  # of labels such as 3.0, which may be classes or scores
UNKNOWN = "-1"  # every label of a test file whose labels are kept secret, as exported by some

_COLA = ("source", "label", "star", "sentence")


@dataclass(frozen=True)
class ClassificationExamples:
    """The examples of a file.

    Attributes:
        source: the file.
        texts: the first texts, or the only ones.
        pairs: the second texts, or None.
        labels: class numbers, int64 [E]; scores, float32 [E], for regression; None without labels.
        label_names: the name of each class; None for regression, or without labels.
        ids: the index of each example, for a predictions file.
        notes: what was passed over or stands out, for people.
    """

    source: str
    texts: list[str]
    pairs: list[str] | None
    labels: NDArray[Any] | None
    label_names: list[str] | None
    ids: list[str]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def regression(self) -> bool:
        """Whether the labels are scores."""
        return self.labels is not None and self.label_names is None

    def subset(self, examples: Sequence[int]) -> ClassificationExamples:
        """The examples of the given numbers."""
        return replace(
            self,
            texts=[self.texts[i] for i in examples],
            pairs=None if self.pairs is None else [self.pairs[i] for i in examples],
            labels=None if self.labels is None else self.labels[np.asarray(examples)],
            ids=[self.ids[i] for i in examples],
            notes=[],
        )


def read_classification(
    path: str | os.PathLike[str],
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    label_names: Sequence[str] | None = None,
    regression: bool | None = None,
    labelled: bool | None = None,
) -> ClassificationExamples:
    """Read a file of examples.

    Args:
        path: .tsv, .csv, .jsonl or .json, see `tables`.
        text, text_pair, label: columns; None: the first common names that the file has.
        label_names: the classes in order; another label is an error. None: those of the file,
            sorted, numbers as numbers; 1.0 is the class 1 where all labels are whole numbers.
        regression: whether labels are scores. None: they are if they are numbers and not all whole,
            or more than MOST_GUESSED_CLASSES different ones, all written with a decimal point. A
            note says so where the file leaves a doubt.
        labelled: True: a file without labels is an error; False: labels are not looked at; None:
            either way, and labels that are all -1 are none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as read_table; a column that is missing; a label that is missing, not allowed or
            not a number; an index that comes twice. File and line are named.
    """
    table = read_table(path)
    if _is_cola(table):
        table = read_table(path, columns=_COLA)
    columns = _text_columns(table, text, text_pair)
    label_column = _label_column(table, label, columns, labelled)
    notes = [f"{table.blank_lines} blank line(s) passed over"] if table.blank_lines else []
    rows = table.rows
    if label_column is not None:
        rows = [row for row in rows if row.fields.get(label_column) != NO_CONSENSUS]
        if len(rows) < len(table.rows):
            without = len(table.rows) - len(rows)
            notes.append(f"{without} example(s) left out, whose label is {NO_CONSENSUS!r}")
        if not rows:
            raise ValueError(f"{path}: every label is {NO_CONSENSUS!r}")
    labels, names = None, None
    if label_column is not None and labelled is None and _all_unknown(rows, label_column):
        notes.append(f"every label is {UNKNOWN}: taken as not labelled")
    elif label_column is not None:
        if regression is None and label_names is None:
            regression, doubt = _guess_regression(rows, label_column)
            notes += doubt
        labels, names = _labels(rows, label_column, label_names, bool(regression))
    texts = [[row.text(column) for row in rows] for column in columns]
    empty = sum(not value.strip() for value in texts[0])
    if empty:
        notes.append(f"{empty} text(s) of {columns[0]!r} are empty")
    return ClassificationExamples(
        source=str(path),
        texts=texts[0],
        pairs=texts[1] if len(texts) > 1 else None,
        labels=labels,
        label_names=names,
        ids=_ids(table, rows),
        notes=notes,
    )


class ClassificationData:
    """Examples as token ids.

    Args:
        examples: what read_classification gives.
        tokenizer: with BERT's special tokens.
        max_length: most tokens of a sequence; of a pair, the longer text is cut first.

    Attributes:
        examples, tokenizer: what was given.
        features: the examples' ids, with `labels` where there are any.
        notes: the examples', and how many were cut.
    """

    def __init__(
        self, examples: ClassificationExamples, tokenizer: Tokenizer, max_length: int = 128
    ) -> None:
        check_max_length(max_length, 2 if examples.pairs is None else 3)
        special = SpecialIds.of(tokenizer)
        first = tokenizer.encode_batch(examples.texts, add_special_tokens=False)
        second = None
        if examples.pairs is not None:
            second = tokenizer.encode_batch(examples.pairs, add_special_tokens=False)
        sequences = []
        cut = 0
        for e, encoding in enumerate(first):
            a, b = encoding.ids, None if second is None else second[e].ids
            if b is None:
                cut += len(a) > max_length - 2
                a = a[: max_length - 2]
            else:
                keep_a, keep_b = kept_of_pair(len(a), len(b), max_length - 3)
                cut += keep_a < len(a) or keep_b < len(b)
                a, b = a[:keep_a], b[:keep_b]
            sequences.append(sequence_of(a, b, special))
        labels = {} if examples.labels is None else {"labels": examples.labels}
        self.examples, self.tokenizer = examples, tokenizer
        self.features = Features.of(sequences, example_labels=labels)
        self.notes = list(examples.notes)
        if cut:
            self.notes.append(f"{cut} of {len(first)} examples cut to {max_length} tokens")

    def __len__(self) -> int:
        return len(self.features)


def _is_cola(table: Table) -> bool:
    """A file in CoLA's form: four fields, no header, the second 0 or 1, the third empty or *."""
    columns = table.columns
    return len(columns) == 4 and columns[1] in ("0", "1") and columns[2] in ("", "*")


def _text_columns(table: Table, text: str | None, text_pair: str | None) -> list[str]:
    if text is not None:
        given = [table.require(text, "the text")]
        return given + ([table.require(text_pair, "the second text")] if text_pair else [])
    if text_pair is not None:
        raise ValueError(f"text_pair = {text_pair!r} needs the column of the first text, too")
    columns = text_columns(table.columns)
    if not columns:
        raise ValueError(
            f"{table.path}: no column with a common name for the text ({KNOWN_COLUMNS}); "
            f"{table.found}; name the column (--text)"
        )
    return columns


def text_columns(columns: Collection[str]) -> list[str]:
    """Those of the text, or of both texts of a pair, by their common names; none where none is."""
    for pair in PAIR_COLUMNS:
        if all(column in columns for column in pair):
            return list(pair)
    return [name for name in TEXT_COLUMNS if name in columns][:1]


def _label_column(
    table: Table, label: str | None, texts: Sequence[str], labelled: bool | None
) -> str | None:
    if labelled is False:
        return None
    if label is not None:
        if labelled or label in table.columns:
            return table.require(label, "the label")
        return None
    column = table.find([name for name in LABEL_COLUMNS if name not in texts])
    if column is None and labelled:
        raise ValueError(
            f"{table.path}: no column with a common name for the label "
            f"({', '.join(LABEL_COLUMNS)}); {table.found}; name the column (--label)"
        )
    return column


def _all_unknown(rows: Sequence[Row], column: str) -> bool:
    return all(str(row.fields.get(column)).strip() in (UNKNOWN, f"{UNKNOWN}.0") for row in rows)


def _labels(
    rows: Sequence[Row], column: str, names: Sequence[str] | None, regression: bool
) -> tuple[NDArray[Any], list[str] | None]:
    """(labels [E], names of the classes or None for scores)."""
    if regression:
        return np.array([_score(row, column) for row in rows], dtype=np.float32), None
    values = [_label_text(row, column) for row in rows]
    if all(map(_is_whole, values if names is None else names)):
        values = [_without_decimals(value) for value in values]
    if names is None:
        names = sorted(set(values), key=_label_order)
        if len(names) < 2:
            raise ValueError(
                f"{rows[0].where}: every label is {names[0]!r}; two classes are needed at least"
            )
    number_of = {name: number for number, name in enumerate(names)}
    for row, value in zip(rows, values, strict=True):
        if value not in number_of:
            raise row.error(
                f"label {value!r} is not allowed; allowed: {', '.join(map(repr, number_of))}"
            )
    return np.array([number_of[value] for value in values], dtype=np.int64), list(names)


def _guess_regression(rows: Sequence[Row], column: str) -> tuple[bool, list[str]]:
    """(whether labels are scores, what to tell the user: nothing where it is beyond doubt)."""
    values = [_label_text(row, column) for row in rows]
    numbers = [_number(value) for value in values]
    if any(number is None for number in numbers):
        return False, []
    distinct = sorted({number for number in numbers if number is not None})
    low, high = f"{distinct[0]:g}", f"{distinct[-1]:g}"
    if not all(map(_is_whole, values)):
        return True, [
            f"labels are scores from {low} to {high}, as not all are whole numbers; "
            "--no-regression takes them for classes"
        ]
    integers = all(map(_is_integer, values))
    if not integers and len(distinct) > MOST_GUESSED_CLASSES:
        return True, [
            f"labels are scores from {low} to {high}, as there are {len(distinct)} of them, with "
            "decimals; --no-regression takes them for classes"
        ]
    if integers and len(distinct) <= MOST_GUESSED_CLASSES:
        return False, []
    return False, [
        f"labels are {len(distinct)} classes, whole numbers from {low} to {high}; --regression "
        "takes them for scores"
    ]


def _label_text(row: Row, column: str) -> str:
    value = row.value(column)
    if isinstance(value, bool):
        return "true" if value else "false"  # as JSON writes it
    if isinstance(value, (str, int, float)) and str(value).strip():
        return str(value).strip()
    raise row.error(f"{column!r} must be a label, not {value!r}")


def _label_order(name: str) -> tuple[bool, float, str]:
    number = _number(name)
    return number is None, number or 0.0, name


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_integer(value: str) -> bool:
    return value.lstrip("+-").isdigit()


def _is_whole(value: str) -> bool:
    number = _number(value)
    return number is not None and number.is_integer()


def _without_decimals(value: str) -> str:
    """1.0, as a table with gaps writes 1, is 1; what is no whole number stays as it is."""
    return str(int(float(value))) if _is_whole(value) and not _is_integer(value) else value


def _score(row: Row, column: str) -> float:
    number = _number(_label_text(row, column))
    if number is None:
        raise row.error(f"{column!r} must be a number, not {row.value(column)!r}")
    return number


def _ids(table: Table, rows: Sequence[Row]) -> list[str]:
    """Those of the file's index column, which must differ, or the place among the examples."""
    column = table.find(INDEX_COLUMNS)
    if column is None:
        return [str(number) for number in range(len(rows))]
    seen = UniqueIds()
    return [seen.add(str(row.value(column)), row.where) for row in rows]
