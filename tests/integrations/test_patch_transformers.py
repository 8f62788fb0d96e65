"""`patch` and `unpatch` on models of transformers with random weights, against the same models
unpatched. Over 500 lines: every family is made, masked and compared by the same few functions."""

import copy
import inspect
import io
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from bertkern.integrations.patching import patch, unpatch  # noqa: E402

BERT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
DISTIL = {
    "vocab_size": 99,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 96,
    "max_position_embeddings": 64,
}
MASKED_LM = {
    "Bert": BERT,
    "Roberta": BERT,
    "XLMRoberta": BERT | {"hidden_act": "gelu_new"},
    "Camembert": BERT | {"hidden_act": "relu"},
    "Electra": BERT | {"embedding_size": 32},
    "DistilBert": DISTIL,
    "Albert": BERT | {"embedding_size": 32},
    "Data2VecText": BERT,
    "ModernBert": BERT | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
}
MASKS = {
    "none": [[1] * 12] * 3,
    "right padded": [[1] * 12, [1] * 5 + [0] * 7, [1] + [0] * 11],
    "left padded": [[1] * 12, [0] * 7 + [1] * 5, [0] * 3 + [1] * 9],
    "holes": [[1, 0] * 6, [1] * 12, [0, 0, 1, 1] * 3],
}


def make(name, options, **more):
    """A model in evaluation."""
    family = next(f for f in (*MASKED_LM, "Ernie") if name.startswith(f))
    config = getattr(transformers, family + "Config")(**options | more)
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def pair(name, options=BERT, dropout=0.0, **more):
    """The same weights twice: as transformers made them, and patched."""
    plain = make(name, options, **more)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "dropout_prob"):  # attention of transformers 4
            module.dropout_prob = dropout
    patched = copy.deepcopy(plain)
    return plain, patched, patch(patched)


def batch(mask="right padded"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (3, 12), generator=generator)
    attention_mask = torch.tensor(MASKS[mask])
    labelled = (torch.rand(3, 12, generator=generator) < 0.4) & attention_mask.bool()
    return {
        "input_ids": ids.masked_fill(attention_mask == 0, 1),
        "attention_mask": attention_mask,
        "labels": torch.where(labelled, ids, -100),
    }


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(patched, plain, atol=2e-5, rtol=1e-4):
    ours, theirs = gradients(patched), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=atol, rtol=rtol, msg=name)


TOLERANCES = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-9},
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
}


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [*((mask, torch.float64) for mask in MASKS), ("right padded", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("family", MASKED_LM)
def test_masked_lm_agrees(family, mask, dtype):
    plain, patched, report = pair(family + "ForMaskedLM", MASKED_LM[family])
    modern = ["model.embeddings", "model.layers.0.mlp", "model.layers.1.mlp"]
    left = [name for name in report.left if name]  # the loss of ModernBERT in transformers 5.0
    assert left == (modern if family == "ModernBert" else [])
    inputs = batch(mask)
    # ModernBERT's own loss is float32 in any dtype
    tolerances = TOLERANCES[torch.float32 if family == "ModernBert" else dtype]
    outputs = []
    for model in (plain.to(dtype), patched.to(dtype)):
        outputs.append(model.train()(**inputs))
        outputs[-1].loss.backward()
        model.eval()
    torch.testing.assert_close(
        outputs[1].loss, outputs[0].loss.to(outputs[1].loss.dtype), **tolerances
    )
    assert (outputs[1].logits is None) == ("" not in report.left)
    assert outputs[0].logits is not None
    assert_same_gradients(patched, plain, **tolerances)
    with torch.no_grad():
        a, b = plain(**inputs), patched(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(b.logits[real], a.logits[real], **tolerances)
    torch.testing.assert_close(b.loss, a.loss, **tolerances)


def test_against_float64():
    """Rounding apart, the patched model in float32 is as near to the truth as the plain one."""
    plain, patched, _ = pair("BertModel")
    inputs = {name: batch("none")[name] for name in ("input_ids", "attention_mask")}
    truth = copy.deepcopy(plain).double()
    outputs = [m(**inputs).last_hidden_state.double() for m in (truth, plain, patched)]
    errors = [(out - outputs[0]).abs().max() for out in outputs[1:]]
    assert errors[1] <= 2 * errors[0] + 1e-6
    exact = patched.double()(**inputs).last_hidden_state
    torch.testing.assert_close(exact, outputs[0], atol=1e-13, rtol=1e-12)


def test_pre_training_agrees():
    plain, patched, report = pair("BertForPreTraining")
    assert report.swapped["masked-LM loss"] == [""]
    inputs = batch() | {"token_type_ids": torch.tensor([[0] * 4 + [1] * 8] * 3)}
    labels = torch.tensor([0, 1, 0])
    for model in (plain, patched):
        model.train()
        model(**inputs, next_sentence_label=labels).loss.backward()
    assert_same_gradients(patched, plain)
    without = patched(**inputs)  # transformers computes a loss only where both labels are given
    assert without.loss is None
    assert without.prediction_logits.shape == (3, 12, 99)


@pytest.mark.parametrize("sparse", [False, True])
def test_modern_bert_takes_what_trainer_passes(sparse):
    plain, patched, _ = pair(
        "ModernBertForMaskedLM", MASKED_LM["ModernBert"], sparse_prediction=sparse
    )
    inputs = batch()
    for more in ({"num_items_in_batch": torch.tensor(40)}, {"num_items_in_batch": 7}):
        a, b = (model.train()(**inputs, **more).loss for model in (plain, patched))
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)
    other = inputs | {"labels": inputs["labels"].clamp(min=0), "ignore_index": 0}
    a, b = (model(**other) for model in (plain, patched))
    assert b.logits.shape == a.logits.shape
    torch.testing.assert_close(b.loss, a.loss, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["positions", "embeddings", "padding tokens"])
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_embeddings_agree(name, given):
    """Padding tokens: the rows of padding_idx get no gradient, and RoBERTa has two of them."""
    plain, patched, report = pair(name, DISTIL if name.startswith("Distil") else BERT)
    assert report.swapped["embeddings"] == ["embeddings"]
    ids = batch()["input_ids"]
    inputs = {"input_ids": ids}
    if given == "positions":
        inputs["position_ids"] = torch.arange(12).flip(0)[None] + 2
    elif given == "embeddings":
        inputs = {"inputs_embeds": torch.randn(3, 12, 64, dtype=torch.float64)}
    else:
        ids[:, ::3] = plain.embeddings.word_embeddings.padding_idx
    weights = torch.randn(3, 12, 64, dtype=torch.float64)
    for model in (plain, patched):
        (model.double()(**inputs).last_hidden_state * weights).sum().backward()
    assert_same_gradients(patched, plain, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "BertGenerationEncoder"])
def test_positions_count_from_the_cache_by_either_name(name):
    """transformers 5.24 calls `past_key_values_length` `cache_length`."""
    plain, patched, _ = pair(name, BERT)
    ids = batch("none")["input_ids"]
    known = inspect.signature(plain.embeddings.forward).parameters
    own = {n: 3 for n in ("past_key_values_length", "cache_length") if n in known}
    assert len(own) == 1
    expected = plain.embeddings(ids, **own)
    assert not torch.equal(plain.embeddings(ids), expected)
    for length in ("past_key_values_length", "cache_length"):
        torch.testing.assert_close(patched.embeddings(ids, **{length: 3}), expected)


def test_decoder_agrees():
    """Causal attention with a cache, and attention to a padded memory."""
    plain, patched, report = pair("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    assert "bert.encoder.layer.1.crossattention.self" in report.swapped["attention"]
    ids = batch("none")["input_ids"]
    memory = torch.randn(3, 12, 64)
    inputs = {
        "encoder_hidden_states": memory,
        "encoder_attention_mask": torch.tensor(MASKS["holes"]),
    }
    outputs = [model(ids, **inputs, labels=ids) for model in (plain, patched)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=2e-5, rtol=1e-4)
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(patched, plain)

    plain, patched, _ = pair("BertLMHeadModel", is_decoder=True)
    logits = []
    for model in (plain, patched):
        start = model(ids[:, :7], use_cache=True)
        end = model(ids[:, 7:], past_key_values=start.past_key_values)
        logits.append(torch.cat([start.logits, end.logits], 1))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[1], patched(ids).logits, atol=2e-5, rtol=1e-4)


def test_report_names_every_part():
    _, _, report = pair("BertForMaskedLM")
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    assert not report.left
    assert report.swapped["masked-LM loss"] == [""]
    assert report.swapped["embeddings"] == ["bert.embeddings"]
    assert report.swapped["FFN"] == layers
    assert report.swapped["attention"] == [f"{layer}.attention.self" for layer in layers]
    assert len(report.swapped["LayerNorm"]) == 6
    assert "swapped FFN: bert.encoder.layer.0 and 1 more" in str(report)
    assert "swapped masked-LM loss: the model itself" in str(report)


def test_report_says_what_is_left_and_why():
    model = make("BertModel", BERT, hidden_act="silu")
    first, second = model.encoder.layer
    first.output.dense = nn.Sequential(first.output.dense)
    second.attention.output.dropout.register_forward_hook(lambda *_: None)
    model.embeddings.word_embeddings.max_norm = 1.0
    model.config.output_attentions = False
    report = patch(model)
    left = report.left
    assert "SiLU" in left["encoder.layer.0.intermediate"]
    assert "its intermediate stays as it is" in left["encoder.layer.0"]
    assert (
        "its dense is a torch.nn.modules.container.Sequential, not a torch.nn"
        in left["encoder.layer.0.output"]
    )
    assert "its dropout has hooks" in left["encoder.layer.1.attention.output"]
    assert "max_norm" in left["embeddings"]
    assert "encoder.layer.1.output" in report.swapped["dropout + residual + LayerNorm"]
    assert "left embeddings: its word_embeddings has max_norm" in str(report)

    ernie = patch(make("ErnieModel", BERT, use_task_id=True))
    assert "the forward of ErnieEmbeddings is not that of BERT" in ernie.left["embeddings"]
    assert len(ernie.swapped["FFN"]) == 2

    asks = make("BertModel", BERT, attn_implementation="eager")
    asks.config.output_attentions = True
    report = patch(asks)
    assert "output_attentions" in report.left["encoder.layer.0.attention.self"]
    ids = batch()["input_ids"]
    assert len(asks(ids).attentions) == 2


def test_a_program_that_uses_more_is_left(monkeypatch):
    """As in another version of transformers, where all classes of the family have it."""
    from transformers.models.bert import modeling_bert

    from bertkern.integrations import patched_transformers as room

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.scale * self.dense(hidden_states) + input_tensor)

    model = make("BertModel", BERT)
    for kind in (modeling_bert.BertSelfOutput, modeling_bert.BertOutput):
        monkeypatch.setattr(kind, "forward", forward)
    room._known.cache_clear()
    report = patch(model)
    monkeypatch.undo()
    room._known.cache_clear()
    assert "the forward of BertOutput is not that of" in report.left["encoder.layer.0.output"]
    assert "encoder.layer.1.attention.output" in report.left
    assert "its output stays as it is" in report.left["encoder.layer.0"]
    assert len(report.swapped["linear + activation"]) == 2


def test_what_changes_after_the_patch_is_honoured():
    plain, patched, _ = pair("BertModel")
    inputs = {"input_ids": batch()["input_ids"]}

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    calls = []
    for model in (plain, patched):
        first, second = model.encoder.layer
        first.output.dense.__class__ = Twice
        first.attention.output.LayerNorm = nn.Identity()
        second.intermediate.intermediate_act_fn = nn.Tanh()
        second.output.dense.register_forward_hook(lambda m, args, out: calls.append(m) or 3 * out)
        model.embeddings.register_forward_hook(lambda m, args, out: out + 1)
        model.embeddings.word_embeddings.register_forward_hook(lambda m, args, out: out * 2)
    a, b = (m(**inputs).last_hidden_state for m in (plain, patched))
    torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)
    assert len(calls) == 2


def test_only_the_given_instance_changes():
    config = transformers.BertConfig(**BERT)
    one, other = (transformers.BertForMaskedLM(config).eval() for _ in range(2))
    ids = batch()["input_ids"]
    before = other(ids).logits
    own_classes = [type(m) for m in other.modules()]
    parameters, buffers = dict(one.named_parameters()), dict(one.named_buffers())
    keys = list(one.state_dict())
    patch(one)
    assert all(p is parameters[n] for n, p in one.named_parameters())
    assert all(b is buffers[n] for n, b in one.named_buffers())
    assert list(one.state_dict()) == keys
    assert one.cls.predictions.decoder.weight is one.bert.embeddings.word_embeddings.weight
    assert all(isinstance(m, c) for m, c in zip(one.modules(), own_classes, strict=True))
    assert [type(m) for m in other.modules()] == own_classes
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert one.config._attn_implementation == one.bert.config._attn_implementation == "bertkern"
    assert torch.equal(other(ids).logits, before)
    fresh = transformers.BertForMaskedLM(config)
    assert [type(m) for m in fresh.modules()] == own_classes


def test_unpatch_restores_class_and_bits():
    plain, patched, _ = pair("BertForMaskedLM", attn_implementation="eager")
    own_classes = [type(m) for m in plain.modules()]
    ids = batch()["input_ids"]
    unpatch(plain)  # nothing to undo
    patched.config.problem_type = "regression"  # what a user sets meanwhile stays
    for _ in range(2):
        unpatch(patched)
        assert [type(m) for m in patched.modules()] == own_classes
        assert patched.config._attn_implementation == "eager"
        assert patched.bert.config is patched.config
        assert patched.config.problem_type == "regression"
        assert torch.equal(patched(ids).logits, plain(ids).logits)


def test_patching_twice_is_patching_once():
    plain, patched, report = pair("BertModel")
    classes = [type(m) for m in patched.modules()]
    assert patch(patched).swapped == report.swapped
    assert [type(m) for m in patched.modules()] == classes
    unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]


def test_part_and_whole():
    """A model inside a model, patched first, is unpatched with the whole."""
    plain, patched, _ = pair("BertForMaskedLM")
    unpatch(patched)
    patch(patched.bert)
    assert patched.config._attn_implementation == "sdpa"
    assert type(patched) is type(plain)
    patch(patched)
    unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    assert patched.config._attn_implementation == "sdpa"
    assert patched.bert.config._attn_implementation == "sdpa"


def test_a_model_inside_a_users_module():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = make("RobertaModel", BERT)
            self.norm = nn.LayerNorm(64)

        def forward(self, ids):
            return self.norm(self.encoder(ids).last_hidden_state[:, 0])

    plain = Classifier().eval()
    patched = copy.deepcopy(plain)
    report = patch(patched)
    assert "encoder.encoder.layer.1.attention.self" in report.swapped["attention"]
    assert "norm" in report.swapped["LayerNorm"]
    ids = batch("none")["input_ids"]
    torch.testing.assert_close(patched(ids), plain(ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_dropout_acts_in_training_only(family):
    _, patched, _ = pair(family + "ForMaskedLM", MASKED_LM[family], dropout=0.5)
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(patched(ids).logits, patched(ids).logits)
        patched.train()
        first, second = patched(ids).logits, patched(ids).logits
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        first = patched(ids).logits
        torch.manual_seed(3)
        assert torch.equal(patched(ids).logits, first)
        for module in patched.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(patched(ids).logits, patched(ids).logits)


@pytest.mark.parametrize("name", ["embeddings", "attention", "attention.output", "output"])
def test_each_dropout_acts(name):
    _, patched, _ = pair("BertModel", dropout=0.5)
    ids = batch()["input_ids"]
    part = patched.embeddings if name == "embeddings" else patched.encoder.layer[0]
    part.get_submodule("" if name == "embeddings" else name).train()
    assert not torch.equal(patched(ids).last_hidden_state, patched(ids).last_hidden_state)
    part.eval()
    assert torch.equal(patched(ids).last_hidden_state, patched(ids).last_hidden_state)


def test_dropout_drops_at_its_rate():
    _, patched, _ = pair("BertModel", dropout=0.25)
    layer = patched.encoder.layer[0].output.train()
    nn.init.zeros_(layer.dense.weight)
    nn.init.ones_(layer.dense.bias)
    out = layer(torch.zeros(64, 8, 96), torch.zeros(64, 8, 64))
    rate = (out < 0).float().mean()  # LayerNorm of zeros and ones: below the mean are the zeros
    assert abs(rate - 0.25) < 0.01
    out = patched.embeddings.train()(torch.ones(64, 32, dtype=torch.long))
    assert abs((out == 0).float().mean() - 0.25) < 0.01

    _, patched, _ = pair("DistilBertModel", DISTIL, dropout=0.25)
    ffn = patched.transformer.layer[0].ffn.train()
    out = ffn(torch.randn(64, 32, 64))
    assert abs((out == 0).float().mean() - 0.25) < 0.01


def test_labels_and_outputs_as_transformers_gives_them():
    plain, patched, _ = pair("BertForMaskedLM")
    inputs = batch()
    nothing = inputs | {"labels": torch.full((3, 12), -100)}
    for model in (plain, patched):
        model.train()
        assert model(**nothing).loss.isnan()
        assert model(inputs["input_ids"]).logits.shape == (3, 12, 99)
    by_position = patched(inputs["input_ids"], *[None] * 6, inputs["labels"], return_dict=False)
    torch.testing.assert_close(
        by_position[0], plain(inputs["input_ids"], labels=inputs["labels"]).loss
    )
    assert len(by_position) == 1
    hidden = patched(**inputs, output_hidden_states=True).hidden_states
    expected = plain(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == len(expected) == 3
    torch.testing.assert_close(hidden[1], expected[1], atol=2e-5, rtol=1e-4)
    assert inspect.signature(patched.forward) == inspect.signature(plain.forward)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        patched(**inputs, output_attentions=True)


def test_copies_and_pickles():
    plain, patched, _ = pair("BertForMaskedLM")
    ids = batch()["input_ids"]
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    expected = patched(ids).logits
    for other in (copy.deepcopy(patched), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in patched.modules()]
        assert torch.equal(other(ids).logits, expected)
        assert other.config is not patched.config
        unpatch(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]
        assert torch.equal(other(ids).logits, plain(ids).logits)
    assert torch.equal(patched(ids).logits, expected)


def test_saved_models_are_transformers_own(tmp_path):
    plain, patched, _ = pair("BertForMaskedLM")
    patched.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(loaded) is transformers.BertForMaskedLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = batch()["input_ids"]
    assert torch.equal(loaded.eval()(ids).logits, plain(ids).logits)


def test_checkpointing_gives_the_same_bits():
    _, patched, _ = pair("BertForMaskedLM", dropout=0.1)
    inputs = batch()
    grads = []
    for checkpointing in (False, True):
        for layer in patched.bert.encoder.layer:
            layer.gradient_checkpointing = checkpointing
            layer._gradient_checkpointing_func = lambda *a: torch.utils.checkpoint.checkpoint(
                *a, use_reentrant=False
            )
        torch.manual_seed(5)
        patched.train().zero_grad()
        patched(**inputs).loss.backward()
        grads.append({n: g.clone() for n, g in gradients(patched).items()})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[1][n], g) for n, g in grads[0].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    plain, patched, _ = pair("BertForMaskedLM")
    inputs = batch("none")
    expected = plain(**inputs).logits
    tolerance = 20 * torch.finfo(dtype).eps * expected.abs().max()
    with torch.autocast("cpu", dtype):
        mixed = patched(**inputs).logits
        patched.train()(**inputs).loss.backward()
    assert gradients(patched)["bert.encoder.layer.0.output.dense.weight"].dtype == torch.float32
    patched.eval().to(dtype)
    assert patched(**inputs).logits.dtype == mixed.dtype == dtype
    for logits in (mixed, patched(**inputs).logits):
        assert (logits.float() - expected).abs().max() < tolerance


def test_compiles_as_one_graph():
    _, patched, _ = pair("BertForMaskedLM", num_hidden_layers=1)
    inputs = batch()
    patched.train()
    expected = patched(**inputs).loss
    expected.backward()
    grads = {n: g.clone() for n, g in gradients(patched).items()}
    patched.zero_grad()
    loss = torch.compile(patched, fullgraph=True, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    for name, grad in gradients(patched).items():
        torch.testing.assert_close(grad, grads[name], atol=2e-6, rtol=1e-4, msg=name)


def test_transformers_is_imported_only_for_its_own_models(monkeypatch):
    room = "bertkern.integrations.patched_transformers"
    patch(make("BertModel", BERT))
    monkeypatch.delitem(sys.modules, room)
    assert patch(nn.Sequential(nn.LayerNorm(8))).swapped == {"LayerNorm": ["0"]}
    assert room not in sys.modules


def test_anything_else_is_refused():
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not str"):
            function("bert-base-uncased")
