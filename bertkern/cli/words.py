"""bertkern words: vectors of words from text, and what they say about words."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from . import lines, words_train
from .console import CommandError, need, out

if TYPE_CHECKING:
    from bertkern.models.word_vectors import WordVectors

app = typer.Typer(
    no_args_is_help=True, help="Vectors of words: train them, and ask what lies near what."
)

_PICTURED = 150  # words


class FileFormat(str, Enum):
    """The formats of word2vec."""

    text = "text"
    binary = "binary"


VectorsOption = Annotated[
    Path,
    typer.Option(
        "--vectors",
        "-m",
        help="Word vectors: .txt or .vec (word2vec's text format), .bin (its binary one); each "
        "also with .gz.",
    ),
]
FileOption = Annotated[
    list[str] | None,
    typer.Option(
        "--file", "-f", help="The words of a question on each line; `-` is the standard input."
    ),
]
CountOption = Annotated[int, typer.Option("--count", "-n", min=1, help="Words to find for each.")]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Read the first so many words of the file; they are the frequent."),
]


app.command("train")(words_train.train)


@app.command("nearest")
def nearest(
    vectors: VectorsOption,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Words; without any, and without --file, the standard input's."),
    ] = None,
    files: FileOption = None,
    count: CountOption = 10,
    limit: LimitOption = None,
    output: lines.OutOption = None,
    format: lines.FormatOption = None,
) -> None:
    """Find the words whose vectors lie nearest to a word's.

    Example: bertkern words nearest string integer -m vectors.bin
    """
    table = _load(vectors, limit)
    _answer(
        _questions([[word] for word in words or []], files, 1),
        lambda question: {"nearest": _ranked(table.nearest(question[0], count))},
        _Shape(("word",), _NEAREST, _flat_nearest, _show_nearest),
        output,
        lines.choose_format(format, output, files, few=bool(words)),
    )


@app.command("similarity")
def similarity(
    vectors: VectorsOption,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Two words; without any, and without --file, the standard input's."),
    ] = None,
    files: FileOption = None,
    limit: LimitOption = None,
    output: lines.OutOption = None,
    format: lines.FormatOption = None,
) -> None:
    """Compute the cosine similarity of two words: 1 for the same direction, 0 for unrelated ones.

    Example: bertkern words similarity integer float -m vectors.bin
    """
    table = _load(vectors, limit)
    _answer(
        _questions([words] if words else [], files, 2),
        lambda question: {"similarity": round(table.similarity(*question), 6)},
        _Shape(("a", "b"), ("similarity",), lambda record: [record], _show_similarity),
        output,
        lines.choose_format(format, output, files, few=bool(words)),
    )


@app.command("analogy")
def analogy(
    vectors: VectorsOption,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Three words; without any, and without --file, the standard input's."),
    ] = None,
    files: FileOption = None,
    count: CountOption = 5,
    limit: LimitOption = None,
    output: lines.OutOption = None,
    format: lines.FormatOption = None,
) -> None:
    """Find what is to the third word as the second is to the first.

    Example: bertkern words analogy object objects list -m vectors.bin
    """
    table = _load(vectors, limit)

    def answer(question: list[str]) -> lines.Row:
        a, b, c = question
        return {"nearest": _ranked(table.analogy(a, b, c, count))}

    _answer(
        _questions([words] if words else [], files, 3),
        answer,
        _Shape(("a", "b", "c"), _NEAREST, _flat_nearest, _show_nearest),
        output,
        lines.choose_format(format, output, files, few=bool(words)),
    )


@app.command("picture")
def picture(
    vectors: VectorsOption,
    path: Annotated[Path, typer.Option("--out", "-o", help="The picture, a .png file.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Words to show; without any, the first of the file (--count)."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=2, help="Words to show.")] = _PICTURED,
    skip: Annotated[
        int, typer.Option(min=0, help="Leave out the first so many, as `the`, `a`, `is`.")
    ] = 0,
) -> None:
    """Draw words on the plane in which they differ most (two principal components).

    Example: bertkern words picture -m vectors.bin --out words.png --skip 50
    """
    need("matplotlib", "train", "a picture of words")
    from bertkern.train.word_picture import draw_words

    if path.suffix.lower() != ".png":
        raise CommandError(f"--out {path}: the picture is a .png file")
    table = _load(vectors, None)
    shown = words or table.words[skip : skip + count]
    draw_words(table, shown, path)
    out.print(f"{len(shown)} words in {path}", markup=False, soft_wrap=True)


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="Word vectors.")],
    target: Annotated[Path, typer.Argument(help="What to write; its name says the format.")],
    source_format: Annotated[
        FileFormat | None, typer.Option("--from", help="Of a file whose name does not say it.")
    ] = None,
    target_format: Annotated[
        FileFormat | None, typer.Option("--to", help="Of a file whose name does not say it.")
    ] = None,
    limit: LimitOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Convert word vectors between word2vec's text and binary format.

    Example: bertkern words convert GoogleNews-vectors-negative300.bin.gz google.txt --limit 100000
    """
    from bertkern.models.word_vector_files import format_of
    from bertkern.models.word_vectors import WordVectors

    formats = [None if f is None else f.value for f in (source_format, target_format)]
    format_of(target, formats[1])
    if target.exists() and not overwrite:
        raise CommandError(f"{target} exists: choose another file, or allow --overwrite")
    table = WordVectors.load(source, formats[0], limit)
    table.save(target, formats[1])
    out.print(
        f"{len(table):,} words of {table.size} numbers in {target}", markup=False, soft_wrap=True
    )


def _load(path: Path, limit: int | None) -> "WordVectors":
    from bertkern.models.word_vectors import WordVectors

    return WordVectors.load(path, limit=limit)


class _Answer(NamedTuple):
    """The fields of an answer; words are never cut."""

    fields: lines.Row
    truncated: bool = False


class _Shape(NamedTuple):
    """How the answers of a command look: the names of a question's words, the columns behind them,
    a record as rows, and a record for a person."""

    names: tuple[str, ...]
    columns: tuple[str, ...]
    flatten: Callable[[lines.Row], Iterable[lines.Row]]
    show: Callable[[lines.Row], None]


_NEAREST = ("rank", "nearest", "similarity")


def _questions(
    given: list[list[str]], files: list[str] | None, size: int
) -> Iterator[tuple[lines.Line, list[str]]]:
    """The words of each question, of the command line or of the lines of files."""
    if given and files:
        raise CommandError("give words or --file, not both")
    if given:
        records = [(line, q) for q in given for line in [lines.Line("words", {}, " ".join(q))]]
        found: Iterable[tuple[lines.Line, list[str]]] = records
    else:
        read = lines.read_lines(files or [lines.STDIN])
        found = ((line, line.text.split()) for line in read)
    for line, words in found:
        if len(words) != size:
            raise line.error(f"{size} word(s) are needed, not {len(words)}: {line.text[:60]!r}")
        yield line, words


def _answer(
    questions: Iterable[tuple[lines.Line, list[str]]],
    compute: Callable[[list[str]], lines.Row],
    shape: _Shape,
    output: Path | None,
    format: lines.Format,
) -> None:
    """Answer questions, one by one, and write the answers."""
    from bertkern.models import InputError

    items = (
        lines.Item(line, {**line.place, **dict(zip(shape.names, words, strict=True))}, words)
        for line, words in questions
    )

    def stream(asked: Iterator[Any]) -> Iterator[_Answer]:
        for number, words in enumerate(asked):
            try:
                yield _Answer(compute(words))
            except ValueError as error:
                raise InputError(number, str(error)) from error

    columns = ("source", "line", *shape.names, *shape.columns)
    lines.write_results(
        lines.results(items, stream),
        lambda answer: answer.fields,
        lines.Output(output, format, columns, shape.flatten, shape.show),
        "questions",
        0,
    )


def _ranked(found: Sequence[tuple[str, float]]) -> list[lines.Row]:
    return [{"word": word, "similarity": round(cosine, 6)} for word, cosine in found]


def _flat_nearest(record: lines.Row) -> Iterator[lines.Row]:
    for rank, one in enumerate(record["nearest"], start=1):
        row = {"rank": rank, "nearest": one["word"], "similarity": one["similarity"]}
        yield {**record, **row}


def _show_nearest(record: lines.Row) -> None:
    asked = [record[name] for name in ("word", "a", "b", "c") if name in record]
    title = asked[0] if len(asked) == 1 else "{} : {} = {} : ?".format(*asked)
    out.print(title, markup=False, style="bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    for one in record["nearest"]:
        table.add_row("  ", one["word"], f"{one['similarity']:.3f}")
    out.print(table)


def _show_similarity(record: lines.Row) -> None:
    out.print(f"{record['a']}  {record['b']}  {record['similarity']:.3f}", markup=False)
