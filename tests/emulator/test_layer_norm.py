"""The CUDA LayerNorm kernels, executed: against fp64, under several orders of threads and blocks.

tests/ops/test_layer_norm.py holds the ops on every backend; here the shapes are those of the
kernels' tiles, and every order must give the same bits.
"""

import pytest
import torch
from emulator import emulated
from torch.nn import functional as F

import bertkern
from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ORDERS = [(1, 1), (2, 2), (3, 5)]  # seed, blocks that run at the same time


def same(first, second):
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


# A tile of each size (512, 1024, 8192 columns), aligned rows and odd ones, more rows than blocks.
@pytest.mark.parametrize("wide_weight", [True, False], ids=["fp32 weight", "same weight"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    ("shape", "with_residual", "p"),
    [
        ((5, 1), True, 0.1),
        ((1070, 24), False, 0.0),
        ((9, 333), True, 0.3),
        ((7, 768), True, 0.1),
        ((6, 1000), False, 0.0),
        ((3, 1025), True, 0.0),
        ((2, 2048), True, 0.5),
        ((0, 16), True, 0.1),
    ],
    ids=str,
)
def test_against_float64(shape, with_residual, p, dtype, wide_weight):
    weight_dtype = torch.float32 if wide_weight else dtype
    x, residual, dy, dz = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[1]).to(weight_dtype) for _ in range(2))
    seed, rows = torch.tensor([12345678901]), torch.arange(shape[0]) * 3 + 7
    mask = hidden_mask(x, p, seed, rows)
    inputs = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    cotangents = (dy, dz) if with_residual else (dy,)

    def ours(x, weight, bias, residual=None):
        if residual is None:
            return (bertkern.layer_norm(x, weight, bias, 1e-5),)
        return bertkern.dropout_add_layer_norm(
            x, residual, weight, bias, p, 1e-5, True, seed, dropout_rows=rows
        )

    def plain(x, weight, bias, residual=None):
        z = x if residual is None else x * mask.to(x.dtype) + residual
        y = F.layer_norm(z, shape[1:], weight.to(x.dtype), bias.to(x.dtype), 1e-5)
        return (y,) if residual is None else (y, z)

    def run(function, dtype=None):
        """(outputs, gradients)"""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [c.to(outputs[0].dtype) for c in cotangents])
        return [t.detach() for t in outputs], grads

    results = []
    for order in ORDERS:
        with emulated.emulated(*order), bertkern.backend("cuda"):
            results.append(run(ours))
    outputs, grads = results[0]
    for other_outputs, other_grads in results[1:]:
        assert same(outputs, other_outputs)
        assert same(grads, other_grads)
    exact_outputs, exact_grads = run(plain, torch.float64)
    same_outputs, same_grads = run(plain, dtype)
    for out, *others in zip(outputs, exact_outputs, same_outputs, strict=True):
        assert_close(out, *others)
    names = ("x", "weight", "bias", "residual")
    for name, grad, *others in zip(names, grads, exact_grads, same_grads, strict=False):
        rows_of = [t.reshape(-1, shape[1]) for t in (grad, *others)]
        assert_close(*rows_of, grad=True, name=f"gradient of {name}")
    if p and shape[0]:
        assert torch.equal(grads[0] == 0, mask == 0)


def test_strides_and_a_large_mean():
    x = (torch.randn(20, 200) + 30)[:, 3:100]
    weight, bias = torch.randn(97), torch.randn(97)
    with emulated.emulated(1), bertkern.backend("cuda"):
        y = bertkern.layer_norm(x, weight, bias)
    exact = F.layer_norm(x.double(), (97,), weight.double(), bias.double())
    assert_close(y, exact, F.layer_norm(x, (97,), weight, bias))


def test_too_many_columns():
    says = "at most 8192 columns, not 8193"
    forced = bertkern.backend("cuda")
    with emulated.emulated(1), forced, pytest.raises(NotImplementedError, match=says):
        bertkern.layer_norm(torch.zeros(1, 8193))
