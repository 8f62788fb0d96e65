"""Files of models: both ways with transformers, old names, and every kind of damage."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertkern.models import BertConfig, BertForPreTraining, BertModel

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
    "pretraining": (BertForPreTraining, transformers.BertForPreTraining),
}


def saved(folder, seed=0):
    torch.manual_seed(seed)
    model = BertForPreTraining(BertConfig(**SIZES)).eval()
    model.save_pretrained(folder)
    return model


def hidden(model):
    with torch.no_grad():
        return getattr(model, "bert", model)(IDS).last_hidden_state


@pytest.mark.parametrize("kind", CLASSES)
def test_transformers_reads_ours(kind, tmp_path):
    own_class, their_class = CLASSES[kind]
    torch.manual_seed(0)
    ours = own_class(BertConfig(**SIZES)).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = their_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(hidden(theirs), hidden(ours), rtol=0, atol=2e-6)
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
            r"shape is not the config's: pooler.dense.bias is \[3\], not \[16\]$",
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
        ValueError, match=r"does not fit BertForPreTraining: missing tensors: cls\."
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
