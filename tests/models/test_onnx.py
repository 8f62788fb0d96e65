"""ONNX files, run by ONNX Runtime, against the models: every head, padded and of mixed lengths."""

import onnx
import onnxruntime
import pytest
import torch

from bertkern import models
from bertkern.models import BertConfig, export_onnx
from bertkern.models import onnx as exporter
from bertkern.reference.tolerance import assert_close, hold_in_most_draws

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 0,  # the exporter takes seconds a layer; heads need none
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
HEADS = {
    "BertModel": {"hidden_act": "gelu_new", "num_hidden_layers": 1},
    "BertForPreTraining": {"hidden_act": "relu"},
    "BertForMaskedLM": {},
    "BertForSequenceClassification": {"num_labels": 3},
    "BertForTokenClassification": {"num_labels": 5},
    "BertForQuestionAnswering": {},
    "BertForMultipleChoice": {},
}
BATCHES = {
    "one token": [1],
    "one length": [20, 20],
    "mixed lengths": [3, 11, 1, 20],
    "left padding": [-4, -9],
    "an empty sequence": [4, 0],
}


def make(name):
    torch.manual_seed(0)
    model = getattr(models, name)(BertConfig(**{**SIZES, **HEADS[name]}))
    for parameter in model.parameters():  # also what starts at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def draw(name, lengths):
    width = max(abs(n) for n in lengths)
    column = torch.arange(width)
    mask = torch.stack([column < n if n >= 0 else column >= width + n for n in lengths]).long()
    shape = mask.shape
    if name == "BertForMultipleChoice":
        mask = torch.stack((mask, mask.flip(0), mask), dim=1)
        shape = mask.shape
    return torch.randint(61, shape), mask, torch.randint(2, shape)


@pytest.mark.parametrize("name", HEADS)
def test_runtime_computes_what_the_model_does(name, tmp_path):
    model = make(name).train()
    path = export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    assert [i.name for i in session.get_inputs()] == list(exporter.INPUTS)
    model.eval()
    exact = make(name).double()

    def check(seed):
        torch.manual_seed(seed)
        values = {output: ([], [], []) for output in outputs}
        for lengths in BATCHES.values():
            batch = draw(name, lengths)
            feed = {n: x.numpy() for n, x in zip(exporter.INPUTS, batch, strict=True)}
            with torch.no_grad():
                ours, truth = vars(model(*batch)), vars(exact(*batch))
            for output, got in zip(outputs, session.run(outputs, feed), strict=True):
                three = (torch.from_numpy(got), truth[output], ours[output])
                assert three[0].shape == three[1].shape
                finite = three[1].isfinite()
                assert all(torch.equal(x.isfinite(), finite) for x in three)  # a span's padding
                for x, column in zip(three, values[output], strict=True):
                    column.append(x.where(finite, 0.0).reshape(-1, 1))
        for output, columns in values.items():
            # of all batches together: the largest error of a few values is a matter of luck
            assert_close(*(torch.cat(column) for column in columns), name=output)

    hold_in_most_draws(check)


def test_half_precision_and_an_encoder_without_pooler(tmp_path):
    """The file is in float32 whatever the model is in, and the model stays as it is."""
    model = models.BertModel(BertConfig(**SIZES), pooler=False).bfloat16()
    path = export_onnx(model, tmp_path / "deep" / "model.onnx")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(o.name, o.type) for o in session.get_outputs()] == [
        ("last_hidden_state", "tensor(float)")
    ]


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    monkeypatch.setitem(exporter._ACTIVATIONS, "gelu", torch.nn.functional.silu)
    with pytest.raises(RuntimeError, match=r"ONNX Runtime's logits of a batch .* differs"):
        export_onnx(make("BertForMaskedLM"), path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_refusals(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    with pytest.raises(TypeError, match=r"model must be one of BertModel, .* not Linear"):
        export_onnx(torch.nn.Linear(2, 2), path)
    monkeypatch.setattr(exporter, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"bytes in float32; an ONNX file holds 1000"):
        export_onnx(make("BertModel"), path)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript .* pip install 'bertkern\[onnx\]'"):
        export_onnx(make("BertModel"), path)
    assert not path.exists()
