"""bertkern words."""

import json

import numpy as np
import pytest

from bertkern.models.word_vectors import WordVectors
from bertkern.train import word_vectors


@pytest.fixture
def text(tmp_path):
    """A text of two themes."""
    rng = np.random.default_rng(0)
    themes = (["cat", "dog", "mouse", "barks"], ["sum", "product", "number", "adds"])
    sentences = [" ".join(rng.choice(themes[i % 2], 8)) + "." for i in range(400)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(sentences) + " hapax", encoding="utf-8")
    return path


@pytest.fixture
def vectors(tmp_path):
    """man + (king - man) and so on, in a file."""
    path = tmp_path / "vectors.txt"
    rows = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 2]]
    WordVectors(["man", "woman", "king", "queen", "apple"], rows).save(path)
    return path


OPTIONS = ("--size", "8", "--epochs", "3", "--sample", "0", "--device", "cpu")


@pytest.mark.parametrize("name", ["v.txt", "v.bin"])
def test_train_and_ask(run, text, tmp_path, name):
    path = tmp_path / name
    result = run("words", "train", text, "-o", path, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert "3,200 words of the text, 8 of them different; 1 left out" in result.stdout
    assert f"8 word vectors in {path}" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["text.txt", name])
    found = run("words", "nearest", "cat", "SUM", "-m", path, "-n", "3")
    assert found.exit_code == 0, found.output
    words = found.stdout.split()
    assert words[0] == "cat"
    assert sorted(words[1:7:2]) == ["barks", "dog", "mouse"]
    assert sorted(words[8:14:2]) == ["adds", "number", "product"]


class AtOnce:
    """Stands for Interruption: Ctrl-C came in the first step."""

    asked = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_interrupted_and_resumed_is_uninterrupted(run, text, tmp_path, monkeypatch):
    whole, path = tmp_path / "whole.bin", tmp_path / "v.bin"
    assert run("words", "train", text, "-o", whole, *OPTIONS).exit_code == 0
    monkeypatch.setattr(word_vectors, "Interruption", AtOnce)
    stopped = run("words", "train", text, "-o", path, *OPTIONS)
    monkeypatch.undo()
    assert stopped.exit_code == 130
    assert "interrupted after step 1 of 3" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert not path.exists()
    again = run("words", "train", text, "-o", path, *OPTIONS)
    assert again.exit_code == 1
    assert "v.bin.run exists, of an interrupted run: go on from it (--resume)" in again.stderr
    resumed = run("words", "train", text, "-o", path, *OPTIONS, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert path.read_bytes() == whole.read_bytes()
    assert not path.with_name("v.bin.run").exists()


def test_nothing_is_replaced_unasked(run, refused, text, tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("mine")
    assert "v.txt exists: choose another file" in refused(
        "words", "train", text, "-o", path, *OPTIONS
    )
    assert path.read_text() == "mine"
    result = run("words", "train", text, "-o", path, *OPTIONS, "--overwrite")
    assert result.exit_code == 0, result.output
    assert WordVectors.load(path).size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["-o", "v.npy"], "named .txt, .vec, .bin"),
        (["-o", "v.txt", "--resume"], "no checkpoint to resume from"),
        (["-o", "v.txt", "--resume", "--overwrite"], "exclude one another"),
        (["-o", "v.txt", "--sample", "2"], "sample must be in 0..1, not 2"),
        (["-o", "v.txt", "--learning-rate", "-1"], "learning_rate must be above 0"),
        (["-o", "v.txt", "--min-count", "9000"], "0 word(s) occur 9000 times or more"),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(
    refused, text, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused("words", "train", text, *changes)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_similarities_for_persons_and_programs(run, vectors, tmp_path):
    person = run("words", "similarity", "man", "king", "-m", vectors)
    assert person.stdout.split() == ["man", "king", "0.707"]
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("man king\n\nman apple\n")
    program = run("words", "similarity", "-f", pairs, "-m", vectors)
    assert [json.loads(line) for line in program.stdout.splitlines()] == [
        {"source": str(pairs), "line": 1, "a": "man", "b": "king", "similarity": 0.707107},
        {"source": str(pairs), "line": 3, "a": "man", "b": "apple", "similarity": 0.0},
    ]
    assert "2 questions" in program.stderr


def test_analogies(run, vectors, tmp_path):
    person = run("words", "analogy", "man", "king", "woman", "-m", vectors, "-n", "1")
    assert person.stdout.splitlines()[0] == "man : king = woman : ?"
    assert person.stdout.splitlines()[1].split()[0] == "queen"
    table = tmp_path / "answers.tsv"
    result = run(
        "words", "analogy", "-m", vectors, "-n", "1", "-o", table, input=b"man king woman\n"
    )
    assert result.exit_code == 0, result.output
    header, row = (line.split("\t") for line in table.read_text().splitlines())
    found = dict(zip(header, row, strict=True))
    assert (found["line"], found["c"], found["rank"], found["nearest"]) == (
        *("1", "woman", "1"),
        "queen",
    )


def test_bad_questions_are_named_by_line(refused, vectors, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("man\nprince\n")
    line = refused("words", "nearest", "-f", questions, "-m", vectors)
    assert f"{questions}: line 2: 'prince' is not among the 5 words" in line
    questions.write_text("man\nking queen\n")
    line = refused("words", "nearest", "-f", questions, "-m", vectors)
    assert f"{questions}: line 2: 1 word(s) are needed, not 2: 'king queen'" in line
    assert "2 word(s) are needed, not 1" in refused("words", "similarity", "man", "-m", vectors)
    assert "give words or --file" in refused(
        "words", "nearest", "man", "-f", questions, "-m", vectors
    )
    assert "no such file" in refused("words", "nearest", "man", "-m", tmp_path / "none.bin")


def test_pictures(run, refused, vectors, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("words", "picture", "-m", vectors, "-o", tmp_path / "words.png", "--skip", "1")
    assert result.exit_code == 0, result.output
    assert "4 words in" in result.stdout
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")
    assert "a .png file" in refused("words", "picture", "-m", vectors, "-o", tmp_path / "w.jpg")


def test_conversion_both_ways(run, refused, vectors, tmp_path):
    binary, text, odd = (tmp_path / name for name in ("a.bin", "b.vec.gz", "c"))
    assert run("words", "convert", vectors, binary).exit_code == 0
    assert run("words", "convert", binary, text, "--limit", "3").exit_code == 0
    assert run("words", "convert", text, odd, "--to", "binary").exit_code == 0
    assert WordVectors.load(binary).words == ["man", "woman", "king", "queen", "apple"]
    found = WordVectors.load(odd, "binary")
    assert found.words == ["man", "woman", "king"]
    assert np.array_equal(found.vectors, WordVectors.load(vectors).vectors[:3])
    assert "a.bin exists" in refused("words", "convert", vectors, binary)
    assert "named .txt" in refused("words", "convert", vectors, tmp_path / "d")


def test_a_refused_run_leaves_nothing_in_the_way(run, tmp_path):
    text, path = tmp_path / "tiny.txt", tmp_path / "v.bin"
    text.write_text("one two three", encoding="utf-8")
    refused = run("words", "train", text, "-o", path, "--min-count", "1", "--sample", "1e-9")
    assert refused.exit_code == 1
    assert "no pairs to learn from" in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.txt"]


def test_overwriting_removes_only_a_runs_folder(run, tmp_path):
    text, path = tmp_path / "tiny.txt", tmp_path / "v.bin"
    text.write_text("one two three. " * 20, encoding="utf-8")
    precious = tmp_path / "v.bin.run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work", encoding="utf-8")
    refused = run("words", "train", text, "-o", path, *OPTIONS, "--overwrite")
    assert refused.exit_code == 1
    assert "is not of a run of this command" in " ".join(refused.stderr.splitlines())
    assert precious.read_text(encoding="utf-8") == "years of work"
