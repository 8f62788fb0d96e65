"""Other packages' Transformers compute what ours does: as they are independent of it, this is a
check of the model, too."""

import pytest
import torch
from bertkern.benchmarks.transformer_cases import texts_of
from bertkern.benchmarks.transformer_peers import (
    MARIAN_EPS,
    TorchTransformer,
    ctranslate2_of,
    marian_of,
    own_transformer,
)
from torch import nn
from torch.nn import functional as F

from bertkern.models import Transformer, TransformerConfig

SOURCES, TARGETS = [9, 1, 14, 5], [4, 11, 1, 7]


@pytest.fixture(scope="module")
def model():
    """Every weight does something, biases and LayerNorms, too."""
    torch.manual_seed(3)
    config = TransformerConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        layer_norm_eps=MARIAN_EPS,
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def pairs(model):
    return texts_of(SOURCES, model.config, 1), texts_of(TARGETS, model.config, 2)


@pytest.fixture(scope="module")
def logits(model, pairs):
    """Ours of the real target tokens, fp64."""
    source, target = pairs
    exact = own_transformer(model, 0.0).eval().double()
    return exact(source.ids, target.ids, source.mask).logits[target.mask]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_marian(model, pairs, logits, attention):
    pytest.importorskip("transformers", reason="transformers is not installed")
    source, target = pairs
    marian = marian_of(model, attention).eval()
    found = marian(
        input_ids=source.ids, attention_mask=source.mask.long(), decoder_input_ids=target.ids
    ).logits
    torch.testing.assert_close(found[target.mask].double(), logits, rtol=1e-5, atol=1e-5)


def test_torch(model, pairs, logits):
    source, target = pairs
    found = TorchTransformer(model).eval()(source.ids, target.ids, ~source.mask)
    torch.testing.assert_close(found[target.mask].double(), logits, rtol=1e-5, atol=1e-5)


def test_gradients_are_marians(model, pairs):
    """Of the embedding, to which all three of its uses add, in Marian's order of columns."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    source, target = pairs
    ours, marian = own_transformer(model, 0.0), marian_of(model)
    labels = target.ids.masked_fill(~target.mask, -100)
    ours(source.ids, target.ids, source.mask, target.mask, labels).loss.backward()
    found = marian(
        input_ids=source.ids, attention_mask=source.mask.long(), decoder_input_ids=target.ids
    ).logits
    F.cross_entropy(found.flatten(0, 1), labels.flatten(), label_smoothing=0.1).backward()
    expected = ours.embedding.weight.grad
    order = [*range(0, 32, 2), *range(1, 32, 2)]
    torch.testing.assert_close(
        marian.model.shared.weight.grad,
        expected[:, order],
        rtol=1e-5,
        atol=1e-5 * float(expected.abs().max()),
    )


def test_nobody_drops_attention_weights_or_inner_values(model):
    """Dropout is of the embedding, and of the output of each sublayer: 2 of an encoder layer, 3 of
    a decoder layer."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    peer = TorchTransformer(model, 0.3)
    rates = [module.p for module in peer.modules() if isinstance(module, nn.Dropout)]
    layers = model.config.num_layers
    assert sorted(rates) == [0.0] * 2 * layers + [0.3] * (1 + 5 * layers)
    attention = [m.dropout for m in peer.modules() if isinstance(m, nn.MultiheadAttention)]
    assert attention == [0.0] * 3 * layers
    config = marian_of(model, dropout=0.3).config
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.3, 0.0, 0.0)
    assert own_transformer(model, 0.3).config.dropout == 0.3


def test_everyone_trains_at_first(model):
    pytest.importorskip("transformers", reason="transformers is not installed")
    for peer in (own_transformer(model, 0.1), TorchTransformer(model, 0.1), marian_of(model)):
        assert all(module.training for module in peer.modules())
        count = sum(p.numel() for p in peer.parameters() if p.requires_grad)
        assert count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("change", [{"prenorm": True}, {"layer_norm_eps": 1e-6}])
def test_what_marian_cannot_be_is_refused(change):
    pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1}
    config = TransformerConfig(**{**sizes, "layer_norm_eps": MARIAN_EPS, **change})
    with pytest.raises(ValueError, match=r"post-LN with layer_norm_eps = 1e-05, not prenorm"):
        marian_of(Transformer(config))


def test_ctranslate2(model, pairs, tmp_path):
    """Its log-probability of given targets is ours."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    source, target = pairs
    translator, vocabulary = ctranslate2_of(
        model, tmp_path / "model", torch.float32, torch.device("cpu")
    )
    words = [
        [[vocabulary[i] for i in row[mask]] for row, mask in zip(t.ids, t.mask, strict=True)]
        for t in pairs
    ]
    scored = translator.score_batch(*words)
    config = model.config
    for row, result in enumerate(scored):
        ids = target.ids[row][target.mask[row]].tolist()
        found = model(
            source.ids[row][source.mask[row]][None], torch.tensor([[config.bos_token_id, *ids]])
        ).logits[0]
        labels = torch.tensor([*ids, config.eos_token_id])
        expected = found.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(result.log_probs), expected, rtol=1e-4, atol=1e-4)
