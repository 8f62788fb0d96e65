"""The feed-forward network's Triton kernels against the formula in fp64."""

import pytest
import torch
from bertkern.kernels.ffn import ffn_bwd, ffn_fwd
from torch.nn import functional as F

from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize(
    ("tokens", "model", "hidden", "dtype", "activation", "p", "bias"),
    [
        (37, 20, 50, torch.float32, "gelu", 0.2, True),
        (20, 32, 64, torch.float16, "gelu", 0.1, True),
        (33, 17, 40, torch.float32, "gelu_tanh", 0.0, False),
        (5, 8, 9, torch.float32, "relu", 0.5, True),
    ],
)
def test_ffn(device, tokens, model, hidden, dtype, activation, p, bias):
    torch.manual_seed(tokens)
    x, w1, w2, dy = (
        torch.randn(s).to(device, dtype)
        for s in ((tokens, model), (hidden, model), (model, hidden), (tokens, model))
    )
    w1 *= model**-0.5
    w2 *= hidden**-0.5
    b1, b2 = (torch.randn(n, device=device).to(dtype) if bias else None for n in (hidden, model))
    seed = torch.tensor([9], device=device) if p else None

    def formula(dtype):
        tensors = (x, w1, b1, w2, b2)
        inputs = [None if t is None else t.cpu().to(dtype).requires_grad_() for t in tensors]
        z = F.linear(*inputs[:3])
        y = F.linear(ACTIVATIONS[activation](z), *inputs[3:])
        if p:
            y = y * hidden_mask(y, p, seed.cpu(), None).to(dtype)
        present = [t for t in inputs if t is not None]
        return [y, z, *torch.autograd.grad(y, present, dy.cpu().to(dtype))]

    y, z = ffn_fwd(x, w1, b1, w2, b2, activation, p, seed, None, True)
    grads = ffn_bwd(dy, x, w1, b1, w2, b2, z, activation, p, seed, None)
    assert [g is None for g in grads] == [False, False, not bias, False, not bias]
    got = [y, z, *(g for g in grads if g is not None)]
    for i, triple in enumerate(zip(got, formula(torch.float64), formula(dtype), strict=True)):
        rows = (t.detach().cpu().reshape(-1, triple[0].shape[-1]) for t in triple)
        assert_close(*rows, grad=i > 1, name=f"result {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputed_preactivation_gives_the_same_bits(device, activation, dtype):
    torch.manual_seed(1)
    shapes = ((37, 20), (50, 20), (50,), (20, 50), (20,), (37, 20))
    x, w1, b1, w2, b2, dy = (torch.randn(s).to(device, dtype) for s in shapes)
    options = (activation, 0.3, torch.tensor([4], device=device), None)
    y, z = ffn_fwd(x, w1, b1, w2, b2, *options, True)
    same_y, nothing = ffn_fwd(x, w1, b1, w2, b2, *options, False)
    assert nothing.shape == (0,)
    assert torch.equal(same_y, y)
    saved, recomputed = (ffn_bwd(dy, x, w1, b1, w2, b2, t, *options) for t in (z, nothing))
    assert all(map(torch.equal, saved, recomputed))


def test_no_tokens(device):
    x, w1, w2 = (torch.ones(s, device=device) for s in ((0, 4), (6, 4), (4, 6)))
    y, z = ffn_fwd(x, w1, None, w2, None, "gelu", 0.0, None, None, True)
    dx, dw1, _, dw2, _ = ffn_bwd(y, x, w1, None, w2, None, z, "gelu", 0.0, None, None)
    assert y.shape == dx.shape == (0, 4)
    assert (dw1 == 0).all()
    assert (dw2 == 0).all()
