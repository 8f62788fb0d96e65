"""The Transformer's training step: right models are timed, wrong ones are found out."""

import pytest
import torch
from bertkern.benchmarks import transformer_cases
from bertkern.benchmarks.transformer_cases import (
    IGNORED,
    config_of,
    decoder_flops,
    encoder_flops,
    pairs_of,
    train,
    training_lengths,
    transformer_training,
)
from bertkern.benchmarks.transformer_peers import MARIAN_EPS

from bertkern.models import Transformer, TransformerConfig

CPU = torch.device("cpu")
F32 = torch.float32
SOURCES, TARGETS = [9, 5, 13], [7, 11, 2]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(transformer_cases, "added_bytes", lambda call, device: (call(), None))


@pytest.fixture
def small():
    return TransformerConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        layer_norm_eps=MARIAN_EPS,
    )


def test_pairs_begin_with_bos_and_predict_the_next(small):
    pairs = pairs_of(SOURCES, TARGETS, small)
    assert pairs.tokens == sum(SOURCES) + sum(TARGETS)
    assert pairs.shape == {"B": 3, "S": "5..13", "T": "2..11", "tokens": 47}
    assert pairs_of([4, 4], [4, 4], small).shape == {"B": 2, "S": 4, "T": 4, "tokens": 16}
    for row, length in enumerate(TARGETS):
        labels = pairs.labels[row]
        assert (labels[:length] > 3).all()
        assert (labels[length:] == IGNORED).all()
        before = pairs.target.ids[row, :length]
        assert before.tolist() == [small.bos_token_id, *labels[: length - 1].tolist()]
    assert pairs.source.mask.sum(1).tolist() == SOURCES
    assert (pairs.source.ids[~pairs.source.mask] == small.pad_token_id).all()
    packed = pairs.source.packed("source", CPU)
    assert packed["source_cu_seqlens"].tolist() == [0, 9, 14, 27]
    assert packed["source_max_seqlen"] == 13
    assert packed["source_ids"][9:14].tolist() == pairs.source.ids[1, :5].tolist()


@pytest.mark.parametrize("lengths", [(SOURCES, TARGETS), ([6, 6], [4, 4])], ids=["mixed", "full"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_everyone_is_right(make_run, small, dtype, lengths):
    pytest.importorskip("transformers", reason="transformers is not installed")
    run, _ = make_run("eager", "transformers")
    rows = train("small", small, dtype, pairs_of(*lengths, small), run, compiled=False)
    assert [row.peer for row in rows] == [
        *("bertkern", "torch nn.Transformer", "transformers eager", "transformers sdpa")
    ]
    for row in rows:
        assert row.correct, f"{row.peer}: {row.error}"
        assert row.median_s > 0
        assert row.note == "checked with dropout off"
        assert (row.suite, row.op, row.direction) == ("training", "small", "step")
        assert (row.items, row.unit) == (float(sum(map(sum, lengths))), "tokens")


def test_costs_by_hand(make_run, small):
    run, _ = make_run()
    (row,) = train("small", small, F32, pairs_of([3], [2], small), run, compiled=False)
    h, f, v, layers, n, m = 32, 48, 61, 2, 3, 2
    projections = {"encoder": 4 * n, "own": 4 * m, "cross": 2 * m + 2 * n}
    products = 2 * h * h * sum(projections.values()) + 2 * 2 * h * f * (n + m)
    # q k and p v: of 3 x 3 tokens, of 1 + 2 keys, of 2 x 3
    attended = 2 * 2 * h * (n * n + 1 + 2 + m * n)
    assert encoder_flops(small, [n]) + decoder_flops(small, [n], [m]) == (
        layers * (products + attended) + 2 * m * h * v
    )
    assert row.flops == 3 * (layers * (products + attended) + 2 * m * h * v)
    parameters = sum(p.numel() for p in Transformer(small).parameters())
    assert row.bytes == 10 * 4 * parameters


def falsified(change):
    """Ours with dropout, in whose loss something is changed."""
    real = transformer_cases.own_way

    def way(model, pairs, device, dropout):
        own, loss = real(model, pairs, device, dropout)
        return own, lambda: change(own, loss(), dropout)

    return way


def fails_in_training(model, loss, dropout):
    if dropout:
        raise RuntimeError("out of memory")
    return loss


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda model, loss, dropout: loss * 1, ""),
        (lambda model, loss, dropout: loss * 1.001, "wrong: "),
        (lambda model, loss, dropout: loss.detach() + 1.001 * (loss - loss.detach()), "wrong: gr"),
        (lambda model, loss, dropout: loss.detach() - (loss - loss.detach()), "wrong: gradient's"),
        (lambda model, loss, dropout: loss * torch.nan, "wrong: "),
        (fails_in_training, "not run: out of memory"),
    ],
    ids=["right", "loss", "gradients", "gradients negated", "loss NaN", "no memory"],
)
def test_a_falsified_model(make_run, small, monkeypatch, change, error):
    real = transformer_cases.training_ways

    def ways(model, pairs, run, compiled):
        other = falsified(change)
        return {
            **real(model, pairs, run, compiled),
            "another": lambda dropout: other(model, pairs, CPU, dropout),
        }

    monkeypatch.setattr(transformer_cases, "training_ways", ways)
    run, _ = make_run()
    ours, other = train("small", small, F32, pairs_of(SOURCES, TARGETS, small), run, False)
    assert ours.correct
    assert ours.median_s > 0
    assert other.error.startswith(error)
    assert other.correct == (not error)
    assert (other.median_s is None) == bool(error)


def test_what_is_timed_has_dropout(make_run, small, monkeypatch):
    rates = []
    real = transformer_cases.own_way

    def noting(model, pairs, device, dropout):
        rates.append(dropout)
        return real(model, pairs, device, dropout)

    monkeypatch.setattr(transformer_cases, "own_way", noting)
    run, _ = make_run()
    (row,) = train("small", small, F32, pairs_of(SOURCES, TARGETS, small), run, compiled=False)
    assert row.correct
    assert rates[-1] == 0.1
    assert set(rates[:-1]) == {0.0}


def test_sizes_and_rates():
    for name, hidden in (("mini", 256), ("base", 512), ("big", 1024)):
        config = config_of(name)
        assert (config.hidden_size, config.dropout, config.label_smoothing) == (hidden, 0.1, 0.1)
        assert config.layer_norm_eps == MARIAN_EPS


def test_an_optimizer_step_has_at_most_65536_tokens():
    cuda = torch.device("cuda")
    for quick in (True, False):
        for sources, targets in training_lengths("base", cuda, quick):
            assert len(sources) == len(targets)
            assert 65536 / 3 < sum(sources) + sum(targets) <= 65536


def test_training_chooses_by_name(make_run, monkeypatch):
    run, rows = make_run()
    seen = []
    monkeypatch.setattr(
        transformer_cases, "train", lambda op, config, dtype, *_: seen.append((op, dtype)) or []
    )
    transformer_training(run, [F32, torch.bfloat16], "mini")
    transformer_training(run, [F32], "bert")
    assert seen == [("transformer-mini", F32), ("transformer-mini", torch.bfloat16)]
    assert rows == []
