"""Documents from files and from the Hugging Face hub, read one by one.

    .jsonl .ndjson .json   an object a line; its text column is a string, or a list of sentences
    .parquet               the same column of a table, read by row groups (needs pyarrow)
    hub:NAME[:CONFIG][:SPLIT]   a dataset of the hub, streamed (needs datasets); split `train`
    any other file         UTF-8 text; empty lines separate documents, as in BERT's own data format

A folder stands for the files of these types in it, and those in its folders, in the order of their
names; a pattern such as `news/*.jsonl` for the files that match. No more than a document, or some
rows of a table, is in memory at once.

A text is split into sentences where full stops say so, whatever its line ends; or, with
one_sentence_per_line, where its lines end, as in the files that BERT's own scripts read.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .hub import HUB, hub_rows
from .parquet import PARQUET, parquet_rows
from .tables import Row
from .text import HALF_PAIR, Document, has_half_pair, split_lines, split_sentences

Split = Callable[[str], Document]  # a text into its sentences

TEXT, JSON_LINES = (".txt",), (".jsonl", ".ndjson", ".json")


def stream_documents(
    sources: Iterable[str | os.PathLike[str]],
    text_column: str = "text",
    *,
    one_sentence_per_line: bool = False,
) -> Iterator[Document]:
    """The documents of files, folders, patterns and hub names, in order; those without text not.

    Args:
        sources: as above. All are looked up before the first is read.
        text_column: where tables and JSON lines have their text.
        one_sentence_per_line: lines are sentences, and are neither joined nor split; else sentences
            are found by `split_sentences`.

    Raises:
        FileNotFoundError: a file is missing, a pattern matches none, or a folder has none.
        ValueError: a malformed line; file and line are named.
        ModuleNotFoundError: a package is missing that a source needs; it is named.
        ConnectionError: the hub is not reached, or does not have the dataset.
    """
    found = [place for source in sources for place in expand(source)]
    split = split_lines if one_sentence_per_line else split_sentences
    return (d for place in found for d in _read(place, text_column, split) if d)


def read_documents(
    sources: Iterable[str | os.PathLike[str]],
    text_column: str = "text",
    *,
    one_sentence_per_line: bool = False,
) -> list[Document]:
    """All documents of the sources at once, for texts that memory holds; as `stream_documents`.

    Raises:
        ValueError: there is no text in them, besides what `stream_documents` raises.
    """
    names = [os.fspath(source) for source in sources]
    documents = list(
        stream_documents(names, text_column, one_sentence_per_line=one_sentence_per_line)
    )
    if not documents:
        raise ValueError(f"no text in {', '.join(names) or 'an empty list of files'}")
    return documents


def expand(source: str | os.PathLike[str]) -> list[str]:
    """The files (or the one hub name) that a source stands for.

    Raises:
        FileNotFoundError: there are none.
    """
    name = os.fspath(source)
    path = Path(name)
    if name.startswith(HUB):
        return [name]
    if path.is_file():
        return [name]
    if path.is_dir():
        types = (*TEXT, *JSON_LINES, *PARQUET)
        files = sorted(str(p) for p in path.rglob("*") if p.suffix in types and p.is_file())
        if not files:
            raise FileNotFoundError(f"{name}: no {', '.join(types)} files in this folder")
        return files
    if glob.has_magic(name):
        files = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
        if not files:
            raise FileNotFoundError(f"{name}: no file matches")
        return files
    raise FileNotFoundError(f"{name}: no such file")


def _read(place: str, text_column: str, split: Split) -> Iterator[Document]:
    suffix = Path(place).suffix
    if place.startswith(HUB):
        return _row_documents(hub_rows(place), text_column, split)
    if suffix in JSON_LINES:
        return _json_documents(Path(place), text_column, split)
    if suffix in PARQUET:
        rows = parquet_rows(Path(place), [text_column])
        return _row_documents(rows, text_column, split)
    return _text_documents(Path(place), split)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1 on, line without its end) of a UTF-8 file.

    Raises:
        ValueError: a line is not UTF-8; file, line and byte are named.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: not UTF-8 text: line {number} has the byte "
                    f"0x{line[error.start]:02x} at offset {error.start}"
                ) from error
            yield number, text.rstrip("\r\n")


def _text_documents(path: Path, split: Split) -> Iterator[Document]:
    lines: list[str] = []
    for _, text in text_lines(path):
        for line in text.split("\r"):  # the line ends of old Macs
            if line.strip():
                lines.append(line)
            elif lines:
                yield split("\n".join(lines))
                lines = []
    yield split("\n".join(lines))


def _json_documents(path: Path, text_column: str, split: Split) -> Iterator[Document]:
    for number, line in text_lines(path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON, one object a line ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: an object with the column {text_column!r} is needed, not {_kind(row)}"
            )
        _find(text_column, row, where)
        yield _document(row[text_column], text_column, where, split)


def _row_documents(rows: Iterable[Row], text_column: str, split: Split) -> Iterator[Document]:
    for row in rows:
        _find(text_column, row.fields, row.where)
        yield _document(row.fields[text_column], text_column, row.where, split)


def _find(text_column: str, columns: Iterable[str], where: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{where}: no column {text_column!r}; there are {', '.join(columns) or 'none'}"
        )


def _document(value: Any, text_column: str, where: str, split: Split) -> Document:
    if any(map(has_half_pair, value if isinstance(value, list) else [value])):
        raise ValueError(f"{where}: the column {text_column!r} {HALF_PAIR}")
    if isinstance(value, str):
        return split(value)
    if isinstance(value, list) and all(isinstance(sentence, str) for sentence in value):
        return [clean for sentence in value if (clean := " ".join(sentence.split()))]
    raise ValueError(
        f"{where}: the column {text_column!r} must hold a string or a list of strings, not "
        f"{_kind(value)}"
    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        other = next((type(v).__name__ for v in value if not isinstance(v, str)), "str")
        return f"a list of {other}"
    return type(value).__name__
