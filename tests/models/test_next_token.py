"""The next token: probabilities against torch's, order against a sort, draws against transformers'
cuts."""

import math

import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from bertkern.models.next_token import Sampling, best, draw, log_probabilities


def test_log_probabilities():
    logits = torch.randn(4, 9, dtype=torch.bfloat16)
    logits[1, 2] = -math.inf
    logits[2] = -math.inf
    never = torch.tensor([0, 7])
    found = log_probabilities(logits, never)
    expected = logits.double().log_softmax(1)
    kept = [t for t in range(9) if t not in (0, 7)]
    for row in (0, 1, 3):
        torch.testing.assert_close(
            found[row, kept].double(), expected[row, kept], rtol=1e-6, atol=0
        )
    assert (found[:, [0, 7]] == -math.inf).all()
    assert (found[2] == -math.inf).all()
    for wrong in (math.nan, math.inf):
        logits[3, 4] = wrong
        assert log_probabilities(logits, never)[3].isnan().all()
        assert not log_probabilities(logits, never)[:3].isnan().any()


@pytest.mark.parametrize("values", [3, 50, 10**6])
@pytest.mark.parametrize("columns", [700, 2561])
def test_the_best_are_those_of_a_stable_sort(values, columns):
    """With three values nearly all are equal; with a million few are. The wide rows end within a
    run."""
    x = torch.randint(values, (40, columns)).float()
    x[3] = -math.inf
    x[4, 5:] = -math.inf
    x[5, :-5] = -math.inf
    for count in (1, 4, 9, 700):
        largest, places = best(x, count)
        expected = x.sort(dim=1, descending=True, stable=True)
        assert torch.equal(largest, expected.values[:, :count])
        assert torch.equal(places, expected.indices[:, :count])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.7), (9, 0.8)])
def test_drawn_tokens_have_the_distribution_that_transformers_cuts(temperature, top_k, top_p):
    count = 20_000
    logits = 1.5 * torch.randn(1, 40)
    logits[0, 3] = -math.inf
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits.clone()).softmax(1)[0].double()
    uniforms = torch.rand(count, dtype=torch.float64)
    drawn = draw(logits.expand(count, -1), uniforms, Sampling(temperature, top_k, top_p))
    seen = torch.bincount(drawn, minlength=40)
    assert seen[expected == 0].sum() == 0
    often = (expected * count > 5).nonzero().flatten()
    observed, theirs = seen[often].double(), expected[often] * count
    observed[-1] += count - observed.sum()  # the rare ones, and float32 rounding of theirs
    theirs[-1] += count - theirs.sum()
    if len(often) > 1:
        assert stats.chisquare(observed.numpy(), theirs.numpy()).pvalue > 1e-3


def test_the_ends_of_the_uniform_numbers():
    logits = torch.tensor([[-math.inf, 0.1, -0.4, -math.inf, 0.3, -math.inf]])
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    rows = logits.expand(2, -1)
    assert draw(rows, uniforms, Sampling()).tolist() == [1, 4]
    assert draw(rows, uniforms, Sampling(top_k=5)).tolist() == [4, 2]
    assert draw(rows, uniforms, Sampling(top_p=0.999)).tolist() == [4, 2]
    assert draw(rows, uniforms, Sampling(top_k=1)).tolist() == [4, 4]
    assert draw(rows, uniforms, Sampling(top_p=1e-9)).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be positive and finite, not 0"),
        ({"top_k": 0}, "top_k must be at least 1, or None for all, not 0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_wrong_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
