"""BertConfig: defaults, Hugging Face's files, refusals."""

import json

import pytest
import transformers

from bertkern.models import BertConfig


def test_defaults_are_those_of_transformers():
    ours, theirs = BertConfig.base(), transformers.BertConfig()
    for name, value in ours.to_dict().items():
        assert getattr(theirs, name) == value, name


def test_reads_everything_transformers_writes(tmp_path):
    for config in (
        transformers.BertConfig(),
        transformers.BertConfig(num_labels=3, hidden_size=24),
    ):
        config.save_pretrained(tmp_path)
        ours = BertConfig.from_json_file(tmp_path / "config.json")
        assert ours.hidden_size == config.hidden_size
        assert BertConfig.from_dict(ours.to_dict()) == ours
    assert BertConfig.from_dict(transformers.BertConfig().to_dict()).vocab_size == 30522


def test_keeps_what_does_not_concern_it(tmp_path):
    entries = {"id2label": {"0": "no", "1": "yes"}, "position_embedding_type": "absolute"}
    config = BertConfig.from_dict(entries)
    assert config.to_dict().items() >= entries.items()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hiden_size": 3}, r"unknown config key 'hiden_size' \(value 3\); allowed: .*hidden_size"),
        ({"position_embedding_type": "relative_key"}, "is 'relative_key'; supported: 'absolute'"),
        ({"hidden_act": "silu"}, "hidden_act must be one of .*'gelu'.* not 'silu'"),
        ({"is_decoder": True}, "'is_decoder' is True; supported: False"),
        ({"model_type": "roberta"}, "'model_type' is 'roberta'; supported: 'bert'"),
        ({"hidden_size": 30}, "num_attention_heads = 12 must divide hidden_size = 30"),
        ({"hidden_size": "768"}, "hidden_size must be an integer >= 1, not '768'"),
        ({"num_attention_heads": 1}, "head dimension .*768; 1..256"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be in 0..1, not 1.5"),
        ({"pad_token_id": 40000}, "below vocab_size = 30522, not 40000"),
    ],
)
def test_refusals(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict(entries)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: "):
        BertConfig.from_json_file(tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": "\xff"}'])
def test_not_a_config(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: .*JSON"):
        BertConfig.from_json_file(path)
