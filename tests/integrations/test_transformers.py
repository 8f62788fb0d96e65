"""attn_implementation="bertkern" against transformers' own attention, on models with random
weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from bertkern.integrations.transformers import (  # noqa: E402  (registers)
    bertkern_attention,
    bertkern_mask,
)
from bertkern.integrations.transformers_versions import (  # noqa: E402
    by_positions,
    takes_attention,
)

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


GROUPED = SMALL | {"num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACKED = {
    "vocab_size": 99,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
OPTIONS = {  # what the attention of each is asked for beyond BERT's
    "sliding windows of an encoder": (
        "ModernBert",
        SMALL
        | SPECIAL
        | {"cls_token_id": 1, "sep_token_id": 2}
        | {"global_attn_every_n_layers": 2, "local_attention": 6},
    ),
    "grouped heads": ("Llama", GROUPED),
    "sliding windows": ("Mistral", GROUPED | {"sliding_window": 5}),
    "some windows": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "softcap": (
        "Gemma2",
        GROUPED | {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    ),
    "sinks": (
        "GptOss",
        GROUPED
        | {"head_dim": 16, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"pad_token_id": 0},
    ),
    "cross attention": ("Bart", STACKED),
    "position bias": ("T5", T5 | {"decoder_start_token_id": 0}),
}


def options_pair(name, head=""):
    """A pair of one of the models of OPTIONS, with the class name's ending `head`."""
    family, options = OPTIONS[name]
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}{head or 'Model'}")
    if not takes_attention(model_class):
        pytest.skip(f"transformers {transformers.__version__}: {family}'s attention is its own")
    models = []
    for implementation in ("eager", "bertkern"):
        torch.manual_seed(0)
        config = config_class(**options)
        models.append(model_class._from_config(config, attn_implementation=implementation).eval())
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees_forward_and_backward(name, mask):
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    attention_mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    inputs = {"input_ids": ids, "attention_mask": attention_mask}
    real = torch.ones(3, 12).bool() if attention_mask is None else attention_mask.bool()
    if OPTIONS[name][0] in ("Bart", "T5"):
        inputs["decoder_input_ids"] = ids[:, :7]
        real = torch.ones(3, 7).bool()
    results = []
    for model in options_pair(name):
        hidden = model(**inputs).last_hidden_state[real]
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        (hidden * direction).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), grads))
    (wanted, wanted_grads), (hidden, grads) = results
    torch.testing.assert_close(hidden, wanted, atol=2e-5, rtol=1e-5)
    assert grads.keys() == wanted_grads.keys()
    for key, grad in wanted_grads.items():
        torch.testing.assert_close(grads[key], grad, atol=2e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("cache", [None, "static"], ids=["growing", "static"])
@pytest.mark.parametrize("name", ["grouped heads", "sliding windows", "softcap", "sinks"])
def test_generation_agrees_with_every_cache(name, cache):
    """Keys of a static cache end with rows that nothing was written to."""
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    a, b = (
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )
        for model in options_pair(name, "ForCausalLM")
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["bool", "added", "of keys"])
def test_masks_of_four_dimensions_are_taken_as_they_are(kind):
    eager, ours = pair(transformers.BertConfig, transformers.BertModel)
    ids = torch.randint(0, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    allowed = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(2)) > 0.4
    allowed |= torch.eye(12).bool()
    if kind == "of keys":
        allowed = torch.tensor(MASKS["left padded"]).bool()[:, None, None]
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = eager(ids, attention_mask=added)[0]
        found = ours(ids, attention_mask=added if kind == "added" else allowed)[0]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "sliding windows of an encoder"])
def test_compiles_whole(family):
    if family == "Bert":
        ours = pair(transformers.BertConfig, transformers.BertModel)[1]
    else:
        ours = options_pair(family)[1]
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor(MASKS["left padded"])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, wanted = compiled(ids, attention_mask=mask)[0], ours(ids, attention_mask=mask)[0]
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=2e-5, rtol=1e-5)


def test_values_of_another_width():
    module = torch.nn.Module()
    module.is_causal = True
    make = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 9, 24, generator=make) for _ in range(2))
    v = torch.randn(2, 4, 9, 16, generator=make)
    out, _ = bertkern_attention(module, q, k, v, None)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2), atol=2e-6, rtol=1e-5)


def test_sinks_are_as_exact_as_the_tensors():
    """In float64: a sink is one more key whose value is 0."""
    module = torch.nn.Module()
    module.is_causal = False
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=make, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(4, generator=make, dtype=torch.float64)
    out, _ = bertkern_attention(module, q, k, v, None, s_aux=sinks)
    scores = q @ k.mT * 8**-0.5
    scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 9, 1)], -1)
    wanted = scores.softmax(-1)[..., :-1] @ v
    torch.testing.assert_close(out, wanted.transpose(1, 2), atol=1e-12, rtol=1e-12)


def test_packed_sequences_take_every_option():
    """Two packed sequences are what each of them alone is."""
    module = torch.nn.Module()
    module.is_causal = True
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 12, 16, generator=make) for _ in range(3))
    options = {"sliding_window": 3, "softcap": 2.0, "s_aux": torch.randn(4, generator=make)}
    cu_seqlens = torch.tensor([0, 5, 12])
    packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    out, _ = bertkern_attention(
        module, q, k, v, None, max_length_q=7, max_length_k=7, **packed, **options
    )
    for part in (slice(0, 5), slice(5, 12)):
        alone, _ = bertkern_attention(module, *(t[:, :, part] for t in (q, k, v)), None, **options)
        torch.testing.assert_close(out[:, part], alone, atol=1e-6, rtol=1e-6)


def test_masks_of_positions_are_masks_of_lengths():
    """As transformers 5.0 asks for them."""
    given = {}
    mask = by_positions(lambda **options: given.update(options))
    causal = transformers.masking_utils.causal_mask_function
    mask(cache_position=torch.arange(3, 7), mask_function=causal, kv_length=9)
    assert given.pop("device") == torch.device("cpu")
    assert type(given["q_offset"]) is int
    assert given == {"q_length": 4, "q_offset": 3, "mask_function": causal, "kv_length": 9}


def test_a_model_whose_attention_is_its_own_is_refused():
    """It would read lengths of keys, or no mask at all, as something else."""
    assert transformers.MPNetModel.config_class is transformers.MPNetConfig
    with pytest.raises(NotImplementedError, match=r"MPNet.* computes its attention itself"):
        bertkern_mask(1, 3, 3, config=transformers.MPNetConfig())


def test_what_would_be_ignored_is_refused():
    _, ours = pair(transformers.BertConfig, transformers.BertModel)
    ids = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"attention_mask of shape \[2, 6, 6\]"):
        ours(ids, attention_mask=torch.zeros(2, 6, 6))
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        ours(ids, output_attentions=True)
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(NotImplementedError, match="block_indices is not supported"):
        bertkern_attention(torch.nn.Module(), q, q, q, None, block_indices=q)
