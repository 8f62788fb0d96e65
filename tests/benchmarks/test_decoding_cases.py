"""The Transformer's decoding: everyone finds the search's texts, and others are found out."""

import types

import pytest
import torch
from bertkern.benchmarks import decoding_cases
from bertkern.benchmarks.decoding_cases import (
    Judge,
    decode,
    decoding,
    decoding_costs,
    decoding_model,
    floor_of,
    own_search,
)
from bertkern.benchmarks.transformer_cases import decoder_flops, encoder_flops, texts_of
from bertkern.benchmarks.transformer_peers import MARIAN_EPS

from bertkern.models import TransformerConfig

CPU = torch.device("cpu")
F32 = torch.float32
LENGTHS = [9, 5, 13]
BEAMS = pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "beam"])
NEW = 12  # tokens of a text: enough, and fast


@pytest.fixture(autouse=True)
def short_texts_and_little_memory(monkeypatch):
    monkeypatch.setattr(decoding_cases, "NEW", NEW)
    monkeypatch.setattr(decoding_cases, "added_bytes", lambda call, device: (call(), None))


@pytest.fixture(scope="module")
def model():
    return decoding_model(
        TransformerConfig(
            vocab_size=61,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            layer_norm_eps=MARIAN_EPS,
        )
    )


@pytest.fixture(scope="module")
def source(model):
    return texts_of(LENGTHS, model.config, 1)


@BEAMS
def test_everyone_finds_the_same(make_run, model, source, beams):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    run, _ = make_run("transformers", "ctranslate2")
    rows = decode("small decode", model, F32, source, beams, run)
    assert [row.peer for row in rows] == ["bertkern", "transformers sdpa", "CTranslate2"]
    for row in rows:
        assert row.correct, f"{row.peer}: {row.error}"
        assert row.median_s > 0
        assert (row.suite, row.op, row.direction) == ("models", "small decode", "forward")
        assert row.items == len(LENGTHS) * NEW
        assert row.shape == {
            **{"B": 3, "S": "5..13", "new": NEW},
            **({"beams": 4} if beams > 1 else {}),
        }


@BEAMS
def test_bfloat16(make_run, model, source, beams):
    run, _ = make_run()
    (row,) = decode("small decode", model, torch.bfloat16, source, beams, run)
    assert row.correct, row.error


def found_by(model, source, beams):
    return own_search(model, source, beams, CPU)()


def other_token(model, source, found):
    found[1, 7] = 4 if found[1, 7] != 4 else 5
    return found


def other_source(model, source, found):
    return found[[0, 0, 2]]


def greedy_is_no_beam(model, source, found):
    return found_by(model, source, 1)


def too_short(model, source, found):
    return found[:, 1:]


def with_the_end(model, source, found):
    found[:, 5] = model.config.eos_token_id
    return found


@pytest.mark.parametrize(
    ("change", "beams", "error"),
    [
        (lambda model, source, found: found, 1, ""),
        (lambda model, source, found: found, 4, ""),
        (other_token, 1, "wrong: a token's logit off by"),
        (other_source, 1, "wrong: a token's logit off by"),
        (with_the_end, 1, "wrong: a token's logit off by inf"),
        (with_the_end, 4, "wrong: texts' log-probability off by inf"),
        (greedy_is_no_beam, 4, "wrong: texts' log-probability off by"),
        (too_short, 1, "not run: tokens of shape [3, 11], not [3, 12]"),
    ],
    ids=[
        *("right greedy", "right beam", "another token", "another source", "end", "end in a beam"),
        *("greedy as a beam", "short"),
    ],
)
def test_a_falsified_search(make_run, model, source, monkeypatch, change, beams, error):
    def searching(*arguments):
        return lambda: change(model, source, found_by(model, source, beams))

    monkeypatch.setattr(decoding_cases, "marian_search", searching)
    run, _ = make_run("transformers")
    ours, other = decode("small decode", model, F32, source, beams, run)
    assert ours.correct, ours.error
    assert other.error.startswith(error)
    assert other.correct == (not error)
    assert (other.median_s is None) == bool(error)


def test_the_model_says_something(model, source):
    """A text of one word would be right whatever attention does."""
    found = found_by(model, source, 1)
    assert all(len(set(row)) > 2 for row in found.tolist())
    assert len(set(found.flatten().tolist())) > 7
    assert len({tuple(row) for row in found.tolist()}) == len(LENGTHS)


def test_the_judge_is_indifferent_between_ties(model, source, monkeypatch):
    """A token that is as good as the best to the last digits may be taken."""
    judge = Judge(model, source, 1, F32, CPU)
    found = found_by(model, source, 1)
    real = judge._logits
    token = 4 if found[0, -1] != 4 else 5

    def tied(model, found):
        logits = real(model, found)
        logits[0, -1, token] = logits[0, -1].amax() - judge.allowed / 2
        return logits

    monkeypatch.setattr(judge, "_logits", tied)
    found[0, -1] = token
    assert judge.error(found) == pytest.approx(judge.allowed / 2, rel=1e-6)


def test_costs_by_hand(model):
    """FLOPs are a forward's; each step reads the decoder, the embedding and what was kept."""
    config, n = model.config, [9, 5]
    costs = decoding_costs(config, n, 1, F32)
    assert len(costs) == 1 + NEW
    assert sum(flops for flops, _ in costs) == (
        encoder_flops(config, n) + decoder_flops(config, n, [NEW] * 2)
    )
    h, layers = 32, 2
    counts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("encoder", model.encoder), ("decoder", model.decoder))
    }
    of_source = sum(
        p.numel() for name, p in model.named_parameters() if "cross_attention.kv" in name
    )
    assert costs[0][1] == 4 * (counts["encoder"] + of_source)
    weights = counts["decoder"] - of_source + 61 * h
    for beams in (1, 4):
        (_, moved) = decoding_costs(config, n, beams, F32)[7]
        assert moved == 4 * (weights + layers * 2 * h * (sum(n) + 2 * beams * 7))
    of_one, of_four = (
        sum(flops for flops, _ in decoding_costs(config, n, beams, F32)[1:]) for beams in (1, 4)
    )
    assert of_four == 4 * of_one


def test_the_floor_is_of_the_steps(ceilings):
    """A step's weights may stay in a cache, though all steps together move more than it holds."""
    assert floor_of(ceilings, [(4e9, 1.0), (1.0, 3e9)], "float32") == pytest.approx(4.0)
    assert floor_of(ceilings, [(4e9, 1.0)], "bfloat16") is None


def test_decoding_chooses_by_name(make_run, monkeypatch):
    run, rows = make_run()
    seen = []
    monkeypatch.setattr(
        decoding_cases, "decoding_model", lambda config: types.SimpleNamespace(config=config)
    )
    monkeypatch.setattr(
        decoding_cases,
        "decode",
        lambda op, model, dtype, source, beams, run: seen.append((op, beams)) or [],
    )
    decoding(run, [F32], "decode")
    decoding(run, [F32], "bert")
    assert seen == [("transformer-mini decode", 1)]  # a quick run has one search
    assert rows == []
