"""The Transformer against a plain build of the paper, against torch's, and against itself."""

import copy
import json
import math

import pytest
import torch
from models.paper_transformer import PaperTransformer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import bertkern
from bertkern.models import Sampling, Transformer, TransformerConfig
from bertkern.nn import sinusoidal_positions
from bertkern.ops import _backend

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
SOURCE_LENGTHS, TARGET_LENGTHS = (9, 1, 14, 5), (4, 11, 1, 7)
STYLES = pytest.mark.parametrize("prenorm", [False, True], ids=["post_ln", "pre_ln"])


def sequences(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 61, (n,), generator=generator).tolist() for n in lengths]


def padded(rows, fill=0):
    """(ids [B, S], mask [B, S]); garbage at padding, which must not be seen."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


def packed(rows, side, longest=None):
    lengths = torch.tensor([len(row) for row in rows])
    return {
        f"{side}_ids": torch.tensor([i for row in rows for i in row]),
        f"{side}_cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(),
        f"{side}_max_seqlen": longest or int(lengths.max()),
    }


@pytest.fixture
def texts():
    sources, targets = sequences(SOURCE_LENGTHS, 1), sequences(TARGET_LENGTHS, 2)
    labels = [[*row[1:], 3] for row in targets]
    labels[1][4] = -100
    return sources, targets, labels


def make(prenorm=False, dtype=torch.float32, **changes):
    torch.manual_seed(5)
    model = Transformer(TransformerConfig(**{**SIZES, **NO_DROPOUT, "prenorm": prenorm, **changes}))
    with torch.no_grad():  # biases and LayerNorms that do something
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


@STYLES
@pytest.mark.parametrize("way", ["padded", "packed"])
def test_loss_logits_and_gradients_are_the_papers(texts, prenorm, way):
    """fp32 to 1e-5 of a plain build with the same weights; label smoothing is torch's."""
    sources, targets, labels = texts
    model = make(prenorm)
    if way == "padded":
        (source, source_mask), (target, target_mask) = padded(sources, 60), padded(targets, 59)
        arguments = {
            "source_ids": source,
            "target_ids": target,
            "source_mask": source_mask,
            "target_mask": target_mask,
            "labels": padded(labels, 7)[0],
        }
    else:
        arguments = {**packed(sources, "source"), **packed(targets, "target")}
        arguments["labels"] = torch.tensor([i for row in labels for i in row])
    output = model.train()(**arguments, return_logits=True)
    output.loss.backward()
    plain = PaperTransformer(model).double()
    logits = plain(sources, targets)
    truth = torch.tensor([i for row in labels for i in row])
    loss = F.cross_entropy(torch.cat(logits), truth, label_smoothing=0.1)
    loss.backward()
    rows = output.logits
    if way == "padded":
        assert (rows[~target_mask] == 0).all()
        rows = rows[target_mask]
    torch.testing.assert_close(rows.double(), torch.cat(logits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        expected = plain.w(name).grad
        torch.testing.assert_close(
            parameter.grad.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )


def test_smoothing_is_of_training_alone(texts):
    sources, targets, labels = texts
    model = make(dtype=torch.float64)
    arguments = {**packed(sources, "source"), **packed(targets, "target")}
    truth = torch.tensor([i for row in labels for i in row])
    logits = model(**arguments).logits
    for training, smoothing in ((True, 0.1), (False, 0.0)):
        model.train(training)
        expected = F.cross_entropy(logits, truth, label_smoothing=smoothing)
        torch.testing.assert_close(model(**arguments, labels=truth).loss, expected)


@STYLES
def test_is_nn_transformer(prenorm):
    """torch's has a LayerNorm after its last layers always; here pre-LN has it."""
    model = make(prenorm, torch.float64).eval()
    config = model.config
    theirs = nn.Transformer(
        32, 4, 3, 3, 48, 0.0, "relu", batch_first=True, norm_first=prenorm, layer_norm_eps=1e-6
    )
    theirs = theirs.double().eval()
    if not prenorm:
        theirs.encoder.norm = theirs.decoder.norm = None
    pairs = []
    for i in range(config.num_layers):
        ours, other = model.encoder[i], theirs.encoder.layers[i]
        pairs += [
            (other.self_attn.in_proj_weight, ours.attention.qkv.weight),
            (other.self_attn.in_proj_bias, ours.attention.qkv.bias),
            (other.self_attn.out_proj, ours.attention.output),
            (other.linear1, ours.feed_forward.up),
            (other.linear2, ours.feed_forward.down),
            (other.norm1, ours.attention_norm),
            (other.norm2, ours.feed_forward_norm),
        ]
        ours, other = model.decoder[i], theirs.decoder.layers[i]
        cross = ours.cross_attention
        pairs += [
            (other.self_attn.in_proj_weight, ours.attention.qkv.weight),
            (other.self_attn.in_proj_bias, ours.attention.qkv.bias),
            (other.self_attn.out_proj, ours.attention.output),
            (
                other.multihead_attn.in_proj_weight,
                torch.cat((cross.query.weight, cross.kv.weight)),
            ),
            (other.multihead_attn.in_proj_bias, torch.cat((cross.query.bias, cross.kv.bias))),
            (other.multihead_attn.out_proj, cross.output),
            (other.linear1, ours.feed_forward.up),
            (other.linear2, ours.feed_forward.down),
            (other.norm1, ours.attention_norm),
            (other.norm2, ours.cross_attention_norm),
            (other.norm3, ours.feed_forward_norm),
        ]
    if prenorm:
        pairs += [
            (theirs.encoder.norm, model.encoder_norm),
            (theirs.decoder.norm, model.decoder_norm),
        ]
    with torch.no_grad():
        for there, here in pairs:
            if isinstance(there, nn.Module):
                there.weight.copy_(here.weight)
                there.bias.copy_(here.bias)
            else:
                there.copy_(here)
    (source, source_mask), (target, target_mask) = (
        padded(sequences(lengths, 4)) for lengths in (SOURCE_LENGTHS, TARGET_LENGTHS)
    )
    embedded = [
        model.embedding(ids) * math.sqrt(32) + sinusoidal_positions(ids.shape[1], 32)
        for ids in (source, target)
    ]
    y = theirs(
        *embedded,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], dtype=torch.float64
        ),
        src_key_padding_mask=~source_mask,
        memory_key_padding_mask=~source_mask,
    )
    expected = y @ model.embedding.weight.T
    logits = model(source, target, source_mask, target_mask).logits
    torch.testing.assert_close(logits[target_mask], expected[target_mask])


def test_first_weights():
    """Glorot's bounds for every matrix by itself, unit variance of the scaled embedding."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.base(vocab_size=5000, num_layers=1))
    assert model.embedding.weight.std().item() * math.sqrt(512) == pytest.approx(1, rel=0.01)
    layer = model.decoder[0]
    for weight, packs in (
        (layer.attention.qkv.weight, 3),
        (layer.cross_attention.kv.weight, 2),
        (layer.cross_attention.query.weight, 1),
    ):
        bound = math.sqrt(6 / (weight.shape[0] // packs + weight.shape[1]))
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert layer.feed_forward.up.bias.abs().max() == 0


@STYLES
def test_masks_may_have_holes_and_pad_left(texts, prenorm):
    """A token keeps its column as its position."""
    sources, targets, _ = texts
    model = make(prenorm).eval()
    source, source_mask = padded(sources)
    target, _ = padded(targets)
    whole = model(source[2:3], target[2:3, :1]).encoder_last_hidden_state
    mask = source_mask[2:3].clone()
    mask[0, :3] = mask[0, 6] = False
    changed = source[2:3].clone().masked_fill(~mask, 60)
    other = model(changed, target[2:3, :1], mask).encoder_last_hidden_state
    assert (other[~mask] == 0).all()
    assert not torch.allclose(whole[mask], other[mask])
    again = model(source[2:3], target[2:3, :1], mask).encoder_last_hidden_state
    assert torch.equal(other, again)


def test_long_padding_on_the_left():
    """Positions are columns of the padded batch, further than any sequence is long."""
    model = make(num_layers=1).eval()
    ids = torch.full((1, 700), 5)
    mask = torch.arange(700)[None] >= 690
    hidden = model(ids, ids[:, :1], mask).encoder_last_hidden_state
    assert hidden[0, :690].abs().max() == 0
    table = sinusoidal_positions(700, 32)
    assert torch.equal(model.positions(torch.tensor([699]), 700, torch.float32)[0], table[699])
    assert not torch.allclose(
        hidden[0, 690:], model(ids[:, :10], ids[:, :1]).encoder_last_hidden_state[0]
    )


def test_results_do_not_depend_on_the_batch(texts):
    """To rounding on a CPU, where torch's products depend on the rows (docs/numerics.md)."""
    sources, targets, _ = texts
    model = make().eval()
    together = model(**packed(sources, "source"), **packed(targets, "target")).logits
    rows = together.split(list(TARGET_LENGTHS))
    for source, target, row in zip(sources, targets, rows, strict=True):
        alone = model(**packed([source], "source"), **packed([target], "target")).logits
        torch.testing.assert_close(alone, row, rtol=0, atol=2e-6)


@STYLES
def test_parts_of_a_batch_drop_what_the_whole_drops(texts, prenorm):
    """Loss and gradients of two parts add up to those of the batch, dropout included."""
    sources, targets, labels = texts
    rates = {"dropout": 0.3, "attention_dropout": 0.2}
    model = make(prenorm, torch.float64, **rates).train()

    def loss_of(first, last):
        torch.manual_seed(11)
        chosen = [i for row in labels[first:last] for i in row]
        arguments = {
            **packed(sources[first:last], "source", max(SOURCE_LENGTHS)),
            **packed(targets[first:last], "target", max(TARGET_LENGTHS)),
            "labels": torch.tensor(chosen),
            "sequence_offset": first,
        }
        return model(**arguments).loss * sum(i != -100 for i in chosen)

    whole = loss_of(0, 4)
    whole.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = loss_of(0, 1) + loss_of(1, 4)
    parts.backward()
    torch.testing.assert_close(parts, whole)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    model.eval()
    assert not torch.allclose(loss_of(0, 4), whole)


@STYLES
def test_dropout_is_where_the_paper_has_it(prenorm):
    """Dropped everywhere, embeddings and sublayers vanish: what is left is the norms of nothing."""
    model = make(prenorm, dropout=1.0).train()
    output = model(torch.tensor([[5, 6, 7]]), torch.tensor([[2, 8]]))
    y = torch.zeros(1, 32)
    if prenorm:
        y = model.decoder_norm(y)
    else:
        for layer in model.decoder:
            for norm in (layer.attention_norm, layer.cross_attention_norm, layer.feed_forward_norm):
                y = norm(y)
    expected = (y @ model.embedding.weight.T).expand(2, -1)
    torch.testing.assert_close(output.logits[0], expected)


@pytest.mark.parametrize("rates", [{}, {"dropout": 0.3, "attention_dropout": 0.2}])
def test_gradient_checkpointing_changes_no_bit(texts, rates):
    sources, targets, labels = texts
    arguments = {**packed(sources, "source"), **packed(targets, "target")}
    arguments["labels"] = torch.tensor([i for row in labels for i in row])
    gradients = []
    for checkpointing in (False, True):
        model = make(**rates).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        model(**arguments).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["cpu", "triton"])
@STYLES
def test_backends_that_have_every_op_agree(texts, name, prenorm, nan_filled_memory):
    """Loss, gradients, dropout and all, and decoding by steps."""
    if reason := _backend.unusable(name, "cpu"):
        pytest.skip(f"backend {name}: {reason}")
    sources, targets, labels = (rows[1:3] for rows in texts)
    rates = {"dropout": 0.3, "attention_dropout": 0.2}
    arguments = {**packed(sources, "source"), **packed(targets, "target")}
    arguments["labels"] = torch.tensor([i for row in labels for i in row])
    results = []
    for own in ("reference", name):
        with bertkern.backend(own):
            model = make(prenorm, num_layers=1, **rates).train()
            torch.manual_seed(3)
            loss = model(**arguments).loss
            loss.backward()
            model.eval()
            with torch.no_grad():
                encoded = model.encode(**packed(sources, "source"))
                state = model.start_decoding(encoded, beams=2)
                for tokens in ([2] * 4, [*range(5, 9)]):
                    logits = model.decode_step(torch.tensor(tokens), state)
            results.append([loss, logits, *(p.grad for p in model.parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_compiles_into_one_graph(texts):
    sources, targets, labels = texts
    model = make(dropout=0.2, attention_dropout=0.1).train()
    arguments = {**packed(sources, "source"), **packed(targets, "target")}
    arguments["labels"] = torch.tensor([i for row in labels for i in row])
    found = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(1)
        loss = call(**arguments).loss
        loss.backward()
        found.append((loss, *(p.grad for p in model.parameters())))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@STYLES
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_by_steps_is_the_forward(texts, prenorm, beams):
    """Over more tokens than the caches have room for at first; reordered and selected."""
    sources, _, _ = texts
    model = make(prenorm).eval()
    rows = sequences([40] * 4 * beams, 9)
    state = model.start_decoding(model.encode(**packed(sources, "source")), beams)
    tokens = torch.tensor(rows)
    sequence = torch.arange(4).repeat_interleave(beams)
    with torch.no_grad():
        for step in range(40):
            if step == 20:  # beams of a sequence trade places
                order = (torch.arange(4 * beams) // beams) * beams + beams - 1
                state.reorder(order)
                tokens[:, :step] = tokens[order, :step]
            if step == 30:  # the first sentence is finished
                kept = torch.tensor([3, 1])
                state.select(kept)
                chosen = (kept[:, None] * beams + torch.arange(beams)).flatten()
                tokens, sequence = tokens[chosen], sequence[chosen]
            logits = model.decode_step(tokens[:, step], state)
            if step in (0, 19, 20, 32, 39):
                expected = model(
                    **packed([sources[i] for i in sequence], "source"),
                    **packed(tokens[:, : step + 1].tolist(), "target"),
                ).logits
                expected = expected.unflatten(0, tokens[:, : step + 1].shape)[:, -1]
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert state.length == 40


def test_a_source_or_target_may_be_empty():
    model = make().train()
    output = model(
        source_ids=torch.tensor([5, 6]),
        source_cu_seqlens=torch.tensor([0, 0, 2], dtype=torch.int32),
        source_max_seqlen=2,
        target_ids=torch.tensor([2, 7]),
        target_cu_seqlens=torch.tensor([0, 2, 2], dtype=torch.int32),
        target_max_seqlen=2,
        labels=torch.tensor([-100, -100]),
    )
    assert output.loss == 0
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(texts, dtype):
    sources, targets, _ = texts
    arguments = {**packed(sources, "source"), **packed(targets, "target")}
    model = make().eval()
    half = copy.deepcopy(model).to(dtype)
    logits = half(**arguments).logits
    assert logits.dtype == dtype
    plain = torch.cat(PaperTransformer(model)(sources, targets))
    scale = plain.abs().max()
    assert (logits.float() - plain).abs().max() < 0.05 * scale


def test_saved_and_read(tmp_path, texts):
    sources, targets, _ = texts
    model = make(prenorm=True).eval()
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config.prenorm
    arguments = {**packed(sources, "source"), **packed(targets, "target")}
    assert torch.equal(again(**arguments).logits, model(**arguments).logits)
    assert not again.training
    half = Transformer.from_pretrained(tmp_path, torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "twice/config.json").read_text()


def test_files_that_do_not_fit(tmp_path):
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.0.attention.qkv.bias"] = torch.zeros(3)
    tensors["stranger"] = tensors.pop("decoder.1.attention_norm.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit Transformer") as caught:
        Transformer.from_pretrained(tmp_path)
    for part in (
        "missing tensors: decoder.1.attention_norm.bias",
        "unexpected tensors: stranger",
        "encoder.0.attention.qkv.bias is [3], not [96]",
    ):
        assert part in str(caught.value)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config\.json: config key 'model_type' is 'bert'"):
        Transformer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Transformer.from_pretrained(tmp_path / "nowhere")


def test_argument_errors():
    model = make()
    ids, cu = torch.tensor([[4, 5]]), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"source_ids must be integer, not torch\.float32"):
        model(ids.float(), ids)
    with pytest.raises(ValueError, match=r"target_ids must be \[B, T\]"):
        model(ids, ids[0])
    with pytest.raises(ValueError, match="source_cu_seqlens and source_max_seqlen belong together"):
        model(ids[0], ids, source_cu_seqlens=cu)
    with pytest.raises(ValueError, match="target_mask is for padded input"):
        model(ids, ids[0], target_mask=ids > 0, target_cu_seqlens=cu, target_max_seqlen=2)
    with pytest.raises(ValueError, match="1 sources, but 2 targets"):
        model(ids, ids.expand(2, 2))
    with pytest.raises(ValueError, match=r"labels has shape \[1, 1\], target_ids \[1, 2\]"):
        model(ids, ids, labels=ids[:, :1])


def test_generate_needs_a_number_for_each_source():
    sampling = Sampling()
    with pytest.raises(ValueError, match="numbers must be one for each of 2 sources, not 1"):
        make().generate(torch.tensor([[4], [5]]), sampling=sampling, numbers=[0])


def test_generate_leaves_the_mode_as_it_was_and_draws_nothing():
    model = make(dropout=0.5).train()
    ids = torch.tensor([[4, 5, 3], [6, 7, 3]])
    found = [model.generate(ids, beam_size=2, num=2, max_length=5) for _ in range(2)]
    assert model.training
    assert found[0] == found[1] == model.eval().generate(ids, beam_size=2, num=2, max_length=5)
    assert all(0 not in h.ids and 2 not in h.ids for row in found[0] for h in row)
