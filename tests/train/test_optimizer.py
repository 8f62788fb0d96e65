"""LAMB by its equations in plain numpy, and who decays."""

import numpy as np
import pytest
import torch

from bertkern.models import BertConfig, BertForPreTraining, Transformer, TransformerConfig
from bertkern.train import Lamb, LoopSettings
from bertkern.train.optimizer import make_optimizer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def lamb_step(p, g, m, v, t, lr, decay, betas=(0.9, 0.999), eps=1e-6):
    """You et al. 2020, algorithm 2, in float64; returns the new p, m, v."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    u = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * p
    size, change = np.linalg.norm(p), np.linalg.norm(u)
    ratio = size / change if size > 0 and change > 0 else 1.0
    return p - lr * (ratio if decay else 1.0) * u, m, v


@pytest.mark.parametrize("packed", [1, 3])
def test_lamb_is_its_equations(packed):
    rng = np.random.default_rng(packed)
    matrix, vector = rng.normal(size=(6, 4)), rng.normal(size=5)
    matrix[:2] *= 10  # so that the parts of a packed matrix have ratios of their own
    parameters = [torch.nn.Parameter(torch.tensor(x)) for x in (matrix, vector)]
    optimizer = Lamb(
        [
            {"params": parameters[:1], "weight_decay": 0.1, "packed": packed},
            {"params": parameters[1:], "weight_decay": 0.0},
        ]
    )
    pieces = np.split(matrix, packed)
    states = [[p, np.zeros_like(p), np.zeros_like(p)] for p in (*pieces, vector)]
    for t in range(1, 6):
        gradients = [rng.normal(size=x.shape) for x in (matrix, vector)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / t
        optimizer.step()
        shares = (*np.split(gradients[0], packed), gradients[1])
        for state, gradient in zip(states, shares, strict=True):
            decay = 0.0 if gradient.ndim == 1 else 0.1
            state[:] = lamb_step(state[0], gradient, *state[1:], t, 0.1 / t, decay)
    expected = np.concatenate([state[0] for state in states[:-1]])
    np.testing.assert_allclose(parameters[0].detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(parameters[1].detach(), states[-1][0], rtol=1e-12)


def test_a_matrix_of_zeros_can_leave_zero():
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.ones(3, 2)
    Lamb([parameter], lr=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((3, 2), -0.5), rtol=1e-5, atol=0)


def test_lamb_gives_query_key_and_value_their_own_ratios():
    """The projections are one parameter here and three elsewhere."""
    model = BertForPreTraining(BertConfig(**SIZES))
    groups = make_optimizer(model, LoopSettings(optimizer="lamb")).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    packed = {names[id(p)]: g["packed"] for g in groups for p in g["params"]}
    assert packed.pop("bert.layers.0.attention.qkv.weight") == 3
    assert set(packed.values()) == {1}


def test_lamb_gives_the_sources_keys_and_values_their_own_ratios():
    """Those of cross-attention are one parameter here and two elsewhere."""
    config = TransformerConfig(vocab_size=9, hidden_size=4, num_layers=1, num_attention_heads=2)
    model = Transformer(config)
    groups = make_optimizer(model, LoopSettings(optimizer="lamb")).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    packed = {names[id(p)]: g["packed"] for g in groups for p in g["params"]}
    assert packed.pop("decoder.0.cross_attention.kv.weight") == 2
    assert packed.pop("encoder.0.attention.qkv.weight") == 3
    assert packed.pop("decoder.0.attention.qkv.weight") == 3
    assert set(packed.values()) == {1}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_no_decay_on_biases_and_layer_norms(optimizer):
    model = BertForPreTraining(BertConfig(**SIZES))
    groups = make_optimizer(model, LoopSettings(optimizer=optimizer)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = [p for g in groups for p in g["params"] if g["weight_decay"] == 0.01]
    plain = [p for g in groups for p in g["params"] if g["weight_decay"] == 0.0]
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain)
    assert all(names[id(p)].endswith("weight") for p in decayed)
    assert not any("norm" in names[id(p)] for p in decayed)
    assert len(decayed) + len(plain) == len(names)
    for group in groups:
        assert group["betas"] == (0.9, 0.999)
        assert group["eps"] == 1e-6


def test_refusals():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="lr must not be negative, not -1"):
        Lamb([parameter], lr=-1.0)
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), not \(0.9, 1.0\)"):
        Lamb([parameter], betas=(0.9, 1.0))
