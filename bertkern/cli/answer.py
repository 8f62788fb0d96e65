"""bertkern answer: answers that stand in texts, found by a BERT fine-tuned on questions."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from . import lines
from .console import CommandError, out, pick_device

if TYPE_CHECKING:
    from bertkern.models import Answered

_COLUMNS = ("source", "line", "id", "question", "answer", "start", "end", "score", "probability")
_AROUND = 60  # characters of the context shown on either side of an answer


def answer(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Folder of a BERT fine-tuned on questions.")
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help='SQuAD JSON, or JSON lines {"question", "context"} and, if you like, "id"; `-` or '
            "nothing is the standard input, JSON lines."
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Answer this question, and no file.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", "-c", help="The text that answers --question, or its file."),
    ] = None,
    n_best: Annotated[int, typer.Option(min=1, help="Answers ranked for each question.")] = 20,
    null_threshold: Annotated[
        float | None,
        typer.Option(
            help="For models trained with questions that have no answer: say so where the score of "
            "no answer exceeds that of the best one by more than this (0 is a good begin)."
        ),
    ] = None,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 30,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a window; 384, or as many as the model has.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; 128.")
    ] = None,
    output: lines.OutOption = None,
    format: lines.FormatOption = None,
    batch_size: lines.BatchSizeOption = 32,
    window: lines.WindowOption = 128,
    device: lines.DeviceOption = "auto",
) -> None:
    """Answer questions with words from a text, of any length.

    Example: bertkern answer -q "Who wrote it?" -c report.txt --model my-reader
    """
    from bertkern.models import Answer

    if (question is None) != (context is None):
        raise CommandError("--question and --context belong together")
    if question is not None and files:
        raise CommandError("give files or --question, not both")
    kind = lines.choose_format(format, output, files, few=question is not None)
    reader = Answer.from_pretrained(
        model, pick_device(device), max_length=max_length, stride=stride
    )
    if question is not None and context is not None:
        records = lines.argument_records([{"question": question, "context": _text_of(context)}])
    else:
        records = _questions(files or [lines.STDIN])
    found = lines.results(
        (_item(line, record, kind is lines.Format.table) for line, record in records),
        lambda them: reader.stream(
            them, n_best, null_threshold, max_answer_tokens, batch_size, window
        ),
    )
    lines.write_results(
        found,
        _fields,
        lines.Output(output, kind, _COLUMNS, lambda record: [record], _show),
        "questions",
        reader.settings.max_query_length,
    )


def _text_of(context: str) -> str:
    """The text of a file of that name, or the argument itself."""
    if not os.path.isfile(context):
        return context
    from bertkern.data.tables import read_utf8

    return read_utf8(context)


def _questions(sources: list[str]) -> Iterator[tuple[lines.Line, lines.Row]]:
    """The questions of files in order: JSON lines as they come, SQuAD's JSON when all is read."""
    for source in sources:
        if Path(source).suffix.lower() != ".json":
            yield from lines.read_records([source], lines.Input.jsonl)
            continue
        from bertkern.data.question_answering import read_questions

        for asked in read_questions(source):
            fields = {"id": asked.id, "question": asked.question, "context": asked.context}
            where = f"{source}: question id {asked.id!r}"
            yield lines.Line(where, {"source": source}, asked.question), fields


def _item(line: lines.Line, record: lines.Row, shown: bool) -> lines.Item:
    question, context = (lines.text_field(line, record, key) for key in ("question", "context"))
    given = {**line.place, **lines.identity(record), "question": question}
    if shown:  # a file of results has the places of the answers, not the text once more
        given["context"] = context
    return lines.Item(line, given, (question, context))


def _fields(answered: "Answered") -> lines.Row:
    ranked = [
        {
            "text": span.text,
            "start": span.start,
            "end": span.end,
            "score": round(span.score, 5),
            "probability": round(probability, 7),
        }
        for span, probability in answered.ranked
    ]
    best = answered.best
    probabilities = [probability for span, probability in answered.ranked if span == best]
    return {
        "answer": best.text,
        "start": best.start,
        "end": best.end,
        "score": round(best.score, 5),
        "probability": round(probabilities[0], 7) if probabilities else None,
        "null_difference": round(answered.null_difference, 5),
        "answers": ranked,
    }


def _show(record: lines.Row) -> None:
    context, start, end = record["context"], record["start"], record["end"]
    out.print(record["question"], markup=False, style="bold")
    if not record["answer"]:
        out.print("  the text does not answer it", style="italic")
    else:
        first, last = max(0, start - _AROUND), min(len(context), end + _AROUND)
        line = Text("  …" if first else "  ")
        line.append(" ".join(context[first:start].split()) + " " if first < start else "")
        line.append(record["answer"], style="bold green")
        line.append(context[end:last].replace("\n", " ") + ("…" if last < len(context) else ""))
        out.print(line)
    for entry in record["answers"][:5]:
        text = entry["text"] or "(no answer)"
        out.print(f"  {entry['probability']:7.1%}  {text}", markup=False)
