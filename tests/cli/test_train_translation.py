"""bertkern train-translation: small runs end to end, Ctrl-C and resuming, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from bertkern.models import WordVectors

QUICK = ["--hidden-size", "16", "--layers", "1", "--heads", "2", "--vocab-size", "280"]
QUICK += ["--batch-tokens", "200", "--held-out", "0.2", "--device", "cpu", "--average", "2"]
QUICK += ["--evaluate-every", "1000", "--checkpoint-every", "2", "--evaluation-pairs", "4"]

WORDS = {
    "one": "eins",
    "two": "zwei",
    "three": "drei",
    "red": "rot",
    "blue": "blau",
    "cat": "Katze",
}


def texts(count=40):
    """Different texts of two to five words, and their translations."""
    random = np.random.default_rng(0)
    found = {}
    while len(found) < count:
        words = random.choice(list(WORDS), random.integers(2, 6))
        found[" ".join(words)] = " ".join(WORDS[word] for word in words)
    return found


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = [f"{source}\t{target}\n" for source, target in texts().items()]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def test_a_run_leaves_a_folder_that_translates(run, table, tmp_path):
    out = tmp_path / "model"
    result = run("train-translation", table, "--out", out, "--steps", "3", *QUICK)
    assert result.exit_code == 0, result.output
    assert "32 pairs to train on, 8 held out" in result.stdout
    assert "held-out BLEU" in result.stdout
    assert result.stdout.count("is translated to") == 5
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "curves.png"} <= names
    assert not list(out.glob("weights-*"))
    history = json.loads((out / "history.json").read_text())
    assert [record["step"] for record in history["steps"]] == [1, 2, 3]
    assert history["steps"][0]["learning_rate"] == pytest.approx((16 * 4000) ** -0.5)
    assert run("translate", "one red cat", "-m", out).exit_code == 0


def test_files_of_lines_and_held_out_pairs_of_their_own(run, tmp_path):
    """--held-out is not asked then; what is held out and trained on is said."""
    pairs = texts()
    source, target = tmp_path / "pairs.en", tmp_path / "pairs.de"
    source.write_text("\n".join(pairs) + "\n")
    target.write_text("\n".join(pairs.values()) + "\n")
    test = tmp_path / "test.jsonl"
    rows = [{"en": "one two one two one two", "de": "x"}, {"en": next(iter(pairs)), "de": "y"}]
    test.write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))
    result = run(
        *("train-translation", "--source", source, "--target", target, "--held-out-file", test),
        *("--source-column", "en", "--target-column", "de"),
        *("--out", tmp_path / "model", "--steps", "1", *QUICK),
    )
    assert result.exit_code == 0, result.output
    assert "40 pairs to train on, 2 held out" in result.stdout
    assert "1 held-out source texts are among the training pairs, too" in result.stdout
    assert "the reference is  x" in result.stdout


def test_catalogues_menus_without_their_keys(run, tmp_path):
    pytest.importorskip("babel")
    catalogue = tmp_path / "de.po"
    entries = [f'msgid "_{s}"\nmsgstr "_{t}"\n' for s, t in texts(10).items()]
    header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n'
    catalogue.write_text("\n".join([header, *entries]), encoding="utf-8")
    for options, marks in (([], 3), (["--strip-accelerators"], 0)):
        out = tmp_path / f"model-{marks}"
        result = run("train-translation", catalogue, "--out", out, "--steps", "1", *QUICK, *options)
        assert result.exit_code == 0, result.output
        shown = [line for line in result.stdout.splitlines() if "the reference is" in line]
        assert sum("_" in line for line in shown) == min(marks, len(shown))
        assert shown


def test_long_pairs_are_left_out_and_counted(run, table, tmp_path):
    with table.open("a") as file:
        file.write(f"{'one ' * 200}\t{'eins ' * 200}\n")
    result = run(
        *("train-translation", table, "--out", tmp_path / "model", "--steps", "1"),
        *(*QUICK, "--max-length", "60"),
    )
    assert result.exit_code == 0, result.output
    assert "1 training pairs and 0 held out were longer than --max-length" in result.stderr


def test_it_starts_from_word_vectors(run, table, tmp_path):
    path = tmp_path / "words.txt"
    WordVectors(["one", "two"], np.eye(2, 16, dtype=np.float32)).save(path)
    result = run(
        *("train-translation", table, "--out", tmp_path / "model", "--steps", "1", *QUICK),
        *("--vocab-size", "340", "--start-vectors", path),
    )
    assert result.exit_code == 0, result.output


def test_a_finished_run_is_neither_overwritten_nor_changed_unasked(run, refused, table, tmp_path):
    command = ("train-translation", table, "--out", tmp_path / "model", "--steps", "2", *QUICK)
    assert run(*command).exit_code == 0
    assert "resume that run (--resume)" in refused(*command)
    again = run(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert "already finished after 2 steps; nothing was changed" in again.stdout
    line = refused(*command, "--resume", "--layers", "2")
    assert "--layers = 1, not 2" in line
    line = refused(*command, "--resume", "--warmup", "2", "--learning-rate", "0.25")
    assert "--warmup = 1, not 2" in line
    again = run(*command, "--overwrite")
    assert again.exit_code == 0, again.output


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_weights(run, table, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["--steps", "12", *QUICK]
    assert run("train-translation", table, "--out", whole, *settings).exit_code == 0
    # Slowed down from outside, so that the signal arrives while it trains.
    slow = (
        "import time, torch, runpy, sys\n"
        "step = torch.optim.AdamW.step\n"
        "def slow(*a, **k):\n"
        "    time.sleep(0.2); print('step', flush=True); return step(*a, **k)\n"
        "torch.optim.AdamW.step = slow\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module('bertkern.cli.main', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", slow, "bertkern", "train-translation", str(table)]
    command += ["--out", str(parts), *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "checkpoint" in errors
    assert "Traceback" not in errors
    assert not (parts / "model.safetensors").exists()

    result = run("train-translation", table, "--out", parts, "--resume", *settings)
    assert result.exit_code == 0, result.output
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(first[name].equal(second[name]) for name in first)
    assert (whole / "history.json").read_text() == (parts / "history.json").read_text()


def test_the_papers_sizes(run, refused, table, tmp_path, monkeypatch):
    """Their rate and warm-up, too, where steps are enough."""
    asked = {}

    def train(*_, **options):
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr("bertkern.train.train_translation", train)
    for size, hidden in (("base", 512), ("big", 1024)):
        command = ("train-translation", table, "--out", tmp_path, "--size", size)
        assert "enough" in refused(*command, "--steps", "100000", "--device", "cpu")
        assert asked["config"].hidden_size == hidden
        settings = asked["settings"]
        assert settings.warmup_steps == 4000
        assert settings.learning_rate == pytest.approx((hidden * 4000) ** -0.5)
        assert settings.max_gradient_norm is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "a.en"], "--source and --target belong together"),
        ([], "give either files of pairs or --source and --target"),
        (["none.tsv"], "none.tsv"),
        (["pairs.tsv", "--resume"], "no checkpoint to resume from"),
        (["pairs.tsv", "--resume", "--overwrite"], "exclude one another"),
        (["pairs.tsv", "--size", "big", "--config", "c.json"], "exclude one another"),
        (["pairs.tsv", "--source-column", "en"], "en"),
        (["pairs.tsv", "--held-out", "1.5"], "held_out must be between 0 and 1, not 1.5"),
        (["pairs.tsv", "--heads", "3"], "num_attention_heads = 3 must divide hidden_size = 16"),
        (["pairs.tsv", "--max-length", "2"], "has at most max_length = 2"),
    ],
)
def test_refusals(refused, table, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    line = refused("train-translation", "--out", "model", "--steps", "1", *QUICK, *options)
    assert message in line
    assert not (tmp_path / "model" / "checkpoint.safetensors").exists()
