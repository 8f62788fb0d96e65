"""Tables of a user's data: TSV, CSV, JSON lines and JSON arrays, with the lines of their rows.

    .tsv .txt     fields between tabs, quotes are plain characters (as in GLUE's files)
    .csv          fields between commas, quoted as RFC 4180 says
    .jsonl        one JSON object a line
    .json         an array of objects, or one object a line

Every error names the file and the line (in an array of objects: the place in it), so that the line
can be put right. Nothing is guessed and nothing malformed is passed over; blank lines are counted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .text import HALF_PAIR, has_half_pair

KINDS = {
    ".tsv": "tsv",
    ".txt": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
}
"""File name's ending -> how it is read."""


@dataclass(frozen=True)
class Row:
    """One row: where it stands, for messages; its fields by column; its line, if it has one."""

    where: str
    fields: dict[str, Any]
    line: int | None = None

    def error(self, message: str) -> ValueError:
        """What is wrong with this row, to be raised."""
        return ValueError(f"{self.where}: {message}")

    def value(self, column: str) -> Any:
        """The field of a column.

        Raises:
            ValueError: the row has none; those that it has are named.
        """
        if column not in self.fields:
            raise self.error(f"no {column!r}; found: {', '.join(map(repr, self.fields))}")
        return self.fields[column]

    def text(self, column: str) -> str:
        """The field of a column, which must be text."""
        value = self.value(column)
        if not isinstance(value, str):
            raise self.error(f"{column!r} must be text, not {json.dumps(value)[:80]}")
        if has_half_pair(value):
            raise self.error(f"{column!r} {HALF_PAIR}")
        return value

    def texts(self, column: str) -> list[str]:
        """The field of a column, which must be a list of texts."""
        value = self.value(column)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(f"{column!r} must be a list of texts, not {json.dumps(value)[:80]}")
        if any(map(has_half_pair, value)):
            raise self.error(f"{column!r} {HALF_PAIR}")
        return value


@dataclass(frozen=True)
class Table:
    """Rows in the order of the file.

    Attributes:
        path: the file.
        columns: names in order; of JSON objects, of all rows together.
        rows: at least one.
        blank_lines: lines without any text, which were passed over.
    """

    path: Path
    columns: list[str]
    rows: list[Row]
    blank_lines: int = 0

    def find(self, candidates: Sequence[str]) -> str | None:
        """The first of the candidates that is a column."""
        return next((name for name in candidates if name in self.columns), None)

    def require(self, column: str, purpose: str) -> str:
        """The column itself.

        Raises:
            ValueError: the table has none of that name; those that it has are named.
        """
        if column not in self.columns:
            raise ValueError(f"{self.path}: no column {column!r} for {purpose}; {self.found}")
        return column

    @property
    def found(self) -> str:
        """The columns, for messages."""
        return f"found: {', '.join(map(repr, self.columns))}"


def read_table(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Table:
    """Read a table.

    Args:
        path: its ending says how it is read, see above.
        columns: names for the fields of a TSV or CSV file without a header; None: its first line
            names them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown ending, not UTF-8, a row with too many or too few fields, an open
            quote, malformed JSON, or no row at all.
    """
    path = Path(path)
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: the file's name must end in one of {', '.join(KINDS)}")
    text = read_utf8(path)
    if kind == "json":
        kind = "array" if text.lstrip().startswith("[") else "jsonl"
    if kind == "array":
        return _from_array(path, text)
    if kind == "jsonl":
        return _from_json_lines(path, text)
    return _from_fields(path, text, kind, columns)


def read_utf8(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, with the line and the byte, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_start = content.rfind(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {content.count(10, 0, error.start) + 1}: not UTF-8 "
            f"(byte 0x{content[error.start]:02x} at position {error.start - line_start + 1})"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line) of every line that ends in \n or \r\n; no other character ends one."""
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


def parse_json(text: str, where: str, first_line: int = 1) -> Any:
    """A JSON value.

    Raises:
        ValueError: malformed or cut off; `where` and the line and column are named.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{where}: line {line}: not JSON ({error.msg} at column {error.colno})"
        ) from error


@dataclass
class UniqueIds:
    """Ids seen so far and where; an id that comes again is an error."""

    seen: dict[str, str] = field(default_factory=dict)

    def add(self, identifier: str, where: str) -> str:
        """The id itself.

        Raises:
            ValueError: it was there before; both places are named.
        """
        if identifier in self.seen:
            raise ValueError(f"{where}: id {identifier!r} was already at {self.seen[identifier]}")
        self.seen[identifier] = where
        return identifier


def _from_fields(path: Path, text: str, kind: str, columns: Sequence[str] | None) -> Table:
    records = _csv_records(path, text) if kind == "csv" else _tsv_records(text)
    names = list(columns) if columns is not None else None
    rows: list[Row] = []
    blank = 0
    for line, values in records:
        if not any(value.strip() for value in values) and len(values) <= 1:
            blank += 1
            continue
        if names is None:
            names = values
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(
                    f"{path}: line {line}: the header names {', '.join(map(repr, repeated))} twice"
                )
            continue
        if len(values) != len(names):
            raise ValueError(
                f"{path}: line {line}: {len(values)} field(s), but there must be {len(names)}: "
                f"{', '.join(map(repr, names))}"
            )
        rows.append(Row(f"{path}: line {line}", dict(zip(names, values, strict=True)), line))
    # the end of the last line is no blank line
    blank -= kind == "tsv" and text.endswith("\n")
    return _table(path, names or [], rows, blank)


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines_of(text):
        yield number, line.split("\t")


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which the record begins, fields); fields may hold line breaks."""
    csv.field_size_limit(sys.maxsize)  # passages may be longer than the 131,072 of the module
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    first = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}: line {first}: not CSV ({error}; a quote that is not closed?)"
            ) from error
        yield first, values
        first = reader.line_num + 1


def _from_json_lines(path: Path, text: str) -> Table:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    blank = 0
    for number, line in lines_of(text):
        if not line.strip():
            blank += 1
            continue
        value = parse_json(line, str(path), number)
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}: line {number}: a JSON object was expected, not {line.strip()[:80]}"
            )
        rows.append(Row(f"{path}: line {number}", value, number))
        columns.update(dict.fromkeys(value))
    return _table(path, list(columns), rows, blank - text.endswith("\n"))


def _from_array(path: Path, text: str) -> Table:
    values = parse_json(text, str(path))
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for index, value in enumerate(values):
        where = f"{path}: [{index}]"
        if not isinstance(value, dict):
            raise ValueError(f"{where}: a JSON object was expected, not {json.dumps(value)[:80]}")
        rows.append(Row(where, value))
        columns.update(dict.fromkeys(value))
    return _table(path, list(columns), rows, 0)


def _table(path: Path, columns: list[str], rows: list[Row], blank_lines: int) -> Table:
    if not rows:
        raise ValueError(f"{path}: no rows")
    return Table(path, columns, rows, blank_lines)
