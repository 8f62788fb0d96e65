"""bertkern classify."""

import csv
import json

import pytest

from bertkern.data import load_tokenizer, save_tokenizer
from bertkern.models import BertForSequenceClassification, Classify

TEXTS = ["The loss falls.", "A kernel reads tokens.", "Every token looks."]


@pytest.fixture
def classifier(pretrained_folder, tmp_path):
    """Make a tiny classifier whose config has these entries."""

    def make(**entries):
        folder = tmp_path / "classifier"
        BertForSequenceClassification.from_pretrained(
            pretrained_folder, new_head=True, **entries
        ).save_pretrained(folder)
        save_tokenizer(load_tokenizer(pretrained_folder), folder)
        return folder

    return make


@pytest.fixture
def folder(classifier):
    return classifier(id2label={0: "bad", 1: "good", 2: "so so"})


def test_lines_to_json_lines(run, folder, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    result = run("classify", path, "-m", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    expected = Classify.from_pretrained(folder)(TEXTS)
    for row, text, found in zip(rows, TEXTS, expected, strict=True):
        assert row["text"] == text
        assert row["label"] == found.labels[0]
        assert row["probabilities"] == pytest.approx(found.scores, abs=1e-6)
    assert [row["line"] for row in rows] == [1, 2, 3]


def test_pairs_from_json_lines_to_csv(run, folder, tmp_path):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "labels.csv"
    records = [
        {"id": "q1", "text": TEXTS[0], "text_pair": TEXTS[1]},
        {"id": "q2", "text": TEXTS[2], "text_pair": None},
        {"id": "q3", "text": ""},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run("classify", path, "-m", folder, "-o", out).exit_code == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = [(TEXTS[0], TEXTS[1]), TEXTS[2], ""]
    expected = Classify.from_pretrained(folder)(values)
    assert [row["id"] for row in rows] == ["q1", "q2", "q3"]
    for row, found in zip(rows, expected, strict=True):
        assert row["label"] == found.labels[0]
        assert float(row["so so"]) == pytest.approx(found.scores["so so"], abs=1e-6)


def test_one_text_is_shown(run, folder):
    result = run("classify", "-t", TEXTS[0], "--pair", TEXTS[1], "-m", folder)
    assert result.exit_code == 0, result.output
    assert TEXTS[0] in result.stdout
    assert result.stdout.count("%") == 3


def test_regression_and_several_labels(run, classifier):
    folder = classifier(id2label={0: "stars"}, problem_type="regression")
    result = run("classify", "-m", folder, input=TEXTS[0].encode())
    (score,) = Classify.from_pretrained(folder)([TEXTS[0]])[0].scores.values()
    assert json.loads(result.stdout)["value"] == pytest.approx(score, abs=1e-6)
    folder = classifier(
        id2label={0: "x", 1: "y", 2: "z"}, problem_type="multi_label_classification"
    )
    row = json.loads(run("classify", "-m", folder, input=TEXTS[0].encode()).stdout)
    assert set(row["labels"]) == {k for k, p in row["probabilities"].items() if p >= 0.5}


def test_a_bad_line_is_named_and_nothing_is_written(refused, folder, tmp_path):
    path, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a", "text_pair": 7}\n')
    line = refused("classify", path, "-m", folder, "-o", out)
    assert f"{path}: line 2: 'text_pair' must be text, not 7" in line
    path.write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    line = refused("classify", path, "-m", folder, "-o", out)
    assert f"{path}: line 2: the text holds half of a surrogate pair" in line
    assert not out.exists()


def test_contradictions_are_refused(refused, folder, tmp_path):
    assert "not both" in refused("classify", "-", "-t", "a", "-m", folder)
    assert "--pair needs --text" in refused("classify", "--pair", "a", "-m", folder)


def test_a_model_without_the_head_is_refused(refused, pretrained_folder):
    assert "missing tensors" in refused("classify", "-t", "a", "-m", pretrained_folder)


def test_tables_are_read_by_the_columns_that_fine_tuning_reads(run, refused, folder, tmp_path):
    """A GLUE file, its label and index apart, gives what its two texts give."""
    path = tmp_path / "dev.tsv"
    path.write_text(f"index\tsentence1\tsentence2\tlabel\n0\t{TEXTS[0]}\t{TEXTS[1]}\tx\n")
    row = json.loads(run("classify", path, "-m", folder).stdout)
    assert (row["line"], row["text"], row["text_pair"]) == (2, TEXTS[0], TEXTS[1])
    found = Classify.from_pretrained(folder)([(TEXTS[0], TEXTS[1])])[0]
    assert row["probabilities"] == pytest.approx(found.scores, abs=1e-6)
    lines = tmp_path / "dev.jsonl"
    lines.write_text(json.dumps({"sentence1": TEXTS[0], "sentence2": TEXTS[1]}) + "\n")
    same = json.loads(run("classify", lines, "-m", folder).stdout)
    assert same["probabilities"] == row["probabilities"]
    path.write_text("a\tb\n1\t2\n")
    assert "line 2: no 'text'; found: 'a', 'b'" in refused("classify", path, "-m", folder)
    assert "not table" in refused("classify", "-", "--input", "table", "-m", folder)
