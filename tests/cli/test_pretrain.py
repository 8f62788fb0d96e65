"""bertkern pretrain: a small run end to end, Ctrl-C and resuming, and what it refuses."""

import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

QUICK = ["--hidden-size", "16", "--layers", "1", "--heads", "2", "--vocab-size", "120"]
QUICK += ["--max-length", "16", "--batch-tokens", "64", "--held-out", "0.3", "--device", "cpu"]


def test_a_run_leaves_a_model_that_fills_masks(run, corpus, tmp_path):
    out = tmp_path / "model"
    result = run("pretrain", corpus, "--out", out, "--steps", "3", *QUICK)
    assert result.exit_code == 0, result.output
    assert "unigram baseline" in result.stdout
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "history.json"} <= names
    assert run("fill-mask", "the [MASK] falls", "-m", out).exit_code == 0


def test_lines_may_be_sentences(run, refused, tmp_path):
    """Lines without full stops: one sentence a document otherwise, of which none is of use."""
    path, out = tmp_path / "lines.txt", tmp_path / "model"
    path.write_text("\n\n".join(["one line\nanother line\na third one"] * 8))
    arguments = ("pretrain", path, "--out", out, "--steps", "1", *QUICK)
    assert "has two sentences or more" in refused(*arguments)
    result = run(*arguments, "--one-sentence-per-line")
    assert result.exit_code == 0, result.output
    assert "8 documents, 24 sentences" in result.stdout
    assert "--one-sentence-per-line is for text" in refused(
        "pretrain", "--corpus", path, "--out", out, "--one-sentence-per-line"
    )


def test_a_checkpoint_is_not_overwritten_unasked(run, refused, corpus, tmp_path):
    out = tmp_path / "model"
    assert run("pretrain", corpus, "--out", out, "--steps", "2", *QUICK).exit_code == 0
    assert "checkpoint" in refused("pretrain", corpus, "--out", out, "--steps", "2", *QUICK)
    again = run("pretrain", corpus, "--out", out, "--steps", "2", "--resume", *QUICK)
    assert again.exit_code == 0, again.output
    assert f"{out}: already finished after 2 steps; nothing was changed" in again.stdout
    again = run("pretrain", corpus, "--out", out, "--steps", "2", "--overwrite", *QUICK)
    assert again.exit_code == 0, again.output


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_resumes_to_the_same_weights(
    run, corpus, tmp_path, number
):
    """It goes to all processes of the group, as a terminal's and a scheduler's do."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["--steps", "12", "--checkpoint-every", "1000", "--evaluate-every", "1000", *QUICK]
    assert run("pretrain", corpus, "--out", whole, *settings).exit_code == 0
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
    command = [sys.executable, "-c", slow, "bertkern", "pretrain", str(corpus)]
    command += ["--out", str(parts), "--workers", "1", *settings]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "step" in line:
            break
    time.sleep(0.3)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "checkpoint" in errors
    assert "Traceback" not in errors
    assert not (parts / "model.safetensors").exists()

    result = run("pretrain", corpus, "--out", parts, "--resume", *settings)
    assert result.exit_code == 0, result.output
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(first[name].equal(second[name]) for name in first)


def test_not_utf8_is_refused(refused, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait\n")
    line = refused("pretrain", path, "--out", tmp_path / "model", *QUICK)
    assert f"{path}: not UTF-8" in line
    assert not (tmp_path / "model").exists()


def test_an_empty_corpus_is_refused(refused, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    assert "no text in" in refused("pretrain", path, "--out", tmp_path / "model", *QUICK)
    assert not (tmp_path / "model").exists()


def test_too_few_documents_are_refused(refused, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("One sentence is here. Another one follows.\n")
    line = refused("pretrain", path, "--out", tmp_path / "model", *QUICK)
    assert "need at least 4" in line


def test_a_missing_file_is_refused(refused, tmp_path):
    line = refused("pretrain", tmp_path / "none.txt", "--out", tmp_path / "model", *QUICK)
    assert "none.txt" in line


def test_an_unknown_config_key_is_refused(refused, corpus, tmp_path, config_file):
    path = config_file(model_type="bert", hiden_size=16)
    line = refused("pretrain", corpus, "--out", tmp_path / "model", "--config", path)
    assert "hiden_size" in line
    assert str(path) in line


def test_sizes_that_do_not_fit_are_refused(refused, corpus, tmp_path):
    line = refused(
        "pretrain", corpus, "--out", tmp_path / "m", "--hidden-size", "10", "--heads", "3"
    )
    assert "num_attention_heads = 3 must divide hidden_size = 10" in line


def test_nothing_to_resume_is_refused(refused, corpus, tmp_path):
    line = refused("pretrain", corpus, "--out", tmp_path / "model", "--resume", *QUICK)
    assert "no checkpoint" in line


def test_a_folder_that_cannot_be_written_is_refused(refused, corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused("pretrain", corpus, "--out", tmp_path / "file" / "model", *QUICK)
    assert "cannot write to" in line
