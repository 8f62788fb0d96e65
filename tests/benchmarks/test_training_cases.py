"""Training steps: right models are timed, wrong gradients are found out, and a step is a step."""

import types

import pytest
import torch
from bertkern.benchmarks import training_cases
from bertkern.benchmarks.model_cases import batch_of, encoder_flops
from bertkern.benchmarks.training_cases import IGNORED, labels_of, loss_of, step_of, train
from torch import nn

from bertkern.models import BertForPreTraining

CPU = torch.device("cpu")
F32 = torch.float32
BATCH = batch_of([16, 9])


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(training_cases, "added_bytes", lambda call, device: (call(), None))


def test_the_labels_are_of_real_tokens():
    batch = batch_of([128, 40, 100])
    labels = labels_of(batch)
    chosen = labels.words != IGNORED
    assert not (chosen & ~batch.mask.bool()).any()
    assert torch.equal(labels.words[chosen], batch.ids[chosen])
    assert chosen.sum() / batch.mask.sum() == pytest.approx(0.15, abs=0.02)
    assert labels.next_sentence.tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_ours_and_transformers_are_right(make_run, tiny, dtype):
    pytest.importorskip("transformers", reason="transformers is not installed")
    run, _ = make_run("transformers")
    rows = train("tiny", tiny, dtype, BATCH, run)
    assert [row.peer for row in rows] == [
        *("bertkern", "transformers eager", "transformers sdpa", "bertkern in transformers"),
    ]
    for row in rows:
        assert row.correct, f"{row.peer}: {row.error}"
        assert row.median_s > 0
        assert row.note == "checked with dropout off"
        assert (row.suite, row.op, row.direction) == ("training", "tiny", "step")
        assert (row.items, row.unit, row.shape) == (25.0, "tokens", BATCH.shape)


def test_costs_by_hand(make_run, tiny):
    run, _ = make_run()
    (row,) = train("tiny", tiny, F32, BATCH, run)
    predictions = int((labels_of(BATCH).words != IGNORED).sum())
    head = predictions * (2 * 32 * 32 + 2 * 32 * 30522)
    assert row.flops == 3 * (encoder_flops(tiny, [16, 9]) + head)
    parameters = sum(p.numel() for p in BertForPreTraining(tiny).parameters())
    assert row.bytes == 10 * 4 * parameters


class Falsified(nn.Module):
    """Our model, whose loss is changed, or the gradients by way of the loss."""

    def __init__(self, folder, change):
        super().__init__()
        self.model, self.change = BertForPreTraining.from_pretrained(folder), change

    def forward(self, **inputs):
        return types.SimpleNamespace(loss=self.change(self, self.model(**inputs).loss))


def same_value(loss, gradient_of):
    return loss.detach() + gradient_of - gradient_of.detach()


def fails_in_training(model, loss):
    if model.training:
        raise RuntimeError("out of memory")
    return loss


def fails_in_training_and_is_wrong(model, loss):
    return fails_in_training(model, loss) * 1.01


def raises(model, loss):
    raise AssertionError("no kernel")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda model, loss: loss * 1, ""),
        (lambda model, loss: loss * 1.001, "wrong: "),
        (lambda model, loss: same_value(loss, 1.001 * loss), "wrong: gradient"),
        (lambda model, loss: same_value(loss, -loss), "wrong: gradient"),
        (lambda model, loss: loss * torch.nan, "wrong: "),
        (lambda model, loss: same_value(loss, loss * torch.nan), "wrong: "),
        (fails_in_training, "not run: out of memory"),
        (fails_in_training_and_is_wrong, "wrong: "),
        (raises, "not run: no kernel"),
    ],
    ids=[
        *("right", "loss", "gradients", "gradients negated", "loss NaN", "gradients NaN"),
        *("no memory", "wrong and no memory", "raises"),
    ],
)
def test_a_falsified_model(make_run, tiny, monkeypatch, change, error):
    monkeypatch.setattr(
        training_cases, "hugging_face_model", lambda folder, *_: Falsified(folder, change)
    )
    run, _ = make_run("transformers")
    ours, other, *_ = train("tiny", tiny, F32, BATCH, run)
    assert ours.correct
    assert ours.median_s > 0
    if not error:
        assert other.correct, other.error
        assert other.median_s > 0
    else:
        assert other.error.startswith(error), other.error or "taken for right"
        assert not other.correct
        assert other.median_s is None


def small_model(tiny):
    torch.manual_seed(0)
    model = BertForPreTraining(tiny).eval()
    return model, loss_of(model, BATCH, labels_of(BATCH), CPU)


def test_a_step_changes_the_weights_and_lowers_the_loss(tiny, monkeypatch):
    monkeypatch.setitem(training_cases.ADAMW, "lr", 1e-3)
    model, loss = small_model(tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = float(loss().detach())
    step = step_of(model, loss, F32, CPU, 1)
    for _ in range(3):
        step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert all(p.grad is None for p in model.parameters())
    assert float(loss().detach()) < first


def test_parts_of_a_step_are_averaged(tiny):
    weights = []
    for parts in (1, 4):
        model, loss = small_model(tiny)
        calls = []

        def counted(loss=loss, calls=calls):
            calls.append(1)
            return loss()

        step_of(model, counted, F32, CPU, parts)()
        assert len(calls) == parts
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=2e-6)


def test_the_norm_is_that_of_all_gradients(tiny):
    model, loss = small_model(tiny)
    value, norm, cosine = training_cases.probes(model, loss)
    assert value == float(loss().detach())
    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    assert norm == pytest.approx(
        float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-5
    )
    assert all(p.grad is None for p in model.parameters())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.cosine_similarity(
        torch.cat([g.flatten() for g in gradients]).double(), torch.sin(50.0 * weights.double()), 0
    )
    assert cosine == pytest.approx(float(expected), rel=1e-4)


def test_training_chooses_by_name(make_run, monkeypatch):
    run, rows = make_run()
    seen = []
    monkeypatch.setattr(
        training_cases, "train", lambda op, config, dtype, *_: seen.append((op, dtype)) or []
    )
    training_cases.training(run, [F32, torch.bfloat16], "mini")
    training_cases.training(run, [F32], "nothing")
    assert seen == [("bert-mini", F32), ("bert-mini", torch.bfloat16)]
    assert rows == []
