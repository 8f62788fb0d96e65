"""bertkern classify: the label of each text, or pair of texts, by a fine-tuned BERT."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from . import lines
from .console import CommandError, out, pick_device

if TYPE_CHECKING:
    from bertkern.models import Classification, Classify

_SHOWN_WIDTH = 60  # columns of a text in the table on a terminal


def classify(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder of a BERT fine-tuned for classification."),
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help='Texts, one a line, JSON lines {"text"} or {"text", "text_pair"}, or .tsv and '
            ".csv with a header; columns as `finetune classification` finds them. `-` or nothing "
            "is the standard input."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", "-t", help="Classify this text, and no file.")
    ] = None,
    pair: Annotated[
        str | None, typer.Option("--pair", help="The second text of --text, for a model of pairs.")
    ] = None,
    output: lines.OutOption = None,
    format: lines.FormatOption = None,
    input: lines.InputOption = None,
    batch_size: lines.BatchSizeOption = 32,
    window: lines.WindowOption = 512,
    device: lines.DeviceOption = "auto",
) -> None:
    """Give each text, or pair of texts, the label that a fine-tuned BERT finds most probable.

    The results hold the probability of every label, in the order of the inputs. A model of several
    labels at once gives all labels with a probability of 0.5 or more, a regression its value.

    Example: bertkern classify reviews.txt --model my-classifier --out labels.tsv
    """
    from bertkern.models import Classify

    if text is not None and files:
        raise CommandError("give files or --text, not both")
    if pair is not None and text is None:
        raise CommandError("--pair needs --text")
    kind = lines.choose_format(format, output, files, few=text is not None)
    classifier = Classify.from_pretrained(model, pick_device(device))
    if text is not None:
        given = {"text": text} if pair is None else {"text": text, "text_pair": pair}
        records = lines.argument_records([given])
    else:
        records = lines.read_records(files or [lines.STDIN], input)
    names = ["value"] if classifier.problem_type == "regression" else []
    columns = ("source", "line", "id", "text", "text_pair", "label", *names, *classifier.labels)
    lines.write_results(
        lines.results(
            (_item(line, record) for line, record in records),
            lambda them: classifier.stream(them, batch_size, window),
        ),
        _fields(classifier),
        lines.Output(output, kind, columns, _flatten, _show),
        "texts",
        classifier.max_length,
    )


def _item(line: lines.Line, record: lines.Row) -> lines.Item:
    from bertkern.data.classification import text_columns

    present = [name for name, value in record.items() if value is not None]
    names = text_columns(present) or ["text"]
    texts = [lines.text_field(line, record, name) for name in names]
    given = {**line.place, **lines.identity(record)}
    given |= dict(zip(("text", "text_pair"), texts, strict=False))
    return lines.Item(line, given, texts[0] if len(texts) == 1 else tuple(texts))


def _fields(classifier: "Classify") -> "Callable[[Classification], lines.Row]":
    def fields(result: "Classification") -> lines.Row:
        scores = {label: round(score, 7) for label, score in result.scores.items()}
        if classifier.problem_type == "regression":
            values = list(scores.values())
            return {"value": values[0]} if len(values) == 1 else {"values": scores}
        if classifier.problem_type == "multi_label_classification":
            return {"labels": list(result.labels), "probabilities": scores}
        return {"label": result.labels[0], "probabilities": scores}

    return fields


def _flatten(record: lines.Row) -> Iterator[lines.Row]:
    yield {"label": " ".join(record.get("labels", ())), **record, **_scores(record)}


def _scores(record: lines.Row) -> dict[str, float]:
    return record.get("probabilities") or record.get("values") or {}


def _show(record: lines.Row) -> None:
    text = " | ".join(record[key] for key in ("text", "text_pair") if key in record)
    shown = text if len(text) <= _SHOWN_WIDTH else text[: _SHOWN_WIDTH - 1] + "…"
    if "value" in record:
        found = f"{record['value']:.4g}"
    else:
        number = "{} {:.4g}" if "values" in record else "{} {:.1%}"
        ranked = sorted(_scores(record).items(), key=lambda entry: -entry[1])
        found = "  ".join(number.format(label, score) for label, score in ranked)
    out.print(shown.ljust(_SHOWN_WIDTH), found, markup=False, soft_wrap=True)
