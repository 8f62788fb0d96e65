"""bertkern finetune: each task end to end from its files, and what it refuses."""

import json

import pytest

from bertkern.data.question_answering import read_questions
from bertkern.models import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

QUICK = ["--epochs", "1", "--batch-size", "4", "--device", "cpu"]
WORDS = ["model", "text", "token", "kernel", "loss", "word", "vector", "padding"]


@pytest.fixture
def start(pretrained_folder):
    return pretrained_folder


def rte(rows, labels=("entailment", "not_entailment")):
    lines = ["index\tsentence1\tsentence2\tlabel"]
    lines += [f"{i}\tThe {WORDS[i % 8]} {i}.\tEvery token.\t{labels[i % 2]}" for i in range(rows)]
    return "\n".join(lines) + "\n"


def swag(rows):
    lines = [",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,label"]
    lines += [
        f"{i},v,1,A B,The {WORDS[i % 8]}.,It,g,reads.,learns {i}.,{i % 2}" for i in range(rows)
    ]
    return "\n".join(lines) + "\n"


def conll(rows):
    return "\n\n".join(f"The O\n{WORDS[i % 8]} B-X\nreads O" for i in range(rows)) + "\n"


def squad(rows):
    paragraphs = []
    for i in range(rows):
        context = f"The {WORDS[i % 8]} {i} reads the text."
        answers = [{"text": WORDS[i % 8], "answer_start": 4}]
        qas = [{"id": f"q{i}", "question": "What reads?", "answers": answers}]
        paragraphs.append({"context": context, "qas": qas})
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})


TASKS = {
    "classification": ("train.tsv", rte, BertForSequenceClassification, "predictions.tsv"),
    "multiple-choice": ("train.csv", swag, BertForMultipleChoice, "predictions.csv"),
    "token-classification": (
        "train.conll",
        conll,
        BertForTokenClassification,
        "predictions.conll",
    ),
    "qa": ("train.json", squad, BertForQuestionAnswering, "predictions.json"),
}
WINDOWS = ["--max-length", "32", "--stride", "8", "--max-query-length", "8"]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_each_task(run, start, tmp_path, task):
    name, make, model_class, predictions = TASKS[task]
    (tmp_path / name).write_text(make(12))
    (tmp_path / f"test-{name}").write_text(make(5))
    out = tmp_path / "out"
    arguments = ["--train", tmp_path / name, "--test", tmp_path / f"test-{name}", "--out", out]
    options = WINDOWS if task == "qa" else []
    result = run(
        "finetune",
        task,
        *arguments,
        "-m",
        start,
        "--held-out",
        "0.25",
        *QUICK,
        *options,
    )
    assert result.exit_code == 0, result.output
    assert "no --dev: 3 of the 12 examples" in result.stdout
    assert "held out" in result.stdout
    assert "test" in result.stdout
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "history.json"} <= names
    assert {"metrics.json", "curves.png", "held_out", "test"} <= names
    assert (out / "test" / predictions).is_file()
    model_class.from_pretrained(out)
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["task"] == task
    assert stored["examples"]["held_out"] == 3
    assert stored["steps"] == 3  # 9 examples, 4 at once


def test_a_file_of_held_out_examples_and_resuming(run, refused, start, tmp_path):
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    train.write_text(rte(12))
    dev.write_text(rte(6))
    arguments = [
        "finetune",
        "classification",
        "--train",
        train,
        "--dev",
        dev,
        "-m",
        start,
    ]
    arguments += ["--out", tmp_path / "out", *QUICK]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "no --dev" not in result.stdout
    assert "95 % interval" in result.stdout
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "model.safetensors exists" in refused(*arguments) or "checkpoint" in refused(*arguments)
    again = run(*arguments, "--resume")
    assert again.exit_code == 0
    assert "already finished after" in again.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == first
    assert run(*arguments, "--overwrite").exit_code == 0
    line = refused(*arguments, "--resume", "--learning-rate", "1")
    assert "--learning-rate = 3e-05, not 1.0" in line


def test_own_columns(run, start, tmp_path):
    rows = "".join(f"{i},the {WORDS[i % 8]},{i / 4}\n" for i in range(12))
    (tmp_path / "own.csv").write_text("nr,what,points\n" + rows)
    arguments = ["--train", tmp_path / "own.csv", "--text", "what", "--label", "points"]
    result = run(
        "finetune",
        "classification",
        *arguments,
        "-m",
        start,
        "-o",
        tmp_path / "out",
        *QUICK,
    )
    assert result.exit_code == 0, result.output
    assert "pearson" in result.stdout
    note = "labels are scores from 0 to 2.75, as not all are whole numbers; --no-regression takes"
    assert note in " ".join(result.stdout.split())
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("classification", "a.tsv", rte(4) + "9\tcut\n", "a.tsv: line 6: 2 field(s)"),
        ("classification", "a.tsv", "words\tkind\na\tb\n", "found: 'words', 'kind'"),
        ("classification", "a.tsv", "", "a.tsv: the file is empty"),
        ("multiple-choice", "a.csv", swag(3).replace(",1\n", ",7\n"), "line 3: label '7' is not"),
        ("token-classification", "a.conll", "The O\nmodel\n", "a.conll: line 2: 1 column(s)"),
        ("qa", "a.json", squad(2)[:-9], "a.json: line 1: not JSON"),
        ("qa", "a.json", squad(2).replace(": 4", ": 5"), "question id 'q0': the answer"),
        ("qa", "a.txt", "x", "must end in .json or .jsonl"),
    ],
)
def test_bad_files_are_refused(refused, start, tmp_path, task, name, content, message):
    (tmp_path / name).write_text(content)
    out = tmp_path / "out"
    line = refused("finetune", task, "--train", tmp_path / name, "-m", start, "-o", out)
    assert message in line
    assert not out.exists()


def test_wrong_labels_of_the_held_out_file_are_refused(refused, start, tmp_path):
    (tmp_path / "train.tsv").write_text(rte(6))
    (tmp_path / "dev.tsv").write_text(rte(6, ("entailment", "neutral")))
    files = ["--train", tmp_path / "train.tsv", "--dev", tmp_path / "dev.tsv"]
    line = refused("finetune", "classification", *files, "-m", start, "-o", tmp_path / "out")
    assert "dev.tsv: line 3: label 'neutral' is not allowed" in line
    assert "'entailment', 'not_entailment'" in line


def test_other_refusals(refused, start, tmp_path):
    (tmp_path / "train.tsv").write_text(rte(6))
    arguments = [
        "finetune",
        "classification",
        "--train",
        tmp_path / "train.tsv",
        "-m",
        start,
    ]
    arguments += ["-o", tmp_path / "out"]
    assert "exclude one another" in refused(*arguments, "--resume", "--overwrite")
    assert "no checkpoint to resume from" in refused(*arguments, "--resume", *QUICK)
    assert "metric must be one of accuracy" in refused(*arguments, "--metric", "f2", *QUICK)
    none = ["finetune", "classification", "--train", tmp_path / "none.tsv", "-m", start]
    assert "none.tsv: no such file" in refused(*none, "-o", tmp_path / "out")
    nowhere = [*arguments[:4], "-m", tmp_path / "nowhere", "-o", tmp_path / "out"]
    assert "nowhere: no such folder" in refused(*nowhere)
    (tmp_path / "file").write_text("in the way")
    blocked = [*arguments[:-1], tmp_path / "file" / "out"]
    assert "cannot write to" in refused(*blocked)


def test_the_files_of_these_tests_are_squads(tmp_path):
    (tmp_path / "a.json").write_text(squad(3))
    assert [q.answers[0].text for q in read_questions(tmp_path / "a.json")] == WORDS[:3]
