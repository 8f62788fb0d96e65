"""Pre-training in turns with transformers: both compute the same, and the result says so."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from bertkern.benchmarks.tasks import pretraining
from bertkern.data import MaskingSettings

SIZES = {**pretraining.SIZES, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 32}


@pytest.fixture
def small(monkeypatch):
    documents = [[f"word{i % 7} of word{i} and word{j}." for j in range(9)] for i in range(60)]
    monkeypatch.setattr(pretraining, "standard_library_text", lambda: documents)
    monkeypatch.setattr(pretraining, "SIZES", SIZES)
    monkeypatch.setattr(pretraining, "VOCABULARY", 200)
    settings = dataclasses.replace(
        pretraining.SETTINGS,
        tokens_per_batch=256,
        evaluate_every=2,
        evaluation_tokens=300,
        masking=MaskingSettings(max_length=32),
    )
    monkeypatch.setattr(pretraining, "SETTINGS", settings)


def test_both_take_the_same_steps(small, tmp_path, capsys):
    assert pretraining.main([str(tmp_path), "--steps", "5"]) == 0
    (path,) = tmp_path.glob("pretraining-*.json")
    result = json.loads(path.read_text())
    ours, theirs = (np.array(result["losses"][who]) for who in ("bertkern", "transformers"))
    assert len(ours) == 5
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    assert result["largest_difference"]["all steps"] == np.abs(ours - theirs).max()
    assert result["held_out_steps"] == [0, 2, 4, 5]
    held_out = result["held_out_mlm_loss"]
    np.testing.assert_allclose(held_out["bertkern"], held_out["transformers"], rtol=2e-6)
    assert len(set(held_out["bertkern"])) == 4
    for who in ("bertkern", "transformers"):
        assert len(result["step_seconds"][who]) == 5
        assert min(result["step_seconds"][who]) > 0
    assert (tmp_path / "pretraining.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out masked-word loss" in capsys.readouterr().err


def test_padding():
    part = pretraining.PackedPretrainingBatch(
        input_ids=torch.tensor([11, 12, 13, 21, 22]),
        token_type_ids=torch.tensor([0, 0, 1, 0, 1]),
        position_ids=torch.tensor([0, 1, 2, 0, 1]),
        cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32),
        max_seqlen=3,
        sequence_offset=0,
        labels=torch.tensor([99, 98]),
        label_tokens=torch.tensor([1, 4]),
        next_sentence_label=torch.tensor([0, 1]),
    )
    got = pretraining.padded(part)
    assert got["input_ids"].tolist() == [[11, 12, 13], [21, 22, 0]]
    assert got["token_type_ids"].tolist() == [[0, 0, 1], [0, 1, 0]]
    assert got["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert got["labels"].tolist() == [[-100, 99, -100], [-100, 98, -100]]
