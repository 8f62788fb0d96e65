"""bertkern fill-mask: what a pre-trained BERT would put in place of [MASK]."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import lines
from .console import CommandError, out, pick_device

if TYPE_CHECKING:
    from bertkern.models import FilledText

_COLUMNS = ("source", "line", "text", "mask", "rank", "token", "probability", "truncated")


def fill_mask(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Folder with config.json, model.safetensors, tokenizer."
        ),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts with \\[MASK] where a word is to be found; without any, and without "
            "--file, the lines of the standard input."
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--file", "-f", help='Texts, one a line, or JSON {"text"}; `-` is the standard input.'
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Words to show for each place.")] = 5,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", help="Guess only this word, or these when given several times."),
    ] = None,
    output: lines.OutOption = None,
    format: lines.FormatOption = None,
    input: lines.InputOption = None,
    batch_size: lines.BatchSizeOption = 32,
    window: lines.WindowOption = 512,
    device: lines.DeviceOption = "auto",
) -> None:
    """Show what a pre-trained BERT puts in place of \\[MASK].

    Example: bertkern fill-mask "the file is \\[MASK] for reading" --model demo-output/model
    """
    from bertkern.models import FillMask

    if texts and files:
        raise CommandError("give texts or --file, not both")
    kind = lines.choose_format(format, output, files, few=bool(texts))
    filler = FillMask.from_pretrained(model, pick_device(device))
    size = filler.model.config.vocab_size
    if top > size:
        raise CommandError(f"--top {top}: the vocabulary has {size} tokens")
    records = (
        lines.argument_records({"text": text} for text in texts)
        if texts
        else lines.read_records(files or [lines.STDIN], input)
    )
    items = (
        lines.Item(line, {**line.place, "text": text}, text)
        for line, record in records
        for text in (lines.text_field(line, record, "text"),)
    )
    lines.write_results(
        lines.results(items, lambda them: filler.stream(them, top, targets, batch_size, window)),
        _fields,
        lines.Output(output, kind, _COLUMNS, _flatten, _show),
        "texts",
        filler.max_length,
    )


def _fields(filled: "FilledText") -> lines.Row:
    return {
        "masks": [
            [{"token": g.token, "probability": round(g.probability, 7)} for g in guesses]
            for guesses in filled.masks
        ]
    }


def _flatten(record: lines.Row) -> Iterator[lines.Row]:
    for number, guesses in enumerate(record["masks"], start=1):
        for rank, guess in enumerate(guesses, start=1):
            yield {**record, "mask": number, "rank": rank, **guess}


def _show(record: lines.Row) -> None:
    masks = record["masks"]
    print_guesses(record["text"], [[(g["token"], g["probability"]) for g in m] for m in masks])


def print_guesses(text: str, guesses: Iterable[Sequence[tuple[str, float]]]) -> None:
    """Print a text and, for each of its [MASK]s, the words with their probabilities."""
    out.print(text, markup=False, style="bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    for words in guesses:
        table.add_row("  ", *[f"{word} {probability:.1%}" for word, probability in words])
    out.print(table)
