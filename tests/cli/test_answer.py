"""bertkern answer."""

import json

import pytest

from bertkern.data import load_tokenizer, save_tokenizer
from bertkern.models import Answer, BertForQuestionAnswering

CONTEXT = "The loss falls when the model learns. " * 9
QUESTIONS = ["When does the loss fall?", "What learns?"]


@pytest.fixture
def folder(pretrained_folder, tmp_path):
    """A tiny reader."""
    folder = tmp_path / "reader"
    BertForQuestionAnswering.from_pretrained(
        pretrained_folder, new_head=True, num_labels=2
    ).save_pretrained(folder)
    save_tokenizer(load_tokenizer(pretrained_folder), folder)
    return folder


def expected_answers(folder, threshold=None):
    reader = Answer.from_pretrained(folder)
    return reader([(question, CONTEXT) for question in QUESTIONS], null_threshold=threshold)


def check(rows, folder):
    assert [row["question"] for row in rows] == QUESTIONS
    for row, found in zip(rows, expected_answers(folder), strict=True):
        assert (row["answer"], row["start"], row["end"]) == (
            found.best.text,
            found.best.start,
            found.best.end,
        )
        assert row["answer"] == CONTEXT[row["start"] : row["end"]] != ""
        assert row["answers"][0]["text"] == row["answer"]
        assert row["probability"] == row["answers"][0]["probability"]
        assert row["score"] == pytest.approx(found.best.score, abs=1e-4)


def test_json_lines(run, folder, tmp_path):
    path, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    records = [
        {"id": i, "question": question, "context": CONTEXT} for i, question in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = run("answer", path, "-m", folder, "-o", out)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1]
    check(rows, folder)
    piped = run("answer", "-m", folder, input=path.read_bytes())
    check([json.loads(line) for line in piped.stdout.splitlines()], folder)


def test_squad_json_to_tsv(run, folder, tmp_path):
    path, out = tmp_path / "squad.json", tmp_path / "answers.tsv"
    asked = [{"id": f"q{i}", "question": question} for i, question in enumerate(QUESTIONS)]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": asked}]}]}))
    assert run("answer", path, "-m", folder, "-o", out).exit_code == 0
    header, *rows = (line.split("\t") for line in out.read_text().splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["id"] for row in rows] == ["q0", "q1"]
    assert [row["answer"] for row in rows] == [a.best.text for a in expected_answers(folder)]


@pytest.mark.parametrize("as_file", [True, False])
def test_one_question_is_shown(run, folder, tmp_path, as_file):
    path = tmp_path / "context.txt"
    path.write_text(CONTEXT)
    context = path if as_file else CONTEXT
    result = run("answer", "-q", QUESTIONS[0], "-c", context, "-m", folder)
    assert result.exit_code == 0, result.output
    assert QUESTIONS[0] in result.stdout
    assert expected_answers(folder)[0].best.text in result.stdout


def test_no_answer(run, folder):
    difference = expected_answers(folder)[0].null_difference
    arguments = ("answer", "-q", QUESTIONS[0], "-c", CONTEXT, "-m", folder, "--format", "jsonl")
    below = json.loads(run(*arguments, "--null-threshold", difference - 0.1).stdout)
    assert (below["answer"], below["start"], below["end"]) == ("", 0, 0)
    assert below["null_difference"] == pytest.approx(difference, abs=1e-4)
    above = json.loads(run(*arguments, "--null-threshold", difference + 0.1).stdout)
    assert above["answer"]
    shown = run(*arguments[:-2], "--null-threshold", difference - 0.1)
    assert "does not answer" in shown.stdout


def test_bad_input_is_named(refused, folder, tmp_path):
    path, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"question": "a", "context": "b"}\n{"question": "a", "contxt": "b"}\n')
    line = refused("answer", path, "-m", folder, "-o", out)
    assert f"{path}: line 2: no 'context'; found: 'question', 'contxt'" in line
    assert not out.exists()
    assert "belong together" in refused("answer", "-q", "a", "-m", folder)
    assert "not both" in refused("answer", "-", "-q", "a", "-c", "b", "-m", folder)
    assert "max_length must be in 3..64" in refused(
        "answer", "-q", "a", "-c", "b", "-m", folder, "--max-length", "65"
    )


def test_a_model_without_the_head_is_refused(refused, pretrained_folder):
    assert "missing tensors" in refused("answer", "-q", "a", "-c", "b", "-m", pretrained_folder)
