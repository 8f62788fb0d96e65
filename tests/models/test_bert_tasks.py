"""Every head against transformers with the same weights, and against itself: packed, split.

Losses, logits and gradients are held to the house's tolerance rule: as near to transformers in
float64 as transformers in float32 is.
"""

import copy
from typing import NamedTuple

import pytest
import torch
import transformers
from torch.nn import functional as F

from bertkern import models
from bertkern.models import BertConfig
from bertkern.models.checkpoint import file_names
from bertkern.reference.tolerance import assert_close, cancelling, hold_in_most_draws

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WIDTH, CHOICES = 24, 3
LENGTHS = (24, 1, 17, 5)


class Head(NamedTuple):
    """A model with a head, and the labels that it is trained with."""

    name: str
    labels: str
    config: dict


HEADS = {
    "pretraining": Head("BertForPreTraining", "pretraining", {}),
    "masked-lm": Head("BertForMaskedLM", "vocabulary", {}),
    "single label": Head("BertForSequenceClassification", "class", {"num_labels": 3}),
    "multi-label": Head(
        "BertForSequenceClassification",
        "several",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "one number": Head("BertForSequenceClassification", "number", {"num_labels": 1}),
    "numbers": Head(
        "BertForSequenceClassification", "numbers", {"num_labels": 3, "problem_type": "regression"}
    ),
    "token classification": Head("BertForTokenClassification", "token class", {"num_labels": 5}),
    "question answering": Head("BertForQuestionAnswering", "span", {}),
    "multiple choice": Head("BertForMultipleChoice", "choice", {}),
}


def draw(head, seed=3, lengths=LENGTHS, width=WIDTH):
    """A padded batch with labels for a head; of a multiple choice, CHOICES sequences a question."""
    torch.manual_seed(seed)
    count = len(lengths)
    if head.labels == "choice":
        lengths = [max(1, (n + 7 * c) % (width + 1)) for n in lengths for c in range(CHOICES)]
    lengths = torch.tensor(lengths)
    shape = (len(lengths), width)
    mask = torch.arange(width) < lengths[:, None]
    batch = {
        "input_ids": torch.randint(1, 97, shape).masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(0, 2, shape).masked_fill(~mask, 0),
    }
    chosen = (torch.rand(shape) < 0.4) & mask
    chosen[0, 0] = True
    if head.labels in ("pretraining", "vocabulary"):
        batch["labels"] = torch.randint(1, 97, shape).masked_fill(~chosen, -100)
    if head.labels == "pretraining":
        batch["next_sentence_label"] = torch.randint(0, 2, (count,))
    if head.labels == "token class":
        batch["labels"] = torch.randint(0, 5, shape).masked_fill(~chosen, -100)
    if head.labels == "class":
        batch["labels"] = torch.randint(0, 3, (count,))
        batch["labels"][-1] = -100
    if head.labels == "several":
        batch["labels"] = torch.randint(0, 2, (count, 3)).float()
    if head.labels == "number":
        batch["labels"] = torch.randn(count)
    if head.labels == "numbers":
        batch["labels"] = torch.randn(count, 3)
    if head.labels == "choice":
        batch = {name: x.unflatten(0, (count, CHOICES)) for name, x in batch.items()}
        batch["labels"] = torch.randint(0, CHOICES, (count,))
    if head.labels == "span":
        batch["start_positions"] = (torch.rand(count) * lengths).long()
        batch["end_positions"] = (torch.rand(count) * lengths).long()
        batch["end_positions"][-1] = width + 3  # cut off: does not count
    return batch


PER_TOKEN = ("input_ids", "token_type_ids")


def packed(head, batch, first=0, last=None):
    """Examples first..last-1 without padding, as a part of the batch."""
    batch = {name: x[first:last] for name, x in batch.items()}
    offset = first * (CHOICES if head.labels == "choice" else 1)
    mask = batch.pop("attention_mask").bool()
    per_token = [*PER_TOKEN, *(["labels"] if batch.get("labels") is not None else [])]
    out = {n: x[mask] if n in per_token and x.shape == mask.shape else x for n, x in batch.items()}
    lengths = mask.reshape(-1, mask.shape[-1]).sum(1)
    out["cu_seqlens"] = F.pad(lengths.cumsum(0), (1, 0)).int()
    out["max_seqlen"] = mask.shape[-1]
    out["sequence_offset"] = offset
    if head.labels == "choice":
        out["num_choices"] = CHOICES
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Head -> (theirs, ours): transformers' model, and ours with its weights."""

    def make(key):
        if key not in made:
            head = HEADS[key]
            torch.manual_seed(0)
            config = transformers.BertConfig(**SIZES, **NO_DROPOUT, **head.config)
            theirs = getattr(transformers, head.name)(config)
            for parameter in theirs.parameters():  # also what starts at 0 and 1
                parameter.data += 0.05 * torch.randn_like(parameter)
            folder = tmp_path_factory.mktemp("theirs")
            theirs.save_pretrained(folder)
            made[key] = theirs, getattr(models, head.name).from_pretrained(folder)
        return [copy.deepcopy(model).train() for model in made[key]]

    made = {}
    return make


def double(batch):
    return {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}


def their_output(model, batch):
    """(loss, logits that count) of transformers' model. Its question answering lets padding be an
    answer; here padding is taken out before its own loss is computed."""
    mask = batch["attention_mask"].bool()
    if "start_positions" not in batch:
        output = model(**batch)
        logits = [x for name, x in output.items() if "logits" in name]
    else:
        inputs = {n: x for n, x in batch.items() if not n.endswith("positions")}
        output = model(**inputs)
        logits = [
            x.masked_fill(~mask, -torch.inf) for x in (output.start_logits, output.end_logits)
        ]
        places = (batch["start_positions"], batch["end_positions"])
        output.loss = transformers.loss.loss_utils.ForQuestionAnsweringLoss(*logits, *places)
    return output.loss, [
        x[mask] if x.shape[:2] == mask.shape and x.dim() > 1 else x for x in logits
    ]


LOGITS = (
    "logits",
    "prediction_logits",
    "seq_relationship_logits",
    "start_logits",
    "end_logits",
)


def our_output(model, batch):
    if hasattr(model, "predict"):  # the vocabulary's logits are computed only on demand
        batch = {**batch, "return_logits": True}
    output = model(**batch)
    logits = [getattr(output, name) for name in LOGITS if getattr(output, name, None) is not None]
    if "attention_mask" in batch:
        mask = batch["attention_mask"].bool()
        logits = [x[mask] if x.dim() > 1 and x.shape[:2] == mask.shape else x for x in logits]
    return output.loss, logits


def gradients(model):
    """By the names of transformers' parameters."""
    of = {}
    for name, parameter in model.named_parameters():
        names = file_names(name)
        of.update(zip(names, parameter.grad.chunk(len(names)), strict=True))
    return of


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("key", HEADS)
def test_loss_logits_and_every_gradient(pairs, key, layout):
    hold_in_most_draws(lambda seed: check_step(*pairs(key), HEADS[key], layout, seed))


def check_step(theirs, ours, head, layout, seed):
    batch = draw(head, seed)
    exact = copy.deepcopy(theirs).double()
    truth, expected = their_output(exact, double(batch)), their_output(theirs, batch)
    got = our_output(ours, batch if layout == "padded" else packed(head, batch))
    assert len(got[1]) == len(expected[1])
    for loss in (truth[0], expected[0], got[0]):
        loss.backward()
    one_rounding = cancelling(truth[0], torch.float32)  # the rule's is of a value of 0.3
    assert_close(got[0], truth[0], expected[0], name="loss", noise=one_rounding)
    for ours_logits, exact_logits, their_logits in zip(got[1], truth[1], expected[1], strict=True):
        assert_close(ours_logits.reshape(their_logits.shape), exact_logits, their_logits)
    ours_gradients = gradients(ours)
    theirs_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert ours_gradients.keys() == theirs_gradients.keys()
    # dlogits = p - onehot sum to 0 over a sequence, and over a question's choices: what is left are
    # the roundings of terms whose sizes sum to about 1 (to 2 where a label had no chance at all)
    summed = {"span": "qa_outputs.bias", "choice": "classifier.bias"}.get(head.labels)
    cancels = {summed: cancelling(torch.ones(1), torch.float32)}
    for name, parameter in exact.named_parameters():
        if parameter.grad is not None:
            assert_close(
                ours_gradients[name],
                parameter.grad,
                theirs_gradients[name],
                grad=True,
                name=name,
                noise=cancels.get(name, 0.0),
            )


@pytest.mark.parametrize("key", HEADS)
def test_twenty_training_steps(pairs, key):
    """The loss curves of 20 AdamW steps agree to float32 rounding."""
    curves = []
    for model, forward in zip(pairs(key), (their_output, our_output), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.01)
        curve = []
        for step in range(20):
            torch.manual_seed(step)
            lengths = torch.randint(2, WIDTH + 1, (4,)).tolist()
            loss, _ = forward(model, draw(HEADS[key], seed=step, lengths=lengths))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=2e-5, atol=2e-6)
    assert curves[0][0] != curves[0][-1]


def with_dropout(key, dtype=torch.float64):
    torch.manual_seed(1)
    head = HEADS[key]
    config = BertConfig(**SIZES, **head.config, classifier_dropout=0.3)
    return getattr(models, head.name)(config).to(dtype).train()


@pytest.mark.parametrize("key", HEADS)
def test_packed_is_padded_and_parts_are_the_whole_with_dropout(key):
    """The same seed gives the same masks, whatever the layout and however the batch is split: the
    logits agree to float64 rounding, which no differing mask would."""
    head, model = HEADS[key], with_dropout(key)
    batch = double(draw(head))

    def outputs(arguments):
        torch.manual_seed(11)
        loss, logits = our_output(model, arguments)
        return loss, [x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x for x in logits]

    loss, whole = outputs(batch)
    packed_loss, packed_whole = outputs(packed(head, batch))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-13, atol=0)
    parts = [outputs(packed(head, batch, *ends))[1] for ends in ((0, 1), (1, 3), (3, None))]
    padded_parts = []
    for first, last in ((0, 2), (2, None)):
        part = {name: x[first:last] for name, x in batch.items()}
        offset = first * (CHOICES if head.labels == "choice" else 1)
        padded_parts.append(outputs({**part, "sequence_offset": offset})[1])
    for i, expected in enumerate(whole):
        for got in (packed_whole, [torch.cat(x) for x in zip(*parts, strict=True)]):
            torch.testing.assert_close(got[i], expected, rtol=1e-12, atol=1e-13)
        joined = torch.cat([part[i] for part in padded_parts])
        torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-13)
    without_offset = {**packed(head, batch, 1, 3), "sequence_offset": 0}
    other = outputs(without_offset)[1]
    assert not torch.allclose(other[0], parts[1][0])


@pytest.mark.parametrize("key", ["single label", "token classification", "multiple choice"])
def test_rate_of_the_heads_dropout(key):
    """classifier_dropout drops so much before the head, hidden_dropout_prob where it is None."""
    head = HEADS[key]
    for rates, expected in (
        ({"classifier_dropout": 1.0}, 1.0),
        ({"classifier_dropout": 0.0}, 0.0),
        ({"classifier_dropout": None, "hidden_dropout_prob": 1.0}, 1.0),
    ):
        config = BertConfig(
            **{**SIZES, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, **rates},
            **head.config,
        )
        model = getattr(models, head.name)(config).train()
        torch.nn.init.constant_(model.classifier.bias, 0.25)
        logits = model(**draw(head)).logits
        if head.labels == "token class":
            logits = logits[draw(head)["attention_mask"].bool()]
        assert ((logits == 0.25).double().mean() == expected).item()
        assert (model.eval()(**draw(head)).logits != 0.25).any()


@pytest.mark.parametrize("key", HEADS)
def test_nothing_labelled_and_nothing_at_all(key):
    """A loss of 0 with gradients of 0, for batches without labels, tokens or sequences."""
    head, model = HEADS[key], with_dropout(key, torch.float32)
    batch = draw(head)
    for name in ("labels", "next_sentence_label", "start_positions", "end_positions"):
        if name in batch and not batch[name].is_floating_point():
            batch[name] = torch.full_like(batch[name], -100)
    unlabelled = [] if batch.get("labels", batch["input_ids"]).is_floating_point() else [batch]
    empty = {name: x[:0] for name, x in batch.items()}
    no_tokens = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    for arguments in (*unlabelled, empty, packed(head, empty)):
        model.zero_grad()
        loss = model(**arguments).loss
        assert loss == 0
        loss.backward()
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    loss = model(**no_tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_span_in_a_sequence_that_stands_elsewhere():
    """Left padding and holes: positions are columns of the padded batch, and padding is none."""
    torch.manual_seed(0)
    model = models.BertForQuestionAnswering(BertConfig(**SIZES, **NO_DROPOUT)).eval()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
    ids = torch.randint(1, 97, (2, 6))
    start, end = torch.tensor([2, 3]), torch.tensor([5, 1])  # column 1 of the second is padding
    output = model(ids, mask, start_positions=start, end_positions=end)
    by_hand = -(
        output.start_logits[0, 2:].log_softmax(0)[0] / 2
        + output.start_logits[1, [0, 2, 3, 5]].log_softmax(0)[2] / 2
        + output.end_logits[0, 2:].log_softmax(0)[3]
    )
    torch.testing.assert_close(output.loss, by_hand / 2)
    assert torch.equal(output.start_logits == -torch.inf, mask == 0)


def test_packed_tokens_past_the_end_do_not_matter():
    head = HEADS["question answering"]
    model = models.BertForQuestionAnswering(BertConfig(**SIZES, **NO_DROPOUT)).train()
    batch = packed(head, draw(head))
    expected = model(**batch).loss
    for name in PER_TOKEN:
        batch[name] = torch.cat((batch[name], torch.ones(9, dtype=torch.long)))
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-6, atol=0)


META = torch.device("meta")  # its values cannot be read: whoever would wait for a GPU fails


@pytest.mark.parametrize("key", HEADS)
def test_a_packed_step_never_synchronises(key):
    head = HEADS[key]
    batch = packed(head, draw(head))
    if head.labels in ("pretraining", "vocabulary"):
        batch["label_tokens"] = (batch["labels"] != -100).nonzero()[:, 0]
        batch["labels"] = batch["labels"][batch["label_tokens"]]
    batch = {n: x.to(META) if isinstance(x, torch.Tensor) else x for n, x in batch.items()}
    model = with_dropout(key, torch.float32).to(META)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "masked_lm", "hidden"),
    [(BertConfig.base, 109_514_298, 768), (BertConfig.large, 335_174_458, 1024)],
)
def test_parameter_counts(config, masked_lm, hidden):
    """The published ones, and those of the other heads, which follow from the encoder's."""

    def count(name, **changes):
        with META:
            return sum(p.numel() for p in getattr(models, name)(config(**changes)).parameters())

    assert count("BertForMaskedLM") == masked_lm
    encoder, pooler = count("BertModel"), hidden * hidden + hidden
    assert count("BertForSequenceClassification", num_labels=3) == encoder + 3 * hidden + 3
    assert count("BertForMultipleChoice") == encoder + hidden + 1
    assert count("BertForTokenClassification", num_labels=9) == encoder - pooler + 9 * hidden + 9
    assert count("BertForQuestionAnswering") == encoder - pooler + 2 * hidden + 2


IDS = torch.ones(2, 4, dtype=torch.long)
CHOICE_IDS = IDS[None].expand(2, 2, 4)
PACKED = {"cu_seqlens": torch.tensor([0, 4, 6, 8], dtype=torch.int32), "max_seqlen": 4}


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        (
            "SequenceClassification",
            {"input_ids": IDS, "labels": IDS},
            ValueError,
            r"labels must have shape \[2\], not \[2, 4\]",
        ),
        (
            "SequenceClassification",
            {"input_ids": IDS, "labels": torch.ones(2, 4)},
            ValueError,
            r"\[B, num_labels\] = \[2, 2\] for problem_type 'multi_label_cl.*', not \[2, 4\]",
        ),
        (
            "TokenClassification",
            {"input_ids": IDS, "labels": IDS[:, :3]},
            ValueError,
            r"labels must have shape \[2, 4\], not \[2, 3\]",
        ),
        (
            "TokenClassification",
            {"input_ids": IDS, "labels": IDS.float()},
            TypeError,
            r"labels must be integer, not torch.float32",
        ),
        (
            "QuestionAnswering",
            {"input_ids": IDS, "start_positions": IDS[:, 0]},
            ValueError,
            "start_positions and end_positions belong together",
        ),
        (
            "QuestionAnswering",
            {"input_ids": IDS, "start_positions": IDS, "end_positions": IDS},
            ValueError,
            r"start_positions must have shape \[2\], not \[2, 4\]",
        ),
        ("MultipleChoice", {"input_ids": IDS}, ValueError, r"\[B, choices, S\].* not \[2, 4\]"),
        (
            "MultipleChoice",
            {"input_ids": CHOICE_IDS, "num_choices": 3},
            ValueError,
            r"\[B, 3, S\].* not \[2, 2, 4\]",
        ),
        (
            "MultipleChoice",
            {"input_ids": IDS.flatten(), **PACKED},
            ValueError,
            "num_choices, how many",
        ),
        (
            "MultipleChoice",
            {"input_ids": IDS.flatten(), **PACKED, "num_choices": 2},
            ValueError,
            "num_choices = 2 does not divide the 3 sequences",
        ),
        (
            "SequenceClassification",
            {"input_ids": IDS, "sequence_offset": -1},
            ValueError,
            "sequence_offset must be an int >= 0, not -1",
        ),
    ],
)
def test_wrong_input(name, arguments, error, message):
    model = getattr(models, f"BertFor{name}")(BertConfig(**SIZES)).eval()
    with pytest.raises(error, match=message):
        model(**arguments)


def test_question_answering_has_two_outputs():
    with pytest.raises(ValueError, match=r"num_labels must be 2, start and end, .* not 3"):
        models.BertForQuestionAnswering(BertConfig(**SIZES, num_labels=3))
