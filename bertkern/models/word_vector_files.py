"""The two file formats of word2vec (Mikolov et al. 2013), read and written.

    text     "N d\\n", then a line for each word: the word, and d decimal numbers, after spaces
    binary   "N d\\n", then for each word: the word, a space, d little-endian float32, "\\n"

Names tell them apart: .txt and .vec are text, .bin is binary; .gz behind them is compressed. What
other programs write is read as well: a space behind the last number (word2vec.c), no "\\n" between
the words of a binary file (gensim), no first line in a text file (GloVe).

Legend: N words, d numbers of a vector.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from bertkern.data.files import replacing

FORMATS = ("text", "binary")
_SUFFIXES = {".txt": "text", ".vec": "text", ".bin": "binary"}
_LONGEST_WORD = 1 << 12  # bytes; a file whose words do not end is damaged
_CHUNK = 1 << 20  # bytes read at once
_MOST_DIGITS, _MOST_NUMBERS = 18, 1 << 20  # of a count; of a vector: more is a damaged file
_FLOAT = np.dtype("<f4")


def format_of(path: Path, format: str | None) -> str:
    """ "text" or "binary": what is asked for, or what the name says.

    Raises:
        ValueError: neither does.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    found = format or _SUFFIXES.get(suffix)
    if found is None:
        raise ValueError(
            f"{path}: word vectors stand in files named {', '.join(_SUFFIXES)}, also with .gz "
            "behind; or say which format it has: text or binary"
        )
    return found


def write(
    path: str | os.PathLike[str],
    words: Sequence[str],
    vectors: NDArray[np.float32],
    format: str | None = None,
) -> None:
    """Write words and vectors, whole or not at all; numbers of text give the same float32 again.

    Raises:
        ValueError: as of `format_of`; a word is empty or has white space.
    """
    path = Path(path)
    is_text = format_of(path, format) == "text"
    for word in words:
        if word.split() != [word]:
            raise ValueError(f"{path}: the word {word!r} is empty or has white space")
    with (
        replacing(path) as temporary,
        _open(temporary, "wb", compressed=path.name.endswith(".gz")) as file,
    ):
        file.write(f"{len(words)} {vectors.shape[1]}\n".encode())
        for word, vector in zip(words, vectors, strict=True):
            if is_text:
                numbers = " ".join([f"{number:.9g}" for number in vector.tolist()])
                file.write(f"{word} {numbers}\n".encode())
            else:
                file.write(word.encode() + b" " + vector.astype(_FLOAT).tobytes() + b"\n")


def read(
    path: str | os.PathLike[str], format: str | None = None, limit: int | None = None
) -> tuple[list[str], NDArray[np.float32]]:
    """(words, vectors float32 [N, d]), of the first `limit` words where it is given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as of `format_of`; a damaged file, where it is damaged; limit is below 1.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read_words = _read_text if format_of(path, format) == "text" else _read_binary
    with _open(path, "rb", compressed=path.name.endswith(".gz")) as file:
        try:
            words, numbers, size = read_words(file, path, limit)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged, or not compressed by gzip ({error})") from error
    return words, np.frombuffer(numbers, _FLOAT).reshape(len(words), size).astype(np.float32)


def _open(path: Path, mode: str, compressed: bool) -> IO[Any]:
    return cast(IO[Any], gzip.open(path, mode) if compressed else open(path, mode))


def _header(line: bytes, path: Path) -> tuple[int, int] | None:
    """(N, d) of a first line that has two whole numbers and nothing else; ValueError if no file
    can hold so much."""
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields):
        return None
    if max(map(len, fields)) > _MOST_DIGITS or int(fields[1]) > _MOST_NUMBERS:
        raise ValueError(f"{path}: damaged: its first line is {line.strip().decode()[:60]!r}")
    return int(fields[0]), int(fields[1])


def _read_text(file: IO[bytes], path: Path, limit: int | None) -> tuple[list[str], bytearray, int]:
    words: list[str] = []
    numbers = bytearray()
    count: int | None = None  # of the words, where the first line says it
    size = 0
    for number, line in enumerate(file, start=1):
        where = f"{path}: line {number}"
        if number == 1:
            header = _header(line, path)
            if header is not None:
                count, size = header
                if min(header) < 1:
                    raise ValueError(f"{where}: {count} words of {size} numbers")
                continue
            size = len(line.split()) - 1
        if limit is not None and len(words) == limit:
            return words, numbers, size
        try:
            text = line.decode("utf-8").rstrip(" \r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x})") from error
        if count is not None and len(words) == count:
            if text:
                raise ValueError(f"{where}: more than the {count} words that the first line says")
            continue
        fields = text.rsplit(" ", size) if size else []  # the word may hold spaces
        if len(fields) != size + 1 or not fields[0]:
            raise ValueError(f"{where}: not a word and {size or 'some'} numbers")
        try:
            row = np.array(fields[1:], dtype=_FLOAT)
        except ValueError as error:
            raise ValueError(f"{where}: not a word and {size} numbers ({error})") from error
        words.append(fields[0])
        numbers += row.tobytes()
    if not words or (count is not None and len(words) < min(count, limit or count)):
        raise ValueError(f"{path}: damaged: it ends after {len(words)} of {count or 'some'} words")
    return words, numbers, size


def _read_binary(
    file: IO[bytes], path: Path, limit: int | None
) -> tuple[list[str], bytearray, int]:
    header = _header(file.readline(64), path)
    if header is None or min(header) < 1:
        raise ValueError(
            f"{path}: damaged, or not word2vec's binary format: its first line must hold two "
            "numbers, those of words and of a vector's numbers"
        )
    count, size = header
    width = size * _FLOAT.itemsize
    words: list[str] = []
    numbers = bytearray()
    buffer, start = b"", 0
    for row in range(1, min(count, limit or count) + 1):
        while (end := buffer.find(b" ", start)) < 0 or len(buffer) - end - 1 < width:
            more = file.read(max(_CHUNK, width))
            if not more or (end < 0 and len(buffer) - start > _LONGEST_WORD):
                raise ValueError(
                    f"{path}: damaged: it ends, or has no word, at word {row} of {count}"
                )
            buffer, start = buffer[start:] + more, 0
        try:
            word = buffer[start:end].lstrip(b"\n").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: damaged, or not UTF-8, at word {row} of {count}") from error
        if not word:
            raise ValueError(f"{path}: damaged: word {row} of {count} is empty")
        words.append(word)
        numbers += buffer[end + 1 : end + 1 + width]
        start = end + 1 + width
    if len(words) == count and (buffer[start:] + file.read(_CHUNK)).strip(b"\n"):
        raise ValueError(f"{path}: damaged: more than the {count} words that its first line says")
    return words, numbers, size
