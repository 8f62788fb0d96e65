"""Builds the three data sets from the text at hand, in their official file formats.

    python -m bertkern.benchmarks.tasks.build OUT [--seed N]

    OUT/entailment    train.tsv, dev.tsv               GLUE's RTE     (entailment.py)
    OUT/questions     train-v1.1.json, dev-v1.1.json   SQuAD 1.1      (questions.py)
    OUT/endings       train.csv, val.csv               SWAG           (endings.py)
    OUT/card.json     how many examples, from what text, what rules of thumb reach

The text is the English that every Python carries (`standard_library_text`); no download. Whole
documents are held out, and an example whose text stands in training too is left out of them. The
same Python and the same seed give the same files.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from bertkern.data.files import write_text
from bertkern.data.text import Document, split_documents, standard_library_text
from bertkern.train.squad import exact_match, word_f1

from . import endings, entailment, questions
from .scores import Score, score

HELD_OUT = 0.3  # of the documents
MOST_OF_A_KIND = 0.2  # of the questions of a split: half of what is found is "What happens if ...?"
SIZES = {"entailment": (1600, 800), "questions": (1500, 600), "endings": (1500, 600)}

Example = TypeVar("Example")


@dataclass(frozen=True)
class Split(Generic[Example]):
    """Examples to train on and held-out ones.

    Attributes:
        train, held_out: examples.
        documents: the number of the document that each held-out example is from.
    """

    train: list[Example]
    held_out: list[Example]
    documents: list[int]


@dataclass(frozen=True)
class DataSets:
    """All three."""

    entailment: Split[entailment.Pair]
    questions: Split[questions.Question]
    endings: Split[endings.Ending]


def build(documents: Sequence[Document], seed: int = 0) -> DataSets:
    """The data sets of documents: at most as many examples as SIZES says.

    Raises:
        ValueError: fewer than four documents.
    """
    parts = split_documents(documents, HELD_OUT, seed)
    numbered = [list(enumerate(part)) for part in parts]

    def random(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, number])

    turned = [[(n, two) for n, d in part for two in entailment.pairs(d)] for part in numbered]
    asked = [
        [(n, question) for n, d in part for question in questions.questions(d, random(i))]
        for i, part in enumerate(numbered)
    ]
    halves = (SIZES["entailment"][0] // 2, SIZES["entailment"][1] // 2)
    going_on = [list(endings.endings(part, random(2 + i))) for i, part in enumerate(parts)]
    return DataSets(
        _each(_split(turned, lambda two: two[0].premise, halves, random(4))),
        _split(
            [
                _varied(found, size, random(5 + i))
                for i, (found, size) in enumerate(zip(asked, SIZES["questions"], strict=True))
            ],
            lambda question: question.question,
            SIZES["questions"],
            random(7),
        ),
        _split(going_on, lambda example: example.sent1, SIZES["endings"], random(8)),
    )


def _varied(
    found: Sequence[tuple[int, questions.Question]], size: int, random: np.random.Generator
) -> list[tuple[int, questions.Question]]:
    """Questions without those that are too many of one kind."""
    kinds: Counter[str] = Counter()
    kept = []
    for index in random.permutation(len(found)):
        kind = found[index][1].kind
        kinds[kind] += 1
        if kinds[kind] <= MOST_OF_A_KIND * size:
            kept.append(index)
    return [found[index] for index in sorted(kept)]


def _split(
    parts: Sequence[list[tuple[int, Example]]],
    text: Callable[[Example], str],
    sizes: tuple[int, int],
    random: np.random.Generator,
) -> Split[Example]:
    """Some of the examples, in random order; none held out whose text is trained on."""
    seen = {text(example).lower() for _, example in parts[0]}
    unseen = [(n, example) for n, example in parts[1] if text(example).lower() not in seen]
    train, held_out = (
        [found[index] for index in random.permutation(len(found))[:size]]
        for found, size in zip((parts[0], unseen), sizes, strict=True)
    )
    return Split([e for _, e in train], [e for _, e in held_out], [n for n, _ in held_out])


def _each(split: Split[tuple[entailment.Pair, entailment.Pair]]) -> Split[entailment.Pair]:
    """The two pairs of a premise behind one another."""
    train, held_out = (
        [pair for two in part for pair in two] for part in (split.train, split.held_out)
    )
    return Split(train, held_out, [number for number in split.documents for _ in range(2)])


def baselines(data: DataSets) -> dict[str, dict[str, Score]]:
    """What rules of thumb reach on the held-out part: accuracy, of questions exact match and F1."""
    found: dict[str, dict[str, Score]] = {"entailment": {}, "questions": {}, "endings": {}}
    for name, points in entailment.baselines(
        data.entailment.train, data.entailment.held_out
    ).items():
        found["entailment"][name] = score(points, data.entailment.documents)
    asked = data.questions
    for name, answers in questions.baselines(asked.train, asked.held_out).items():
        for figure, compare in (("exact", exact_match), ("f1", word_f1)):
            points = [
                compare(question.answer, answer)
                for question, answer in zip(asked.held_out, answers, strict=True)
            ]
            found["questions"][f"{name}, {figure}"] = score(points, asked.documents)
    for name, points in endings.baselines(data.endings.train, data.endings.held_out).items():
        found["endings"][name] = score(points, data.endings.documents)
    return found


def write(data: DataSets, folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write the files; the training and the held-out file of each data set."""
    paths = {
        "entailment": (folder / "entailment/train.tsv", folder / "entailment/dev.tsv"),
        "questions": (folder / "questions/train-v1.1.json", folder / "questions/dev-v1.1.json"),
        "endings": (folder / "endings/train.csv", folder / "endings/val.csv"),
    }
    writers: dict[str, Callable[[Sequence[Any]], str]] = {
        "entailment": rte_text,
        "questions": squad_text,
        "endings": swag_text,
    }
    for name, (train, held_out) in paths.items():
        split: Split[Any] = getattr(data, name)
        write_text(train, writers[name](split.train))
        write_text(held_out, writers[name](split.held_out))
    return paths


def rte_text(pairs: Sequence[entailment.Pair]) -> str:
    """GLUE's RTE: index, sentence1, sentence2, label between tabs."""
    rows = [
        f"{index}\t{pair.premise}\t{pair.hypothesis}\t{entailment.LABELS[pair.label]}\n"
        for index, pair in enumerate(pairs)
    ]
    return "index\tsentence1\tsentence2\tlabel\n" + "".join(rows)


def squad_text(asked: Sequence[questions.Question]) -> str:
    """SQuAD 1.1: JSON, questions by their passage."""
    paragraphs: dict[str, list[dict[str, Any]]] = {}
    for number, question in enumerate(asked):
        paragraphs.setdefault(question.passage, []).append(
            {
                "id": str(number),
                "question": question.question,
                "answers": [{"text": question.answer, "answer_start": question.start}],
            }
        )
    article = {
        "title": "Python's documentation",
        "paragraphs": [{"context": passage, "qas": qas} for passage, qas in paragraphs.items()],
    }
    return json.dumps({"version": "1.1", "data": [article]}, ensure_ascii=False, indent=1) + "\n"


def swag_text(examples: Sequence[endings.Ending]) -> str:
    """SWAG: CSV with the columns of its train.csv and val.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"ending{i}" for i in range(endings.CHOICES)]
    first = ("", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source")
    writer.writerow([*first, *names, "label"])
    for index, example in enumerate(examples):
        start = f"{example.sent1} {example.sent2}"
        row = (index, "standard-library", index, start, example.sent1, example.sent2, "gold")
        writer.writerow([*row, *example.endings, example.label])
    return text.getvalue()


def card(data: DataSets, seed: int) -> dict[str, Any]:
    """What was built, as JSON values."""
    reached = baselines(data)
    found: dict[str, Any] = {"python": platform.python_version(), "seed": seed}
    for name, rules in reached.items():
        split: Split[Any] = getattr(data, name)
        found[name] = {
            "train": len(split.train),
            "held_out": len(split.held_out),
            "held_out_documents": len(set(split.documents)),
            "baselines": {rule: asdict(value) for rule, value in rules.items()},
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, write, and say what rules of thumb reach."""
    parser = argparse.ArgumentParser(
        prog="python -m bertkern.benchmarks.tasks.build",
        description="Build RTE-, SQuAD- and SWAG-style data from Python's own documentation.",
    )
    parser.add_argument("out", type=Path, help="folder for the files, made if need be")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the choice")
    options = parser.parse_args(arguments)
    data = build(standard_library_text(), options.seed)
    write(data, options.out)
    found = card(data, options.seed)
    write_text(options.out / "card.json", json.dumps(found, indent=1) + "\n")
    for name in SIZES:
        print(f"{name}: {found[name]['train']} training, {found[name]['held_out']} held-out")
        for rule, value in found[name]["baselines"].items():
            print(f"    {rule}: {Score(**value)}")
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
