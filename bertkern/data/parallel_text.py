"""Texts with their translations, from files and from the Hugging Face hub.

    .tsv .txt .csv         two columns, or some, of which source_column and target_column are read
    .jsonl .ndjson .json   objects with these two; or with a "translation", an object that has them:
                           {"translation": {"en": …, "de": …}}, as wmt's sets have it
    .parquet               the same columns of a table (needs pyarrow)
    .po .mo                gettext catalogues (need babel), see `catalogues`
    hub:NAME[:CONFIG][:SPLIT]   a dataset of the hub (needs datasets); split `train`
    two files of lines     line n of one is the translation of line n of the other

The header of a TSV or CSV file has the names of the columns. A file with two columns needs none:
then they are source and target; two language codes (en, de) are a header, too. With numbers for
names ("1", "2") the columns of a file without header are counted from 1.

A folder stands for the files of these types in it, and those in its folders, in the order of their
names; a pattern such as `de/*.mo` for the files that match. White space is normalised. A pair with
an empty side is left out; anything malformed is an error that names file and line.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .catalogues import CATALOGUES, read_catalogue, strip_accelerators
from .hub import HUB, hub_rows
from .parquet import PARQUET, parquet_rows
from .sources import expand, text_lines
from .tables import KINDS, Row, lines_of, read_table, read_utf8

SOURCE_COLUMN, TARGET_COLUMN = "source", "target"
TRANSLATION = "translation"  # the object of wmt's sets
_LANGUAGE = re.compile(r"[a-z]{2}([-_][A-Za-z]{2,4})?")
_HEAD = 100_000  # characters that a first record is looked for in
_TYPES = (*KINDS, *PARQUET, *CATALOGUES)


@dataclass(frozen=True)
class Pair:
    """A text, its translation, and where they stand ("de.po: line 12"), for messages."""

    source: str
    target: str
    where: str


def read_parallel(
    sources: Iterable[str | os.PathLike[str]],
    source_column: str = SOURCE_COLUMN,
    target_column: str = TARGET_COLUMN,
    *,
    unique: bool = False,
    accelerators: bool = True,
    skip_damaged: bool = False,
    notes: list[str] | None = None,
) -> list[Pair]:
    """The pairs of files, folders, patterns and hub names, in order.

    Args:
        sources: as above. All are looked up before the first is read.
        source_column, target_column: of tables and hub names.
        unique: of pairs with the same two texts keep the first.
        accelerators: keep the marks of keys in the menus of catalogues ("_Open", "&Open").
        skip_damaged: leave out a file with an error, as one bad catalogue in a folder of many.
        notes: gets what was left out, for people.

    Raises:
        FileNotFoundError: a file is missing, a pattern matches none, or a folder has none.
        ValueError: a malformed line, a missing column, a damaged file, or no pair at all.
        ModuleNotFoundError: a package is missing that a source needs; it is named.
        ConnectionError: the hub is not reached, or does not have the dataset.
    """
    names = [os.fspath(source) for source in sources]
    places = [place for name in names for place in _places(name)]
    notes = [] if notes is None else notes

    def found() -> Iterator[Pair]:
        for place in places:
            try:
                pairs = _read(place, source_column, target_column, accelerators)
                # of a file that is left out no pair is taken
                yield from list(pairs) if skip_damaged else pairs
            except ValueError as error:
                if not skip_damaged:
                    raise
                notes.append(f"left out: {error}")

    return _kept(found(), ", ".join(names) or "an empty list of files", unique, notes)


def read_line_files(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    unique: bool = False,
    notes: list[str] | None = None,
) -> list[Pair]:
    """The pairs of two UTF-8 files that belong together line by line.

    Args:
        source, target: the files.
        unique, notes: as `read_parallel`.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: they have different numbers of lines, are not UTF-8, or there is no pair.
    """
    source, target = Path(source), Path(target)
    for path in (source, target):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    return _kept(_line_pairs(source, target), f"{source} and {target}", unique, notes)


def _kept(found: Iterable[Pair], origin: str, unique: bool, notes: list[str] | None) -> list[Pair]:
    """The pairs with white space normalised, without the empty and, if so, the repeated."""
    pairs: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    empty, repeated = 0, 0
    for pair in found:
        texts = " ".join(pair.source.split()), " ".join(pair.target.split())
        if not all(texts):
            empty += 1
        elif unique and texts in seen:
            repeated += 1
        else:
            pairs.append(Pair(*texts, pair.where))
            if unique:
                seen.add(texts)
    if not pairs:
        raise ValueError(f"no pairs in {origin}" + (f": {empty} have an empty side" * bool(empty)))
    if notes is not None:
        if empty:
            notes.append(f"{empty} pair(s) with an empty side left out")
        if repeated:
            notes.append(f"{repeated} repeated pair(s) left out")
    return pairs


def _places(name: str) -> list[str]:
    if not os.path.isdir(name):
        return expand(name)
    files = sorted(str(p) for p in Path(name).rglob("*") if p.suffix in _TYPES and p.is_file())
    if not files:
        raise FileNotFoundError(f"{name}: no {', '.join(_TYPES)} files in this folder")
    return files


def _read(place: str, source: str, target: str, accelerators: bool) -> Iterator[Pair]:
    path = Path(place)
    if place.startswith(HUB):
        return _of_rows(hub_rows(place), source, target)
    if path.suffix in CATALOGUES:
        return _of_catalogue(path, accelerators)
    if path.suffix in PARQUET:
        return _of_rows(parquet_rows(path), source, target)
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{path}: the file's name must end in one of {', '.join(_TYPES)}")
    return _of_rows(_table_rows(path, source, target), source, target)


def _line_pairs(source: Path, target: Path) -> Iterator[Pair]:
    counts = [0, 0]
    for rows in zip_longest(text_lines(source), text_lines(target)):
        for side, row in enumerate(rows):
            counts[side] += row is not None
        if all(rows):
            (number, text), (_, translation) = rows
            yield Pair(text, translation, f"{source}: line {number}")
    if counts[0] != counts[1]:
        raise ValueError(
            f"{source} has {counts[0]} lines, but {target} has {counts[1]}: line n of one must be "
            "the translation of line n of the other"
        )


def _of_catalogue(path: Path, accelerators: bool) -> Iterator[Pair]:
    for source, target, where in read_catalogue(path):
        if not accelerators:
            source, target = strip_accelerators(source, target)
        yield Pair(source, target, f"{path}: {where}")


def _of_rows(rows: Iterable[Row], source: str, target: str) -> Iterator[Pair]:
    for row in rows:
        inner = row.fields.get(TRANSLATION)
        if isinstance(inner, Mapping) and source not in row.fields:
            row = Row(f"{row.where}: {TRANSLATION}", dict(inner))
        yield Pair(row.text(source), row.text(target), row.where)


def _table_rows(path: Path, source: str, target: str) -> Sequence[Row]:
    """The rows of a table, with their fields under the names `source` and `target`."""
    kind = KINDS[path.suffix.lower()]
    if kind not in ("tsv", "csv"):
        return read_table(path).rows
    first = _first_fields(path, kind)
    if source in first and target in first:
        return read_table(path).rows
    if source.isdecimal() and target.isdecimal():
        return read_table(path, [str(n) for n in range(1, len(first) + 1)]).rows
    if (source, target) != (SOURCE_COLUMN, TARGET_COLUMN) or len(first) != 2:
        table = read_table(path)
        table.require(source, "the source")
        table.require(target, "the target")
    rows = read_table(path, (source, target)).rows
    return rows[1:] if all(map(_LANGUAGE.fullmatch, first)) else rows


def _first_fields(path: Path, kind: str) -> list[str]:
    text = read_utf8(path)
    if kind == "csv":
        records: Iterable[list[str]] = csv.reader(io.StringIO(text[:_HEAD], newline=""))
    else:
        records = (line.split("\t") for _, line in lines_of(text))
    return next((record for record in records if any(map(str.strip, record))), [])
