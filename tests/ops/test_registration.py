"""What torch asks of an op: opcheck, compile, autocast, checkpointing, streams of random
numbers."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import bertkern

SEED = torch.tensor([7])
CU = torch.tensor([0, 3, 8], dtype=torch.int32)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def attention_options(causal, p):
    return (None, None, None, SEED if p else None, 5, 6, causal, p, 0.5, 0)


CALLS = {
    "attention_fwd": lambda: (
        leaf(2, 5, 2, 8),
        leaf(2, 6, 2, 8),
        leaf(2, 6, 2, 8),
        *attention_options(1, 0.2),
    ),
    "attention_fwd varlen": lambda: (
        *(leaf(8, 2, 8) for _ in range(3)),
        *(CU, CU, None, None, 5, 5, 0, 0.0, 0.5, 0),
    ),
    "attention_bwd": lambda: (
        *(torch.randn(2, n, 2, 8) for n in (5, 5, 6, 6, 5)),
        torch.randn(2, 2, 5),
        None,
        *attention_options(0, 0.2),
    ),
    "layer_norm_fwd": lambda: (leaf(3, 8), leaf(8), leaf(8), 1e-5),
    "layer_norm_bwd": lambda: (
        *(torch.randn(3, 8), torch.randn(3, 8), torch.ones(8), None),
        *(torch.zeros(3), torch.ones(3)),
    ),
    "dropout_add_layer_norm_fwd": lambda: (
        *(leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), 0.2, 1e-12, SEED, None),
    ),
    "dropout_add_layer_norm_bwd": lambda: (
        *(torch.randn(3, 8), None, torch.randn(3, 8), torch.ones(8), torch.ones(8)),
        *(torch.zeros(3), torch.ones(3), 0.2, SEED, None),
    ),
    "dropout": lambda: (leaf(3, 8), 0.2, SEED, None),
    "linear_fwd": lambda: (
        *(leaf(3, 8), leaf(4, 8), leaf(4), leaf(3, 4), "gelu", 0.2, SEED, None, True),
    ),
    "linear_bwd": lambda: (
        *(torch.randn(3, 4), torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)),
        *(torch.randn(3, 4), "gelu", 0.2, SEED, None),
    ),
    "ffn_fwd": lambda: (
        *(leaf(3, 8), leaf(4, 8), leaf(4), leaf(8, 4), None, "gelu", 0.2, SEED, None),
    ),
    "ffn_bwd": lambda: (
        *(torch.randn(3, 8), torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)),
        *(torch.randn(8, 4), None, torch.randn(3, 4), "gelu", 0.2, SEED, None),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    torch.manual_seed(0)
    op = getattr(torch.ops.bertkern, call.split()[0]).default
    opcheck(op, CALLS[call](), raise_exception=True)


def encoder_layer(x, w_qkv, w1, b1, w2, b2, gamma, beta):
    q, k, v = bertkern.linear(x, w_qkv).view(*x.shape[:2], 3, 2, -1).unbind(2)
    out = bertkern.attention(q, k, v, dropout_p=0.1).flatten(2)
    x = bertkern.dropout_add_layer_norm(out, x, gamma, beta, 0.1)
    return bertkern.layer_norm(x + bertkern.ffn(x, w1, b1, w2, b2), gamma, beta)


def layer_arguments(batch, length):
    torch.manual_seed(1)
    x = leaf(batch, length, 16)
    parameters = leaf(48, 16), leaf(32, 16), leaf(32), leaf(16, 32), leaf(16), leaf(16), leaf(16)
    return x, parameters


def test_compile_fullgraph_with_dynamic_shapes():
    compiled = torch.compile(encoder_layer, fullgraph=True, dynamic=True)
    for batch, length in ((2, 7), (3, 12)):
        x, parameters = layer_arguments(batch, length)
        out = compiled(x, *parameters)
        grads = torch.autograd.grad(out.sum(), (x, *parameters))
        assert out.shape == x.shape
        assert all(g.isfinite().all() for g in grads)


def test_compiled_equals_eager_without_dropout():
    def layer(x, w1, b1, w2, b2, gamma, beta):
        y = bertkern.ffn(x, w1, b1, w2, b2)
        return bertkern.dropout_add_layer_norm(y, x, gamma, beta)

    x, (_, *parameters) = layer_arguments(2, 9)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (layer, compiled):
        out = function(x, *parameters)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *parameters))))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, atol=1e-5, rtol=1e-5)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, gamma, beta):
            y = bertkern.attention(x, x, x).flatten(2)
            return bertkern.layer_norm(y, gamma, beta)

    x, gamma = torch.randn(2, 5, 2, 8), torch.ones(16)
    program = torch.export.export(Layer(), (x, gamma, gamma))
    torch.testing.assert_close(program.module()(x, gamma, gamma), Layer()(x, gamma, gamma))


def test_checkpoint_recomputes_the_same_dropout():
    x, parameters = layer_arguments(2, 9)
    results = []
    for run in (
        lambda: encoder_layer(x, *parameters),
        lambda: checkpoint(encoder_layer, x, *parameters, use_reentrant=False),
    ):
        torch.manual_seed(3)
        out = run()
        results.append((out, *torch.autograd.grad(out.sum(), (x, *parameters))))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_casts_products_and_keeps_gradients_in_the_parameters_dtype():
    x, (_, w1, b1, w2, b2, gamma, beta) = layer_arguments(2, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        y = bertkern.ffn(x, w1, b1, w2, b2)
        z = bertkern.layer_norm(y, gamma, beta)
        q = x.view(2, 4, 2, 8)
        a = bertkern.attention(q, q, q)
    assert y.dtype == a.dtype == torch.float16
    grads = torch.autograd.grad(z.float().sum() + a.float().sum(), (x, w1, gamma))
    assert all(g.dtype == torch.float32 for g in grads)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 5, 3, 8, device="meta")
    out, lse = bertkern.attention(q, q, q, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 3, 5)


def test_frozen_inputs_get_no_gradient():
    x, w = torch.randn(3, 8), leaf(4, 8)
    (grad,) = torch.autograd.grad(bertkern.linear(x, w).sum(), (w,))
    assert grad.shape == w.shape
    assert x.grad is None
