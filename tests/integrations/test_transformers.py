"""attn_implementation="bertkern" against transformers' own attention, on models with random
weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import bertkern.integrations.transformers  # noqa: E402, F401  (registers "bertkern")

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
MASKS = {
    "none": None,
    "full": [[1] * 12] * 3,
    "right padded": [[1] * 12, [1] * 5 + [0] * 7, [1] + [0] * 11],
    "left padded": [[1] * 12, [0] * 7 + [1] * 5, [0] * 3 + [1] * 9],
    "holes": [[1, 0] * 6, [1] * 12, [0, 0, 1, 1] * 3],
}


def pair(config_class, model_class, **options):
    """The same weights twice: transformers' eager attention and ours."""
    torch.manual_seed(0)
    eager, ours = (
        model_class._from_config(
            config_class(**SMALL, **options), attn_implementation=implementation
        ).eval()
        for implementation in ("eager", "bertkern")
    )
    ours.load_state_dict(eager.state_dict())
    assert eager.config._attn_implementation == "eager"
    assert ours.config._attn_implementation == "bertkern"
    return eager, ours


@pytest.mark.parametrize("mask", MASKS)
def test_bert_agrees_forward_and_backward(mask):
    eager, ours = pair(transformers.BertConfig, transformers.BertModel)
    ids = torch.randint(0, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    attention_mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    real = torch.ones(3, 12).bool() if attention_mask is None else attention_mask.bool()
    grads = []
    for model in (eager, ours):
        hidden = model(ids, attention_mask=attention_mask).last_hidden_state[real]
        hidden.square().sum().backward()
        grads.append(
            (hidden, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=2e-5, rtol=1e-5)
    assert grads[0][1].keys() == grads[1][1].keys()
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], grad, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mask", ["none", "right padded"])
def test_other_encoders_agree(mask):
    for config_class, model_class in (
        (transformers.RobertaConfig, transformers.RobertaModel),
        (transformers.ElectraConfig, transformers.ElectraModel),
    ):
        eager, ours = pair(config_class, model_class)
        ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(1))
        attention_mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
        real = torch.ones(3, 12).bool() if attention_mask is None else attention_mask.bool()
        with torch.no_grad():
            a, b = (
                m(ids, attention_mask=attention_mask).last_hidden_state[real] for m in (eager, ours)
            )
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["none", "right padded", "left padded"])
def test_causal_decoder_agrees(mask):
    """BERT does not pass is_causal: it is read off the module."""
    eager, ours = pair(transformers.BertConfig, transformers.BertLMHeadModel, is_decoder=True)
    ids = torch.randint(0, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    attention_mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    real = torch.ones(3, 12).bool() if attention_mask is None else attention_mask.bool()
    with torch.no_grad():
        a, b = (m(ids, attention_mask=attention_mask).logits[real] for m in (eager, ours))
    torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)


def test_cached_generation_agrees():
    eager, ours = pair(
        transformers.BertConfig, transformers.BertLMHeadModel, is_decoder=True, pad_token_id=0
    )
    ids = torch.randint(1, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    a, b = (
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        for m in (eager, ours)
    )
    assert torch.equal(a, b)


def test_dropout_acts_in_training_only():
    _, ours = pair(transformers.BertConfig, transformers.BertModel, hidden_dropout_prob=0.0)
    ids = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(ids)[0], ours(ids)[0])
        ours.train()
        assert not torch.equal(ours(ids)[0], ours(ids)[0])


def test_what_would_be_ignored_is_refused():
    _, ours = pair(transformers.BertConfig, transformers.BertModel)
    ids = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"attention_mask of shape \[2, 1, 6, 6\]"):
        ours(ids, attention_mask=torch.zeros(2, 1, 6, 6))
