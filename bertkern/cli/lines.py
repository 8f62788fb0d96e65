"""What the commands on many texts share: inputs in, line by line, and rows out, as they come.

Nothing is held but the window that is being computed. A bad line is named by file and number; a
file of results is written whole or not at all.
"""

import csv
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, Protocol, TypeVar

import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from .console import CommandError, err, writable_folder

STDIN = "-"

Value = TypeVar("Value")
Row = dict[str, Any]
Write = Callable[[Row], None]


class Truncatable(Protocol):
    """A result that knows whether its input has been cut."""

    @property
    def truncated(self) -> bool:
        """Whether it has."""


Result = TypeVar("Result", bound=Truncatable)


class Input(str, Enum):
    """What a command reads."""

    text = "text"
    jsonl = "jsonl"
    table = "table"


class Format(str, Enum):
    """What a command writes; `text` is one plain line a result, of commands that have one."""

    jsonl = "jsonl"
    tsv = "tsv"
    csv = "csv"
    table = "table"
    text = "text"


_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = {
    **dict.fromkeys(_JSON_SUFFIXES, Input.jsonl),
    **dict.fromkeys((".tsv", ".csv"), Input.table),
}


# Options that the commands have in common.
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File for the results; without it the standard output."),
]
FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="Without it: by the name of --out; else a table on a terminal, JSON lines elsewhere "
        "(translate: text, one translation a line).",
    ),
]
InputOption = Annotated[
    Input | None,
    typer.Option(
        "--input",
        help="What a line is. Without it: JSON in files named .jsonl, .ndjson or .json, a row "
        "below a header in .tsv and .csv, else text.",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Most texts computed together.")]
WindowOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Inputs read before results are written, sorted by length among themselves; 1 answers "
        "each line as it comes.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class Line(NamedTuple):
    """One line of input, or what takes its place.

    Attributes:
        where: where it stands, for messages.
        place: the same for results, as {"source", "line"}.
        text: without the spaces around it; empty only where empty lines are kept.
    """

    where: str
    place: Row
    text: str

    def error(self, reason: str) -> CommandError:
        """What is wrong with this line, to be raised."""
        return CommandError(f"{self.where}: {reason}")


@dataclass(frozen=True)
class Item:
    """One input of a command.

    Attributes:
        line: where it comes from.
        given: what its result begins with: the place, the text, ...
        value: what is computed.
    """

    line: Line
    given: Row
    value: Any


@dataclass(frozen=True)
class Output:
    """Where results go, and how they look.

    Attributes:
        path: file, written whole or not at all; None is the standard output, where every result can
            be read at once.
        format: of `choose_format`.
        columns: of TSV and CSV.
        flatten: a record as rows of these columns.
        show: prints a record for a person.
        plain: a record as one line of text; None where the command has no such form.
    """

    path: Path | None
    format: Format
    columns: Sequence[str]
    flatten: Callable[[Row], Iterable[Row]]
    show: Callable[[Row], None]
    plain: Callable[[Row], str] | None = None


def read_lines(sources: Sequence[str], keep_empty: bool = False) -> Iterator[Line]:
    """Yield the lines of UTF-8 files, of which `-` is the standard input; empty ones if asked for.

    Raises:
        CommandError: a line is not UTF-8; says which byte of which line of which file.
        OSError: a file cannot be read.
    """
    for source in sources:
        binary = sys.stdin.buffer if source == STDIN else open(source, "rb")  # noqa: SIM115
        name = "standard input" if source == STDIN else source
        with binary:
            for number, raw in enumerate(binary, start=1):
                where = f"{name}: line {number}"
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise CommandError(
                        f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at position "
                        f"{error.start + 1})"
                    ) from error
                text = text.removeprefix("\ufeff").strip()
                if text or keep_empty:
                    yield Line(where, {"source": name, "line": number}, text)


def read_records(
    sources: Sequence[str], kind: Input | None, keep_empty: bool = False
) -> Iterator[tuple[Line, Row]]:
    """Yield lines with their fields: of a JSON object or a table's row, or {"text": the line}.

    Args:
        sources: files; `-` is the standard input.
        kind: what the lines are; None: what the file's name says, else text. Tables (.tsv and
            .csv with a header) are held in memory.
        keep_empty: also the empty lines of text, so that results stand in the lines of their
            inputs.

    Raises:
        CommandError: a line is no JSON object, or as `read_lines`.
        ValueError: a table is malformed, or comes from the standard input.
        OSError: a file cannot be read.
    """
    from bertkern.data.tables import read_table

    for source in sources:
        suffix = Path(source).suffix.lower()
        here = kind or _SUFFIXES.get(suffix, Input.text)
        if here is Input.table:
            if source == STDIN:
                raise CommandError("the standard input takes --input text or jsonl, not table")
            for row in read_table(source).rows:
                place = {"source": source, "line": row.line}
                yield Line(row.where, place, json.dumps(row.fields)), row.fields
            continue
        for line in read_lines([source], keep_empty and here is Input.text):
            yield line, parse_object(line) if here is Input.jsonl else {"text": line.text}


def argument_records(records: Iterable[Row]) -> Iterator[tuple[Line, Row]]:
    """The same for fields that stood on the command line."""
    for number, record in enumerate(records, start=1):
        yield Line(f"argument {number}", {}, json.dumps(record)), record


def parse_object(line: Line) -> Row:
    """The fields of a line that is a JSON object; CommandError if it is none."""
    try:
        record = json.loads(line.text)
    except ValueError as error:
        raise line.error(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise line.error(f"a JSON object was expected, not {line.text[:60]}")
    return record


def text_field(line: Line, record: Row, name: str) -> str:
    """A field that must be there and be text; CommandError if not."""
    if name not in record:
        raise line.error(f"no {name!r}; found: {', '.join(map(repr, record)) or 'nothing'}")
    if not isinstance(record[name], str):
        raise line.error(f"{name!r} must be text, not {json.dumps(record[name])[:60]}")
    return record[name]


def identity(record: Row) -> Row:
    """The "id" of a record that has one, to be written back."""
    return {"id": record["id"]} if "id" in record else {}


def results(
    items: Iterable[Item], stream: Callable[[Iterator[Any]], Iterator[Result]]
) -> Iterator[tuple[Item, Result]]:
    """Each input with its result, in order; what cannot be computed is named by its line.

    Args:
        items: the inputs.
        stream: gives the results of values in order, and may read ahead.

    Raises:
        CommandError: one input cannot be computed.
    """
    from bertkern.models import InputError

    waiting: deque[Item] = deque()
    done = 0

    def values() -> Iterator[Any]:
        for item in items:
            waiting.append(item)
            yield item.value

    try:
        for result in stream(values()):
            done += 1
            yield waiting.popleft(), result
    except InputError as error:
        raise waiting[error.index - done].line.error(error.reason) from error


def refuse_to_replace(out: Path | None, sources: Sequence[str] | None) -> None:
    """Raise CommandError where --out is one of the files that are read."""
    if out is None or not out.exists():
        return
    if any(
        source != STDIN and Path(source).exists() and out.samefile(source)
        for source in sources or ()
    ):
        raise CommandError(f"--out {out} is a file that is read: its text would be lost")


def choose_format(
    format: Format | None,
    out: Path | None,
    sources: Sequence[str] | None = None,
    few: bool = False,
    plain: bool = False,
) -> Format:
    """The format that the user asked for, or that --out's name or the terminal suggests.

    Args:
        format: of --format.
        out: of --out.
        sources: files that are read, none of which `out` may be.
        few: the inputs stood on the command line, so a person reads the results.
        plain: the command has results of one plain line, and writes them where nothing says
            otherwise; JSON lines else.

    Raises:
        CommandError: a table in a file, text from a command that has none, or results in place of
            what is read.
    """
    refuse_to_replace(out, sources)
    if out is not None and format is Format.table:
        raise CommandError("--format table is for the terminal; a file takes jsonl, tsv or csv")
    if format is Format.text and not plain:
        raise CommandError("--format text: the results of this command take jsonl, tsv or csv")
    if format is not None:
        return format
    otherwise = Format.text if plain else Format.jsonl
    if out is not None:
        named = {".tsv": Format.tsv, ".csv": Format.csv}
        named |= dict.fromkeys(_JSON_SUFFIXES, Format.jsonl)
        return named.get(out.suffix.lower(), otherwise)
    return Format.table if few or sys.stdout.isatty() else otherwise


@contextmanager
def replacing_output(out: Path) -> Iterator[Path]:
    """A temporary path that becomes the file `out` when the block succeeds.

    Raises:
        CommandError: `out` cannot be written.
    """
    from bertkern.data.files import replacing

    if out.is_dir():
        raise CommandError(f"cannot write to {out}: it is a folder")
    writable_folder(out.parent)
    with replacing(out) as part:
        yield part


def write_results(
    found: Iterable[tuple[Item, Result]],
    fields: Callable[[Result], Row],
    output: Output,
    what: str,
    longest: int,
) -> None:
    """Write a record for each result, as they come; say on stderr how many, and how many were cut.

    Args:
        found: of `results`.
        fields: a result's part of the record.
        output: where to.
        what: "texts", "questions", ...
        longest: tokens that a text is cut to.

    Raises:
        CommandError: the file cannot be written, or there is no input at all.
    """
    table = output.format is Format.table
    count = cut = 0
    with _writing(output) as write:
        for item, result in counted(found, what, shown=not table):
            record = {**item.given, **fields(result)}
            if result.truncated:
                record["truncated"] = True
            write(record)
            count, cut = count + 1, cut + result.truncated
        report(count, cut, what, longest, None if table else output.path or "standard output")


def report(count: int, cut: int, what: str, longest: int, target: object | None) -> None:
    """Say on stderr how many inputs there were, and how many of them have been cut.

    Args:
        target: where the results went; None: they were shown, so only what was cut is said.

    Raises:
        CommandError: none at all.
    """
    if count == 0:
        raise CommandError(f"no {what}: the input holds no line that is not empty")
    notes = []
    if target is not None:
        notes.append(f"{count} {what} -> {target}")
    if cut:
        notes.append(f"{cut} of {count} {what} cut to {longest} tokens")
    if notes:
        err.print("; ".join(notes), markup=False)


@contextmanager
def _writing(output: Output) -> Iterator[Write]:
    if output.path is None:
        write = output.show if output.format is Format.table else _writer(sys.stdout, output)
        yield _flushed(write)
        return
    with (
        replacing_output(output.path) as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        yield _writer(file, output)


def _flushed(write: Write) -> Write:
    def call(record: Row) -> None:
        write(record)
        sys.stdout.flush()

    return call


def _writer(file: IO[str], output: Output) -> Write:
    if output.format is Format.jsonl:
        return lambda record: write_json_line(file, record)
    if output.plain is not None and output.format is Format.text:
        plain = output.plain
        return lambda record: print(plain(record), file=file)
    dialect = "excel-tab" if output.format is Format.tsv else "excel"
    table = csv.DictWriter(
        file, output.columns, dialect=dialect, lineterminator="\n", extrasaction="ignore"
    )
    table.writeheader()
    return lambda record: table.writerows(output.flatten(record))


def write_json_line(file: IO[str], record: Row) -> None:
    """One JSON object, one line."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def counted(items: Iterable[Value], what: str, shown: bool) -> Iterator[Value]:
    """The items, with their number and rate on a terminal's stderr while they come."""
    columns = (
        TextColumn(f"{{task.completed}} {what}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=err, transient=True, disable=not (shown and err.is_terminal)
    ) as progress:
        task = progress.add_task("", total=None, rate="")
        for item in items:
            yield item
            speed = progress.tasks[0].speed
            progress.update(task, advance=1, rate=f"{speed:.0f} a second" if speed else "")
