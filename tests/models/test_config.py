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
    entries = {"finetuning_task": "rte", "position_embedding_type": "absolute"}
    config = BertConfig.from_dict(entries)
    assert config.to_dict().items() >= entries.items()


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ({}, ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {"1": "yes", "0": "no"}}, ["no", "yes"]),
        ({"label2id": {"yes": 1, "no": 0}, "num_labels": 2}, ["no", "yes"]),
        ({"id2label": {0: "x"}, "label2id": None, "problem_type": "regression"}, ["x"]),
        ({"id2label": {0: "same", 1: "same"}}, ["same", "same"]),
    ],
)
def test_labels(entries, names, tmp_path):
    """However they are given, they are complete, and transformers reads them from our file."""
    config = BertConfig.from_dict(entries)
    assert config.num_labels == len(names)
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: config.label2id[name] for name in names}
    assert all(config.id2label[i] == name for name, i in config.label2id.items())
    written = json.loads(json.dumps(config.to_dict()))
    assert BertConfig.from_dict(written) == config
    assert ("id2label" in written) == (names != ["LABEL_0", "LABEL_1"])
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    assert theirs.id2label == config.id2label
    assert theirs.num_labels == config.num_labels
    assert theirs.problem_type == config.problem_type
    theirs.save_pretrained(tmp_path)
    assert BertConfig.from_json_file(tmp_path / "config.json").id2label == config.id2label


def test_changes():
    config = BertConfig(id2label={0: "a", 1: "b", 2: "c"}, classifier_dropout=0.3)
    assert config.with_changes(num_labels=3) == config
    assert config.with_changes(num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    other = config.with_changes(id2label={0: "x", 1: "y"}, hidden_dropout_prob=0.0)
    assert other.label2id == {"x": 0, "y": 1}
    assert (other.classifier_dropout, other.hidden_dropout_prob) == (0.3, 0.0)
    with pytest.raises(ValueError, match="unknown config key 'nun_labels'"):
        config.with_changes(nun_labels=2)


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
        ({"classifier_dropout": 2}, "classifier_dropout must be in 0..1, not 2"),
        ({"problem_type": "ranking"}, "problem_type must be one of .*'regression'.* not 'ranking'"),
        (
            {"problem_type": "single_label_classification", "num_labels": 1},
            "needs num_labels of 2 or more, not 1",
        ),
        ({"num_labels": 0}, "num_labels must be an integer >= 1, not 0"),
        ({"num_labels": "3"}, "num_labels must be an integer >= 1, not '3'"),
        (
            {"num_labels": 3, "id2label": {"0": "a", "1": "b"}},
            "num_labels = 3, but id2label has 2 labels",
        ),
        ({"id2label": ["a", "b"]}, r"id2label must be None or a table of labels, not \['a', 'b'\]"),
        ({"id2label": {"one": "a"}}, "numbers of id2label must be integers .*'one'"),
        ({"id2label": {"1": "a", "2": "b"}}, r"id2label must be 0..1, not \[1, 2\]"),
        (
            {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}},
            "label2id = .* is not the inverse of id2label",
        ),
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
