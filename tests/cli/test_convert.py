"""bertkern convert, as a user types it."""

import numpy as np
import onnxruntime
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from bertkern.cli.convert import Task, convert
from bertkern.cli.main import _OneLineErrors
from bertkern.models import BertForPreTraining, BertModel
from bertkern.models.conversion import TASKS


@pytest.fixture
def run():
    """The command by itself, with the errors of `bertkern`."""
    app = typer.Typer(cls=_OneLineErrors)
    app.callback()(lambda: None)
    app.command("convert")(convert)
    return lambda *arguments: CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_folder(run, pretrained_folder, tmp_path):
    result = run(pretrained_folder, tmp_path / "new", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'new'}: BertForPreTraining\n"
    model = BertForPreTraining.from_pretrained(tmp_path / "new")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    tokenizer = (tmp_path / "new" / "tokenizer.json").read_bytes()
    assert tokenizer == (pretrained_folder / "tokenizer.json").read_bytes()


def test_onnx(run, encoder_folder, tmp_path):
    result = run(encoder_folder, tmp_path / "model.onnx")
    assert result.exit_code == 0, result.output
    assert "BertModel, equal in ONNX Runtime" in result.stdout
    ids = np.array([[2, 5, 6, 3]])
    feed = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    hidden = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, feed)[0]
    model = BertModel.from_pretrained(encoder_folder)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(hidden), expected, rtol=0, atol=1e-5)


def test_pickle_only_by_name(run, pretrained_folder, tmp_path):
    weights = pretrained_folder / "model.safetensors"
    torch.save(load_file(weights), pretrained_folder / "pytorch_model.bin")
    weights.unlink()
    result = run(pretrained_folder, tmp_path / "new")
    assert result.exit_code == 1
    assert "only pytorch_model.bin" in result.stderr
    assert "--allow-pickle" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    result = run(pretrained_folder, tmp_path / "new", "--allow-pickle")
    assert result.exit_code == 0, result.output


def test_refusals(run, pretrained_folder, tmp_path):
    for arguments, message in (
        (("nowhere/at/all", tmp_path / "new"), "error: nowhere/at/all: no such folder"),
        ((pretrained_folder, pretrained_folder), "exists; name a new folder"),
        (
            (pretrained_folder, tmp_path / "a.onnx", "--dtype", "float16"),
            "--dtype is for folders",
        ),
        ((pretrained_folder, tmp_path / "new", "--task", "qa"), "missing tensors: qa_outputs"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_tasks_are_the_librarys():
    assert [task.value for task in Task] == list(TASKS)
