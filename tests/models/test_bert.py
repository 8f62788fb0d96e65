"""BERT against transformers with the same weights, and against itself: packed, batched, dropped."""

import copy

import pytest
import torch
import transformers

from bertkern.models import BertConfig, BertForPreTraining, BertModel
from bertkern.models.checkpoint import file_names

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = (24, 1, 17, 5)


@pytest.fixture
def batch():
    torch.manual_seed(3)
    shape = (len(LENGTHS), 24)
    mask = torch.arange(24) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 97, shape).masked_fill(~mask, 0)
    types = torch.randint(0, 2, shape).masked_fill(~mask, 0)
    chosen = (torch.rand(shape) < 0.3) & mask
    labels = torch.randint(1, 97, shape).masked_fill(~chosen, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "token_type_ids": types,
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }


def inputs_only(batch):
    return {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}


def as_packed(batch):
    mask = batch["attention_mask"].bool()
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    packed = {k: batch[k][mask] for k in ("input_ids", "token_type_ids", "labels")}
    return {
        **packed,
        "next_sentence_label": batch["next_sentence_label"],
        "cu_seqlens": cu_seqlens,
        "max_seqlen": mask.shape[1],
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(theirs, ours): BertForPreTraining of transformers, and ours with its weights."""
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES, **NO_DROPOUT))
    for parameter in theirs.parameters():  # also what starts at 0 and 1
        parameter.data += 0.02 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, BertForPreTraining.from_pretrained(folder)


def test_forward(pair, batch):
    theirs, ours = (model.eval() for model in pair)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs.bert(**inputs_only(batch))
        got = ours.bert(**inputs_only(batch))
        torch.testing.assert_close(
            got.last_hidden_state[mask], expected.last_hidden_state[mask], rtol=0, atol=2e-6
        )
        assert (got.last_hidden_state[~mask] == 0).all()
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=0, atol=2e-6)
        expected, got = theirs(**inputs_only(batch)), ours(**inputs_only(batch))
        torch.testing.assert_close(
            got.prediction_logits[mask], expected.prediction_logits[mask], rtol=0, atol=2e-6
        )
        torch.testing.assert_close(
            got.seq_relationship_logits, expected.seq_relationship_logits, rtol=0, atol=2e-6
        )
        assert got.loss is None


def gradients_by_file_name(model):
    """Of our model, under the names of transformers' parameters."""
    gradients = {}
    for name, parameter in model.named_parameters():
        names = file_names(name)
        gradients.update(zip(names, parameter.grad.chunk(len(names)), strict=True))
    return gradients


def test_loss_and_every_gradient(pair, batch):
    theirs, ours = (copy.deepcopy(model).train() for model in pair)
    expected, got = theirs(**batch), ours(**batch)
    assert got.prediction_logits is None
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.masked_lm_loss + got.next_sentence_loss, got.loss)
    expected.loss.backward()
    got.loss.backward()
    ours_gradients = gradients_by_file_name(ours)
    theirs_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours_gradients.keys() == theirs_gradients.keys()
    for name, gradient in theirs_gradients.items():
        torch.testing.assert_close(
            ours_gradients[name], gradient, rtol=1e-5, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_autocast_trains_in_bfloat16(batch):
    """The float32 embeddings meet bfloat16 products at the first residual."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**SIZES, **NO_DROPOUT))
    exact = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_twenty_training_steps(pair):
    """The loss curves of 20 AdamW steps agree to float32 rounding."""
    curves = []
    for model in pair:
        model = copy.deepcopy(model).train()
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.01)
        curve = []
        for _ in range(20):
            lengths = torch.randint(2, 25, (4, 1))
            mask = torch.arange(24) < lengths
            ids = torch.randint(1, 97, (4, 24)) * mask
            labels = ids.masked_fill((torch.rand(4, 24) > 0.3) | ~mask, -100)
            labels[:, 0] = ids[:, 0]
            loss = model(
                input_ids=ids,
                attention_mask=mask.long(),
                labels=labels,
                next_sentence_label=torch.randint(0, 2, (4,)),
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=2e-5, atol=0)
    assert curves[0][0] != curves[0][-1]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_packed_is_padded_bit_for_bit(batch, dropout):
    """Also with dropout: the same seed gives the same masks, as rows are the padded batch's."""
    torch.manual_seed(7)
    config = BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = BertForPreTraining(config).train()
    results = []
    for arguments in (batch, as_packed(batch)):
        torch.manual_seed(11)
        model.zero_grad()
        output = model(**arguments, return_logits=True)
        output.loss.backward()
        logits = output.prediction_logits
        if logits.dim() == 3:
            logits = logits[batch["attention_mask"].bool()]
        results.append((output.loss, logits, {n: p.grad for n, p in model.named_parameters()}))
    (loss, logits, gradients), (packed_loss, packed_logits, packed_gradients) = results
    assert torch.equal(loss, packed_loss)
    assert torch.equal(logits, packed_logits)
    assert all(torch.equal(gradients[n], packed_gradients[n]) for n in gradients)
    if dropout:
        torch.manual_seed(12)
        assert not torch.equal(model(**batch).loss, loss)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_gives_the_same_bits(batch, dropout):
    torch.manual_seed(1)
    config = BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = BertForPreTraining(config).train()
    calls = []
    for layer in model.bert.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        torch.manual_seed(11)
        model.zero_grad()
        loss = model(**as_packed(batch)).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters()}, len(calls)

    loss, expected, plain_calls = step()
    model.gradient_checkpointing_enable()
    again, got, checkpointed_calls = step()
    assert (plain_calls, checkpointed_calls) == (2, 4)  # each layer a second time
    assert torch.equal(again, loss)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    model.eval()
    assert step()[2] == 2
    model.train().gradient_checkpointing_disable()
    assert step()[2] == 2


def test_gradient_checkpointing_keeps_less(batch):
    """Counted in bytes that autograd keeps."""
    model = BertModel(BertConfig(**{**SIZES, "num_hidden_layers": 6})).train()
    kept = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**inputs_only(batch))
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for where, size in sizes.items() if where not in parameters))
    assert kept[1] < kept[0] / 3


def test_padding_does_not_matter(batch):
    """Left padding and holes, with position_ids given, change nothing; without, columns count."""
    model = BertModel(BertConfig(**SIZES)).eval()
    mask = batch["attention_mask"].bool()
    ids = batch["input_ids"]
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(24, generator=generator).sort()[0] for _ in LENGTHS])
    scattered = torch.zeros_like(ids)
    places = torch.zeros_like(mask)
    positions = torch.zeros_like(ids)
    for b, length in enumerate(LENGTHS):
        columns = torch.randperm(24, generator=generator)[:length].sort()[0]
        scattered[b, columns] = ids[b, :length]
        places[b, columns] = True
        positions[b, columns] = order[b, :length]
    with torch.no_grad():
        expected = model(ids, batch["attention_mask"])
        got = model(scattered, places, position_ids=positions)
        assert torch.equal(got.last_hidden_state[places], expected.last_hidden_state[mask])
        assert torch.equal(got.pooler_output, expected.pooler_output)
        by_column = model(scattered, places).last_hidden_state[places]
        columns = torch.arange(24).expand(4, 24)
        explicit = model(scattered, places, position_ids=columns).last_hidden_state[places]
        assert torch.equal(by_column, explicit)


def test_results_do_not_depend_on_the_batch(batch):
    """To float32 rounding: torch's CPU products of a few rows may sum in another order."""
    model = BertModel(BertConfig(**SIZES)).eval()
    with torch.no_grad():
        together = model(**inputs_only(batch)).last_hidden_state
        for b, length in enumerate(LENGTHS):
            alone = model(
                batch["input_ids"][b : b + 1, :length],
                None,
                batch["token_type_ids"][b : b + 1, :length],
            )
            torch.testing.assert_close(
                alone.last_hidden_state[0], together[b, :length], rtol=0, atol=1e-6
            )


def test_garbage_at_padding_and_past_the_end_does_not_matter(batch):
    model = BertModel(BertConfig(**SIZES)).eval()
    packed = as_packed(batch)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs_only(batch))
        dirty = {**inputs_only(batch), "input_ids": batch["input_ids"].masked_fill(~mask, 50)}
        assert torch.equal(model(**dirty).last_hidden_state, expected.last_hidden_state)
        slack = torch.full((30,), 50)
        got = model(
            torch.cat((packed["input_ids"], slack)),
            token_type_ids=torch.cat((packed["token_type_ids"], slack * 0)),
            cu_seqlens=packed["cu_seqlens"],
            max_seqlen=24,
        )
    real = sum(LENGTHS)
    torch.testing.assert_close(
        got.last_hidden_state[:real], expected.last_hidden_state[mask], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=0, atol=1e-6)


def test_label_tokens(batch):
    """labels [T], and labels [P] with their tokens (here with a filler of -100), are the same."""
    model = BertForPreTraining(BertConfig(**SIZES)).eval()
    packed = as_packed(batch)
    expected = model(**packed).loss
    tokens = (packed["labels"] != -100).nonzero()[:, 0]
    packed["labels"] = torch.cat((packed["labels"][tokens], torch.tensor([-100])))
    got = model(**packed, label_tokens=torch.cat((tokens, torch.tensor([0]))))
    torch.testing.assert_close(got.loss, expected, rtol=1e-6, atol=0)


META = torch.device("meta")  # its values cannot be read: whoever would wait for a GPU fails


def on_meta(arguments):
    return {k: v.to(META) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.fixture
def reads(monkeypatch):
    """Counts what is read from the device; gives the mask's and labels' real counts."""
    calls = []

    def tolist(tensor, real=torch.Tensor.tolist):
        if tensor.device != META:
            return real(tensor)
        calls.append(tensor)
        return [sum(LENGTHS), max(LENGTHS), 9][: len(tensor)]

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return calls


@pytest.mark.parametrize(
    ("where", "expected"), [("packed", 0), ("host mask", 0), ("no mask", 0), ("device mask", 1)]
)
def test_synchronisations_of_a_step(batch, reads, where, expected):
    model = BertForPreTraining(BertConfig(**SIZES)).to(META).train()
    host = {name: batch[name] for name in ("attention_mask", "labels")}
    arguments = on_meta(batch)
    if where == "packed":
        packed = as_packed(batch)
        tokens = (packed["labels"] != -100).nonzero()[:, 0]
        packed["labels"] = packed["labels"][tokens]
        arguments = on_meta({**packed, "label_tokens": tokens})
    elif where != "device mask":
        arguments.update(host)
    if where == "no mask":
        del arguments["attention_mask"]
    model(**arguments).loss.backward()
    assert len(reads) == expected


def test_one_loss_or_none(batch):
    model = BertForPreTraining(BertConfig(**SIZES)).eval()
    mlm = {k: v for k, v in batch.items() if k != "next_sentence_label"}
    output = model(**mlm)
    assert torch.equal(output.loss, output.masked_lm_loss)
    assert output.next_sentence_loss is None
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    output = model(**nothing)
    assert output.masked_lm_loss == 0
    assert output.loss.isfinite()


def test_empty_inputs():
    model = BertForPreTraining(BertConfig(**SIZES)).eval()
    output = model(torch.zeros(0, 5, dtype=torch.long))
    assert output.prediction_logits.shape == (0, 5, 97)
    empty = torch.zeros(2, 3, dtype=torch.long)
    output = model.bert(empty, attention_mask=empty)
    assert (output.last_hidden_state == 0).all()
    assert output.pooler_output.isfinite().all()


@pytest.mark.parametrize(
    ("config", "encoder", "pretraining"),
    [
        (BertConfig.base(), 109_482_240, 110_106_428),
        (BertConfig.large(), 335_141_888, 336_226_108),
    ],
)
def test_parameter_counts(config, encoder, pretraining):
    with torch.device("meta"):
        assert sum(p.numel() for p in BertModel(config).parameters()) == encoder
        assert sum(p.numel() for p in BertForPreTraining(config).parameters()) == pretraining


def test_initialisation():
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**{**SIZES, "hidden_size": 64, "vocab_size": 2000}))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.numel() >= 4096:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "norm.weight" in name:
            assert (parameter == 1).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 0).all(), name
    assert (model.bert.embeddings.word.weight[0] == 0).all()


IDS = torch.ones(2, 4, dtype=torch.long)
CU = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be integer, not torch.float32"),
        ({"input_ids": IDS[0]}, ValueError, r"\[B, S\], or \[T\] with cu_seqlens"),
        ({"input_ids": IDS[0], "cu_seqlens": CU}, ValueError, "belong together"),
        ({"input_ids": IDS, "cu_seqlens": CU, "max_seqlen": 4}, ValueError, "must be packed"),
        (
            {"input_ids": IDS[0], "cu_seqlens": CU, "max_seqlen": 4, "attention_mask": IDS[0]},
            ValueError,
            "attention_mask is for padded input",
        ),
        ({"input_ids": IDS.repeat(1, 7)}, ValueError, "28 tokens .* max_position_embeddings = 24"),
        ({"input_ids": IDS, "token_type_ids": IDS[:, :3]}, ValueError, "token_type_ids has shape"),
        ({"input_ids": IDS, "position_ids": IDS[:, :3]}, ValueError, "position_ids has shape"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :3]}, ValueError, "attention_mask must have"),
        ({"input_ids": IDS + 200}, IndexError, "out of range"),
    ],
)
def test_wrong_input(arguments, error, message):
    model = BertModel(BertConfig(**SIZES)).eval()
    with pytest.raises(error, match=message):
        model(**arguments)


def test_wrong_labels():
    model = BertForPreTraining(BertConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match=r"next_sentence_label must be \[B\] = \[2\]"):
        model(IDS, next_sentence_label=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must have the shape of input_ids"):
        model(IDS, labels=IDS[:, :3])
    with pytest.raises(ValueError, match="label_tokens needs packed input"):
        model(IDS, labels=IDS, label_tokens=IDS)
