"""The GEMM family's Triton kernels against the formula in fp64. Tiles are 16 to 32 wide here."""

import math

import pytest
import torch
from bertkern.kernels.linear import linear_bwd, linear_fwd
from torch.nn import functional as F

from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

fp32, fp16 = torch.float32, torch.float16
ACTIVATIONS = {
    "": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}


def check(names, got, wanted, plain, **options):
    for name, t, want, like in zip(names, got, wanted, plain, strict=True):
        rows = (x.detach().cpu().reshape(-1, t.shape[-1]) for x in (t, want, like))
        assert_close(*rows, name=name, **options)


# (M, N, K): one element; all below a tile; tails everywhere; whole tiles (K = 64: no masks).
@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "p", "residual", "bias"),
    [
        ((1, 1, 1), fp32, "", 0.0, False, True),
        ((5, 9, 7), fp32, "relu", 0.5, True, True),
        ((37, 33, 50), fp32, "gelu", 0.2, True, True),
        ((37, 40, 33), fp16, "gelu", 0.0, False, True),
        ((64, 32, 64), fp32, "gelu_tanh", 0.0, False, False),
        ((33, 64, 64), fp16, "gelu_tanh", 0.1, True, True),
        ((50, 20, 40), fp32, "", 0.5, False, False),
        ((40, 70, 96), fp16, "", 0.1, True, True),
    ],
)
def test_linear(device, shape, dtype, activation, p, residual, bias):
    (m, n, k), act = shape, ACTIVATIONS[activation]
    torch.manual_seed(m)
    x, w, dy = (torch.randn(s).to(device, dtype) for s in ((m, k), (n, k), (m, n)))
    w *= k**-0.5
    b = torch.randn(n, device=device) if bias else None
    r = torch.randn(m, n).to(device, dtype) if residual else None
    seed = torch.tensor([-77], device=device) if p else None
    rows = torch.randperm(1000, device=device)[:m] if residual else None

    def formula(dtype):
        inputs = [t.cpu().to(dtype).requires_grad_() for t in (x, w, b) if t is not None]
        z = F.linear(*inputs)
        y = act(z)
        if p:
            cpu_rows = None if rows is None else rows.cpu()
            y = y * hidden_mask(y, p, seed.cpu(), cpu_rows).to(dtype)
        grads = torch.autograd.grad(y, inputs, dy.cpu().to(dtype))
        return [y if r is None else y + r.cpu().to(dtype), z], grads

    (y64, g64), (y_same, g_same) = formula(torch.float64), formula(dtype)
    y, z = linear_fwd(x, w, b, r, activation, p, seed, rows, True)
    if activation:
        check(["y", "z"], [y, z], y64, y_same)
    else:
        assert z.shape == (0,)
        check(["y"], [y], y64[:1], y_same[:1])
    dx, dw, db = linear_bwd(dy, x, w, b, z, activation, p, seed, rows)
    assert (db is None) == (b is None)
    grads = [dx, dw] if b is None else [dx, dw, db]
    check(["dx", "dw", "db"][: len(grads)], grads, g64, g_same, grad=True)


def test_preactivation_is_not_saved_unless_asked(device):
    x, w = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device)
    assert linear_fwd(x, w, None, None, "gelu", 0.0, None, None, False)[1].shape == (0,)


@pytest.mark.parametrize("dtype", [fp32, fp16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_recomputed_preactivation_gives_the_same_bits(device, activation, dtype):
    torch.manual_seed(2)
    shapes = ((37, 40), (33, 40), (33,), (37, 33))
    x, w, b, dy = (torch.randn(s).to(device, dtype) for s in shapes)
    options = (activation, 0.3, torch.tensor([4], device=device), None)
    y, z = linear_fwd(x, w, b, None, *options, True)
    same_y, nothing = linear_fwd(x, w, b, None, *options, False)
    assert torch.equal(same_y, y)
    saved, recomputed = (linear_bwd(dy, x, w, b, t, *options) for t in (z, nothing))
    assert all(map(torch.equal, saved, recomputed))


def test_strides_and_poisoned_neighbours(device):
    """Operands inside wider matrices whose other columns and rows are NaN."""
    torch.manual_seed(0)

    def inside(rows, cols):
        wide = torch.full((rows + 3, cols + 5), math.nan, device=device)
        wide[:rows, :cols] = torch.randn(rows, cols)
        return wide[:rows, :cols]

    x, w, dy, r = inside(37, 50), inside(33, 50), inside(37, 33), inside(37, 33)
    y, z = linear_fwd(x, w, None, r, "relu", 0.0, None, None, True)
    grads = linear_bwd(dy, x, w, None, z, "relu", 0.0, None, None)
    x, w, dy, r = (t.contiguous() for t in (x, w, dy, r))
    same_y, same_z = linear_fwd(x, w, None, r, "relu", 0.0, None, None, True)
    assert torch.equal(y, same_y)
    assert torch.equal(z, same_z)
    same = linear_bwd(dy, x, w, None, z, "relu", 0.0, None, None)
    assert torch.equal(grads[0], same[0])
    assert torch.equal(grads[1], same[1])
    assert all(t.isfinite().all() for t in (y, *grads[:2]))


def test_batch_invariance_and_determinism(device):
    torch.manual_seed(0)
    x, w, dy = (torch.randn(s, device=device) for s in ((70, 40), (33, 40), (70, 33)))
    b = torch.randn(33, device=device)
    y, z = linear_fwd(x, w, b, None, "gelu", 0.0, None, None, True)
    grads = linear_bwd(dy, x, w, b, z, "gelu", 0.0, None, None)
    again = linear_bwd(dy, x, w, b, z, "gelu", 0.0, None, None)
    assert all(map(torch.equal, grads, again))
    # From a tile's first row on: in the interpreter's matrix product (numpy) a row's bits depend on
    # its place in the tile. On a GPU they do not.
    part = slice(32, 38)
    one, z_one = linear_fwd(x[part], w, b, None, "gelu", 0.0, None, None, True)
    assert torch.equal(one, y[part])
    dx = linear_bwd(dy[part], x[part], w, b, z_one, "gelu", 0.0, None, None)[0]
    assert torch.equal(dx, grads[0][part])


def test_nan_stays_in_its_row_and_passes_relu(device):
    x, w = torch.randn(20, 40, device=device), torch.randn(17, 40, device=device)
    x[3, 2] = math.nan
    y, z = linear_fwd(x, w, None, None, "relu", 0.0, None, None, True)
    assert y[3].isnan().all()
    assert y[torch.arange(20) != 3].isfinite().all()
    assert z[3].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 6, 0)])
def test_empty_sizes(device, sizes):
    m, n, k = sizes
    x, w, dy = (torch.ones(s, device=device) for s in ((m, k), (n, k), (m, n)))
    b = torch.ones(n, device=device)
    y, z = linear_fwd(x, w, b, None, "relu", 0.0, None, None, True)
    dx, dw, db = linear_bwd(dy, x, w, b, z, "relu", 0.0, None, None)
    assert (y == 1).all()
    assert (dx == 0).all()
    assert (dw == 0).all()
    assert (db == m).all()
    assert [t.shape for t in (y, z, dx, dw, db)] == [(m, n), (m, n), (m, k), (n, k), (n,)]


def test_expanded_gradient(device):
    x, w = torch.randn(20, 9, device=device), torch.randn(7, 9, device=device)
    dy = torch.ones(1, device=device).expand(20, 7)
    dx, dw, _ = linear_bwd(dy, x, w, None, None, "", 0.0, None, None)
    assert torch.allclose(dx, dy @ w, atol=1e-5)
    assert torch.allclose(dw, dy.T @ x, atol=1e-5)
