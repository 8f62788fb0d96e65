"""Rows that are read some at a time: of parquet files, and of the Hugging Face hub's datasets.

.parquet                    by row groups (needs pyarrow)
hub:NAME[:CONFIG][:SPLIT]   streamed (needs datasets); split `train`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tables import Row

PARQUET = (".parquet",)
HUB = "hub:"
_AT_ONCE = 1024  # rows


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a parquet file, with all columns or with these alone.

    Raises:
        ValueError: damaged, or a column is missing; those that there are are named.
        ModuleNotFoundError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise _missing("pyarrow", str(path)) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise ValueError(
                        f"{path}: no column {column!r}; there are {', '.join(names) or 'none'}"
                    )
            for rows in table.iter_batches(_AT_ONCE, columns=columns):
                for fields in rows.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", fields)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a parquet file ({error})") from error


def hub_rows(place: str) -> Iterator[Row]:
    """The rows of a dataset of the hub.

    Raises:
        ConnectionError: the hub is not reached, or does not have the dataset.
        ModuleNotFoundError: datasets is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _missing("datasets", place) from error
    name, config, split = (*place.removeprefix(HUB).split(":"), "", "")[:3]
    number = 0
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        stream: Iterator[Any] = iter(rows)
        while (fields := next(stream, None)) is not None:
            number += 1
            yield Row(f"{place}: row {number}", dict(fields))
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"{place}: cannot be read after {number} rows ({reason}); without a network, give files"
        ) from error


def _missing(package: str, place: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{place} needs the package {package}: pip install 'bertkern[data]'", name=package
    )
