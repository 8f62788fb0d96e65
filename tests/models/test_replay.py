"""Everything of CUDA-graph replay but the capture itself, which needs a GPU."""

import pytest
import torch

from bertkern import ops
from bertkern.data.features import TokenSequence
from bertkern.models import BertConfig, BertForQuestionAnswering, BertForSequenceClassification
from bertkern.models import replay as replay_module
from bertkern.models.replay import (
    LARGEST_BUDGET,
    SEQUENCES,
    ReplayedForward,
    empty_budget,
    fill,
    token_budget,
    used,
)
from bertkern.models.serving import pack
from bertkern.ops import _backend

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
HEADS = {
    BertForSequenceClassification: lambda output: (output.logits,),
    BertForQuestionAnswering: lambda output: (output.start_logits, output.end_logits),
}


def random_batch(*lengths):
    sequences = [
        TokenSequence(
            torch.randint(50, (length,)).tolist(),
            (torch.arange(length) > length // 2).int().tolist(),
        )
        for length in lengths
    ]
    return pack(sequences, torch.device("cpu"))


@pytest.fixture(params=HEADS, ids=lambda head: head.__name__)
def head(request):
    """(model, its forward of a packed batch)."""
    model = request.param(BertConfig(**CONFIG)).eval()
    outputs = HEADS[request.param]
    return model, lambda batch: outputs(model(**batch.arguments()))


@pytest.fixture
def recorded(monkeypatch):
    """In place of a CUDA graph: what writes the outputs anew into the memory they had when
    recorded."""
    count = []

    def record(forward):
        outputs = forward()
        count.append(1)

        def replay():
            for memory, value in zip(outputs, forward(), strict=True):
                memory.copy_(value)

        return outputs, replay

    monkeypatch.setattr(replay_module, "record", record)
    return count


@pytest.mark.parametrize("backend_name", ["cpu", "triton"])
@torch.inference_mode()
def test_filling_changes_nothing(head, backend_name):
    """Bit for bit where the products are this library's; to rounding where they are torch's."""
    if (reason := _backend.unusable(backend_name, "cpu")) is not None:
        pytest.skip(reason)
    _, forward = head
    batch = random_batch(7, 30, 1)
    budget = empty_budget(64, 64, torch.device("cpu"))
    fill(budget, batch)
    with ops.backend(backend_name):
        found = used(forward(budget), batch)
        expected = forward(batch)
    for x, y in zip(found, expected, strict=True):
        if backend_name == "cpu":
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(x, y)


@torch.inference_mode()
def test_replays_give_what_each_batch_gives(head, recorded):
    model, forward = head
    replayed = ReplayedForward(model, forward, 96)
    kept = []
    for lengths in [(20, 20), (3,), (1,) * 32, (50,), (64, 60, 4), (2, 9)]:
        batch = random_batch(*lengths)
        kept.append((replayed.replayed(batch, token_budget(batch)), forward(batch)))
    for found, expected in kept:  # later replays have not written into earlier results
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert len(recorded) == 2  # budgets of 64 and of 128 tokens


@torch.inference_mode()
def test_moved_weights_are_recorded_anew(head, recorded):
    model, forward = head
    replayed = ReplayedForward(model, forward, 96)
    batch = random_batch(8)
    replayed.replayed(batch, 64)
    model.double()
    (first, *_) = replayed.replayed(batch, 64)
    assert first.dtype == torch.float64
    assert torch.allclose(first, forward(batch)[0])
    assert len(recorded) == 2


@torch.inference_mode()
def test_a_new_head_is_recorded_anew(head, recorded):
    """The first parameter is where it was."""
    model, forward = head
    replayed = ReplayedForward(model, forward, 96)
    batch = random_batch(8)
    replayed.replayed(batch, 64)
    last = list(model.parameters())[-1]
    last.data = last.data + 1.0
    (first, *_) = replayed.replayed(batch, 64)
    torch.testing.assert_close(first, forward(batch)[0], rtol=1e-5, atol=1e-5)
    assert len(recorded) == 2


def test_budgets():
    assert token_budget(random_batch(3)) == 64
    assert token_budget(random_batch(64)) == 64
    assert token_budget(random_batch(64, 1)) == 128
    assert token_budget(random_batch(*[64] * (LARGEST_BUDGET // 64))) == LARGEST_BUDGET
    assert token_budget(random_batch(*[64] * (LARGEST_BUDGET // 64), 1)) is None
    assert token_budget(random_batch(*[1] * (SEQUENCES + 1))) is None
    assert token_budget(pack([], torch.device("cpu"))) is None


def test_on_the_cpu_nothing_is_recorded(head, recorded):
    model, forward = head
    batch = random_batch(5, 6)
    for x, y in zip(ReplayedForward(model, forward, 96)(batch), forward(batch), strict=True):
        assert torch.equal(x, y)
    assert not recorded
