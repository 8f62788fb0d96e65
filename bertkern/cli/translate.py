"""bertkern translate: texts from one language into the other, by a trained Transformer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import lines
from .console import CommandError, out, pick_device

if TYPE_CHECKING:
    from bertkern.models import Alternative, Sampling, Translation

_BEAM_SIZE = 4
_COLUMNS = (
    "source",
    "line",
    "id",
    "text",
    "rank",
    "translation",
    "score",
    "unfinished",
    "truncated",
)


def translate(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder that `bertkern train-translation` has written."),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to translate; without any, and without --file, the lines of the standard "
            "input."
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            help='Texts, one a line, JSON lines {"text"}, or .tsv and .csv with a column `text`; '
            "`-` is the standard input.",
        ),
    ] = None,
    beam_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Hypotheses that the search follows at once; 1 takes the most probable token "
            f"at each step. Without it: {_BEAM_SIZE}, or --alternatives and 1 if that is more.",
        ),
    ] = None,
    length_penalty: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Score = log-probability / ((5 + length) / 6)^this; larger prefers longer.",
        ),
    ] = 0.6,
    alternatives: Annotated[
        int, typer.Option(min=0, help="Further translations of each text.")
    ] = 0,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most tokens of a translation. Without it: 50 more than its text has."
        ),
    ] = None,
    max_source_length: Annotated[
        int, typer.Option(min=2, help="Longer texts are cut to so many tokens.")
    ] = 512,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw translations in place of searching the best.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of --sample: below 1 prefers probable tokens. Without it: 1."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Of --sample: only so many of the most probable tokens."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Of --sample: only the most probable tokens that sum to this."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of --sample: another seed, other translations. Without it: 0."),
    ] = None,
    output: lines.OutOption = None,
    format: lines.FormatOption = None,
    input: lines.InputOption = None,
    batch_size: lines.BatchSizeOption = 32,
    window: lines.WindowOption = 512,
    device: lines.DeviceOption = "auto",
) -> None:
    """Translate texts with a Transformer that was trained on parallel text.

    As plain text there is one translation for each line, also for empty lines, so that line n of
    the results belongs to line n of the input; line breaks inside a translation become spaces.

    Example: bertkern translate "File not found" --model en-de
    """
    from bertkern.models import Translate

    if texts and files:
        raise CommandError("give texts or --file, not both")
    num = 1 + alternatives
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling = _sampling(sample, drawn, beam_size)
    if beam_size is not None and beam_size < num:
        raise CommandError(
            f"--alternatives {alternatives} needs --beam-size {num} or more, not {beam_size}"
        )
    kind = lines.choose_format(format, output, files, plain=alternatives == 0)
    translator = Translate.from_pretrained(
        model, pick_device(device), max_source_length=max_source_length
    )
    records = (
        lines.argument_records({"text": text} for text in texts)
        if texts
        else lines.read_records(files or [lines.STDIN], input, keep_empty=True)
    )
    lines.write_results(
        lines.results(
            (_item(line, record) for line, record in records),
            lambda them: translator.stream(
                them,
                beam_size=beam_size or max(_BEAM_SIZE, num),
                length_penalty=length_penalty,
                num=num,
                sampling=sampling,
                max_length=max_length,
                batch_size=batch_size,
                window=window,
            ),
        ),
        _fields,
        lines.Output(output, kind, _COLUMNS, _flatten, _show, _plain),
        "texts",
        max_source_length,
    )


def _sampling(sample: bool, options: dict[str, Any], beam_size: int | None) -> "Sampling | None":
    """What --sample and its options ask for; None without it.

    Raises:
        CommandError: options that do not go together.
    """
    from bertkern.models import Sampling

    given = {name: value for name, value in options.items() if value is not None}
    if sample:
        if beam_size is not None:
            raise CommandError("give --sample or --beam-size, not both")
        return Sampling(**given)
    if given:
        raise CommandError(f"--{next(iter(given)).replace('_', '-')} needs --sample")
    return None


def _item(line: lines.Line, record: lines.Row) -> lines.Item:
    text = lines.text_field(line, record, "text")
    return lines.Item(line, {**line.place, **lines.identity(record), "text": text}, text)


def _fields(result: "Translation") -> lines.Row:
    best = _translation(result)
    others = [_translation(other) for other in result.alternatives]
    return {**best, "alternatives": others} if others else best


def _translation(one: "Translation | Alternative") -> lines.Row:
    unfinished = {} if one.finished else {"unfinished": True}
    return {"translation": one.text, "score": round(one.score, 6), **unfinished}


def _flatten(record: lines.Row) -> Iterator[lines.Row]:
    shared = {name: value for name, value in record.items() if name != "unfinished"}
    for rank, one in enumerate(_ranked(record), start=1):
        yield {**shared, "rank": rank, **one}


def _ranked(record: lines.Row) -> list[lines.Row]:
    """The translations of a record, best first."""
    names = ("translation", "score", "unfinished")
    best = {name: record[name] for name in names if name in record}
    return [best, *record.get("alternatives", [])]


def _plain(record: lines.Row) -> str:
    return " ".join(record["translation"].splitlines())


def _show(record: lines.Row) -> None:
    out.print(record["text"], markup=False, style="bold", soft_wrap=True)
    for one in _ranked(record):
        note = "  (cut)" if "unfinished" in one else ""
        out.print(f"{one['score']:8.2f}  {one['translation']}{note}", markup=False, soft_wrap=True)
