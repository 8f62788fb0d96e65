"""bertkern data: from text to a tokenizer, a corpus, and examples on the screen."""

import json
import re
import sys

import numpy as np
import pytest

from bertkern.cli.examples_view import ExamplesView
from bertkern.data import (
    Corpus,
    MaskingSettings,
    PretrainingData,
    load_tokenizer,
    read_documents,
    train_tokenizer,
)


@pytest.fixture
def tokenizer(run, corpus, tmp_path):
    """The folder of a tokenizer learned from the corpus file."""
    folder = tmp_path / "tokenizer"
    result = run("data", "tokenizer", corpus, "--out", folder, "--vocab-size", "90")
    assert result.exit_code == 0, result.output
    assert "wordpiece vocabulary of 90 tokens" in result.stdout
    return folder


@pytest.fixture
def prepared(run, corpus, tokenizer, tmp_path):
    """The folder of a tokenised corpus."""
    folder = tmp_path / "prepared"
    result = run("data", "prepare", corpus, "--tokenizer", tokenizer, "--out", folder)
    assert result.exit_code == 0, result.output
    assert re.search(r"8 documents, 48 sentences, \d+ tokens of a vocabulary of 90", result.stdout)
    return folder


def test_tokenizers(run, corpus, tokenizer, tmp_path):
    expected = train_tokenizer([s for d in read_documents([corpus]) for s in d], 90)
    assert load_tokenizer(tokenizer).get_vocab() == expected.get_vocab()
    out = tmp_path / "bpe"
    options = ["--kind", "bpe", "--vocab-size", "300", "--cased"]
    assert run("data", "tokenizer", corpus, "--out", out, *options).exit_code == 0
    assert "ĠThe" in load_tokenizer(out).get_vocab()


def test_a_prepared_corpus(prepared, corpus, tokenizer):
    expected = Corpus.from_documents(read_documents([corpus]), load_tokenizer(tokenizer))
    assert Corpus.open(prepared).fingerprint == expected.fingerprint


def test_what_is_left_out_is_told(run, corpus, tokenizer, tmp_path):
    lines = tmp_path / "lines.jsonl"
    rows = [{"body": "One only."}, {"body": "Two here. They fit."}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "prepare", lines, corpus, "-t", tokenizer, "-o", tmp_path / "c"]
    result = run(*command, "--text-column", "body")
    assert result.exit_code == 0, result.output
    assert "9 documents" in result.stdout
    assert "1 documents with fewer than two sentences were left out" in result.stdout


@pytest.mark.parametrize("options", [[], ["--whole-word"]])
def test_inspecting(run, prepared, corpus, tokenizer, tmp_path, options):
    page = tmp_path / "pages" / "examples.html"
    command = ["--tokenizer", tokenizer, "--max-length", "32", "--count", "2", *options]
    result = run("data", "inspect", prepared, *command, "--html", page, "--verify")
    assert result.exit_code == 0, result.output
    assert re.search(r"1: \d+ tokens, \d+ predicted, B is (next|random)", result.stdout)
    assert "[CLS]" in result.stdout
    assert "[MASK]/" in result.stdout
    assert re.search(r"of them \[MASK\] +\d+\.\d\d% +80%", result.stdout)
    content = page.read_text()
    assert "[MASK]/" in content
    assert content.startswith("<!doctype html>")
    from_text = run("data", "inspect", corpus, *command)
    assert from_text.stdout == result.stdout


def test_shown_words_are_those_of_the_text(corpus):
    """What was masked stands beside it, so that the text can be read out of what is shown."""
    documents = read_documents([corpus])
    words = train_tokenizer([s for d in documents for s in d], 400, min_frequency=1)
    data = PretrainingData(
        Corpus.from_documents(documents, words), words, MaskingSettings(24, masked_fraction=0.5)
    )
    view = ExamplesView(data, words, 1000)
    view.read(0, 10)
    assert len(view.examples) == 10
    marks = 0
    for example in view.examples:
        shown = view._text(example).plain
        marks += shown.count("/")
        restored = re.sub(r"\S*?/", "", shown)
        assert restored == " ".join(words.id_to_token(int(i)) for i in example.original)
    assert marks == sum(len(example.chosen) for example in view.examples)


def test_statistics_are_counted(corpus):
    documents = read_documents([corpus]) * 30
    words = train_tokenizer([s for d in documents for s in d], 80)
    data = PretrainingData(Corpus.from_documents(documents, words), words, MaskingSettings(32))
    view = ExamplesView(data, words, 1000)
    view.read(0, 500)
    table = {name: measured for name, measured, _ in view.statistics()}
    chosen = np.concatenate([e.shown[e.chosen] for e in view.examples])
    expected = float((chosen == data.special.mask).mean())
    assert table["of them [MASK]"] == f"{expected:.2%}"
    assert 0.75 < expected < 0.85
    shares = [float(table[name].rstrip("%")) for name in ("of them [MASK]", "random", "kept")]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert 40 < float(table["B is next"].rstrip("%")) < 60
    assert table["examples"] == "500"


def test_lines_may_be_sentences(run, tokenizer, tmp_path):
    path, folder = tmp_path / "lines.txt", tmp_path / "corpus-of-lines"
    path.write_text("\n\n".join(["one line\nanother line. And more\na third one"] * 4))
    result = run("data", "prepare", path, "-t", tokenizer, "-o", folder, "--one-sentence-per-line")
    assert result.exit_code == 0, result.output
    assert "4 documents, 12 sentences" in result.stdout
    shown = run("data", "inspect", path, "-t", tokenizer, "--one-sentence-per-line", "-n", "2")
    assert shown.exit_code == 0, shown.output


def test_refusals(run, refused, corpus, prepared, tokenizer, tmp_path):
    assert "exists: choose another" in refused(
        "data", "prepare", corpus, "-t", tokenizer, "-o", prepared
    )
    again = run("data", "prepare", corpus, "-t", tokenizer, "-o", prepared, "--overwrite")
    assert again.exit_code == 0, again.output
    assert "none.txt: no such file" in refused(
        "data", "prepare", tmp_path / "none.txt", "-t", tokenizer, "-o", tmp_path / "c"
    )
    assert "kind must be one of wordpiece, bpe, not 'unigram'" in refused(
        "data", "tokenizer", corpus, "--kind", "unigram", "-o", tmp_path / "t"
    )
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "Fine. Good."}\n{"text": \n')
    line = refused("data", "prepare", bad, "-t", tokenizer, "-o", tmp_path / "c")
    assert f"{bad}: line 2: not JSON" in line
    assert not (tmp_path / "c").exists()
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "there is no text in the sources" in refused(
        "data", "prepare", tmp_path / "empty.txt", "-t", tokenizer, "-o", tmp_path / "c"
    )
    small = tmp_path / "small"
    run("data", "tokenizer", corpus, "--vocab-size", "60", "-o", small)
    assert "another tokenizer" in refused("data", "inspect", prepared, "-t", small)
    (prepared / "ids.bin").write_bytes(b"")
    assert "ids.bin: damaged" in refused("data", "inspect", prepared, "-t", tokenizer)


def test_a_missing_package_is_named(refused, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = refused("data", "prepare", "hub:some/name", "-t", tokenizer, "-o", tmp_path / "c")
    assert "pip install 'bertkern[data]'" in line
