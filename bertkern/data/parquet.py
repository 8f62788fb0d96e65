"""Rows of parquet files, read by row groups (needs pyarrow)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .tables import Row

PARQUET = (".parquet",)
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
        raise missing_package("pyarrow", str(path)) from error
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


def missing_package(package: str, place: str) -> ModuleNotFoundError:
    """The error of data that cannot be read without a package."""
    return ModuleNotFoundError(
        f"{place} needs the package {package}: pip install 'bertkern[data]'", name=package
    )
