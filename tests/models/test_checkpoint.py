"""Files of models: both ways with transformers, old names, and every kind of damage."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertkern import models
from bertkern.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
IDS = torch.arange(1, 13)[None]
CLASSES = {
    "encoder": (BertModel, transformers.BertModel),
    **{
        name: (getattr(models, f"BertFor{name}"), getattr(transformers, f"BertFor{name}"))
        for name in (
            "PreTraining",
            "MaskedLM",
            "SequenceClassification",
            "TokenClassification",
            "QuestionAnswering",
            "MultipleChoice",
        )
    },
}


def saved(folder, seed=0):
    torch.manual_seed(seed)
    model = BertForPreTraining(BertConfig(**SIZES)).eval()
    model.save_pretrained(folder)
    return model


def hidden(model):
    with torch.no_grad():
        return getattr(model, "bert", model)(IDS).last_hidden_state


def head_logits(model):
    """What the head says, of a model that has one."""
    ids = IDS[:, None] if "MultipleChoice" in type(model).__name__ else IDS
    with torch.no_grad():
        output = vars(model(ids))
    return [x for name, x in output.items() if "logits" in name]


@pytest.mark.parametrize("kind", CLASSES)
def test_transformers_reads_ours(kind, tmp_path):
    own_class, their_class = CLASSES[kind]
    torch.manual_seed(0)
    ours = own_class(BertConfig(**SIZES)).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = their_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(hidden(theirs), hidden(ours), rtol=0, atol=2e-6)
    torch.testing.assert_close(head_logits(theirs), head_logits(ours), rtol=0, atol=2e-6)
    assert theirs.config.architectures == [own_class.__name__]
    auto = transformers.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(hidden(auto), hidden(ours), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_we_read_transformers(kind, tmp_path):
    own_class, their_class = CLASSES[kind]
    theirs = their_class(transformers.BertConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = own_class.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    torch.testing.assert_close(hidden(ours), hidden(theirs), rtol=0, atol=2e-6)
    torch.testing.assert_close(head_logits(ours), head_logits(theirs), rtol=0, atol=2e-6)
    ours.save_pretrained(tmp_path / "again")
    before = load_file(tmp_path / "theirs/model.safetensors")
    after = load_file(tmp_path / "again/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_encoder_from_pretraining_and_without_pooler(tmp_path):
    model = saved(tmp_path)
    encoder = BertModel.from_pretrained(tmp_path)
    torch.testing.assert_close(hidden(encoder), hidden(model), rtol=0, atol=0)
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "mlm")
    encoder = BertModel.from_pretrained(tmp_path / "mlm")
    assert encoder(IDS).pooler_output is None


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def test_old_names_buffers_and_double_tensors(tmp_path):
    model = saved(tmp_path)

    def age(tensors):
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in tensors.items()
        }
        old["bert.embeddings.position_ids"] = torch.arange(12)[None]
        old["cls.predictions.decoder.weight"] = tensors[
            "bert.embeddings.word_embeddings.weight"
        ].clone()
        old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
        return old

    rewrite(tmp_path, age)
    again = BertForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_label_names(tmp_path):
    """They go both ways, with the problem type and the head's dropout."""
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "classifier_dropout": 0.3}
    config = BertConfig(**SIZES, **labels, problem_type="multi_label_classification")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "ours")
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert theirs.config.id2label == labels["id2label"]
    assert theirs.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert theirs.config.problem_type == "multi_label_classification"
    assert theirs.config.classifier_dropout == 0.3
    theirs.save_pretrained(tmp_path / "theirs")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "theirs").config
    assert again.id2label == labels["id2label"]
    assert (again.problem_type, again.classifier_dropout) == (config.problem_type, 0.3)


@pytest.mark.parametrize("source", ["encoder", "MaskedLM", "PreTraining", "SequenceClassification"])
def test_new_head(source, tmp_path):
    """Head and pooler are drawn where the file has none; all that it has comes from the file."""
    torch.manual_seed(0)
    theirs = CLASSES[source][1](transformers.BertConfig(**SIZES))
    theirs.save_pretrained(tmp_path)
    stored = theirs.state_dict()
    with pytest.raises(ValueError, match=r"classifier\.weight.*\(new_head=True draws"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)

    def read(seed):
        torch.manual_seed(seed)
        return BertForSequenceClassification.from_pretrained(
            tmp_path, new_head=True, num_labels=3, hidden_dropout_prob=0.0
        )

    model = read(1)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert model.config.hidden_dropout_prob == 0.0
    assert model.classifier.weight.shape == (3, 16)
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert (model.classifier.bias == 0).all()
    assert not torch.equal(model.classifier.weight, read(2).classifier.weight)
    assert torch.equal(model.classifier.weight, read(1).classifier.weight)
    torch.testing.assert_close(hidden(model), hidden(theirs.eval()), rtol=0, atol=2e-6)
    had_pooler = [x for name, x in stored.items() if name.endswith("pooler.dense.weight")]
    assert len(had_pooler) == (source != "MaskedLM")
    for weight in had_pooler:
        assert torch.equal(model.bert.pooler.weight, weight)
    assert torch.equal(model.bert.pooler.weight, read(2).bert.pooler.weight) == bool(had_pooler)


def test_a_head_that_fits_is_kept(tmp_path):
    torch.manual_seed(0)
    saved_model = BertForSequenceClassification(BertConfig(**SIZES))
    saved_model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path, new_head=True)
    assert torch.equal(again.classifier.weight, saved_model.classifier.weight)


def test_new_head_is_only_the_head(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if "layer.1.output.dense" not in n})
    with pytest.raises(ValueError, match=r"missing tensors: encoder.layer.1.output.dense.weight"):
        BertForQuestionAnswering.from_pretrained(tmp_path, new_head=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 60}, r"word_embeddings.weight is \[50, 16\], not \[60, 16\]"),
        ({"hidden_size": 8}, r"shape is not the config's: .* and \d+ more$"),
        ({"num_hidden_layers": 3}, r"missing tensors: encoder.layer.2.* and 10 more$"),
        ({"num_hidden_layers": 1}, r"unexpected tensors: encoder.layer.1"),
    ],
)
def test_another_config(changes, message, tmp_path):
    saved(tmp_path)
    for new_head in (False, True):
        with pytest.raises(ValueError, match=message):
            BertForPreTraining.from_pretrained(tmp_path, new_head=new_head, **changes)


def test_names_of_data_parallel(tmp_path):
    model = saved(tmp_path)
    rewrite(tmp_path, lambda tensors: {f"module.{n}": t for n, t in tensors.items()})
    again = BertForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_weights_in_parts(tmp_path):
    """As transformers writes a large model: parts and an index; with a part lost; damaged."""
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=4000)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    ours = BertForPreTraining.from_pretrained(tmp_path)
    torch.testing.assert_close(head_logits(ours), head_logits(theirs), rtol=0, atol=2e-6)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"parts are missing: {parts[1].name}$"):
        BertForPreTraining.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for damaged in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index.json: damaged, or not an index"):
            BertForPreTraining.from_pretrained(tmp_path)


def as_pickle(folder, **more):
    weights = folder / "model.safetensors"
    torch.save({**load_file(weights), **more}, folder / "pytorch_model.bin")
    weights.unlink()


def test_pickle_is_read_when_allowed(tmp_path):
    model = saved(tmp_path)
    as_pickle(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model.bin: .*allow_pickle=True"):
        BertForPreTraining.from_pretrained(tmp_path)
    again = BertForPreTraining.from_pretrained(tmp_path, allow_pickle=True)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


class Harmful:
    """Writes a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_with_code_or_damage_is_refused(tmp_path):
    saved(tmp_path)
    harm = tmp_path / "harm"
    as_pickle(tmp_path, code=Harmful(harm))
    with pytest.raises(ValueError, match=r"pytorch_model.bin: damaged, or not a file of weights"):
        BertForPreTraining.from_pretrained(tmp_path, allow_pickle=True)
    assert not harm.exists()
    pickle = tmp_path / "pytorch_model.bin"
    torch.save([1, 2], pickle)
    with pytest.raises(ValueError, match=r"a table of tensors was expected, not list"):
        BertForPreTraining.from_pretrained(tmp_path, allow_pickle=True)
    for damaged in (b"", b"garbage", pickle.read_bytes()[:-40]):
        pickle.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"pytorch_model.bin: damaged"):
            BertForPreTraining.from_pretrained(tmp_path, allow_pickle=True)


def test_config_by_its_old_name(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "bert_config.json")
    torch.testing.assert_close(
        hidden(BertModel.from_pretrained(tmp_path)), hidden(model), rtol=0, atol=0
    )


def test_dtype(tmp_path):
    saved(tmp_path)
    model = BertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "half")
    stored = BertModel.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert transformers.AutoModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_model_read_trains_and_does_not_touch_its_file(tmp_path):
    saved(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = BertForPreTraining.from_pretrained(tmp_path).train()
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if "layer.1.attention.self.key" not in n},
            r"missing tensors: encoder.layer.1.attention.self.key.weight, .*key.bias$",
        ),
        (
            lambda t: {**t, "bert.embeddings.extra": torch.zeros(2)},
            r"unexpected tensors: embeddings.extra$",
        ),
        (
            lambda t: {**t, "bert.pooler.dense.bias": torch.zeros(3)},
            r"shape is not the config's: pooler.dense.bias is \[3\], not \[16\] \(new_head",
        ),
        (
            lambda t: {**t, "cls.predictions.decoder.weight": torch.zeros(50, 16)},
            "decoder.weight is not the word embedding",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        BertForPreTraining.from_pretrained(tmp_path)


def test_encoder_weights_do_not_make_a_pretraining_model(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"does not fit BertForPreTraining, it is of a BertModel: missing tensors: cls\.",
    ):
        BertForPreTraining.from_pretrained(tmp_path)


def test_damaged_and_missing_files(tmp_path):
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"PK\x03\x04" + content):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors: damaged, or not a safetensors"):
            BertModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors$"):
        BertModel.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model.bin: a pickle .* refused"):
        BertModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        BertModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        BertModel.from_pretrained(tmp_path / "nowhere")


def test_hub_name_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("offline\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"^a/b: no such folder, and not available .* \(offline\)$"
    ):
        BertModel.from_pretrained("a/b")


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("bertkern.models.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, seed=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
