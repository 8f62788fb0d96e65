"""LayerNorm's Triton kernels against the formula in fp64.

Rows beyond 256 columns are read in pieces by the interpreter's tiles, beyond 8,192 (4,096 in the
backward) by a GPU's.
"""

import math

import pytest
import torch
from bertkern.kernels import layer_norm as kernels
from torch.nn.functional import layer_norm

from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close, hold_in_most_draws

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

fp32, fp16 = torch.float32, torch.float16
# One element; less than a tile; rows and columns past a tile; two pieces; three pieces with a tail.
SHAPES = [(1, 1), (7, 20), (37, 64), (40, 33), (5, 500), (19, 700)]
# A piece of 8,192 and one column of the next; a tail in the last piece; the widest that there is.
WIDE = [8193, 40_000, 65_536]


def leaves(dtype, *tensors):
    return [None if t is None else t.cpu().to(dtype).requires_grad_() for t in tensors]


def backward(loss, inputs):
    grads = torch.autograd.grad(loss, [t for t in inputs if t is not None])
    return [None if t is None else grads.pop(0) for grads in [list(grads)] for t in inputs]


def check(names, got, wanted, plain, **options):
    for name, t, want, like in zip(names, got, wanted, plain, strict=True):
        if want is None:
            assert t is None
        else:
            rows = (x.detach().cpu().reshape(-1, t.shape[-1]) for x in (t, want, like))
            assert_close(*rows, name=name, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "affine"), [(fp32, True), (fp16, True), (fp32, False)])
def test_layer_norm(device, shape, dtype, affine):
    torch.manual_seed(shape[1])
    x, dy = (torch.randn(shape).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device=device) if affine else None for _ in range(2))
    eps = 1e-5

    def formula(dtype):
        inputs = leaves(dtype, x, weight, bias)
        y = layer_norm(inputs[0], shape[1:], inputs[1], inputs[2], eps)
        return [y], backward((y * dy.cpu().to(dtype)).sum(), inputs)

    (y64, g64), (y_same, g_same) = formula(torch.float64), formula(dtype)
    y, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, eps)
    check(["y"], [y], y64, y_same)
    assert torch.allclose(mean.cpu().double(), x.cpu().double().mean(1), atol=1e-6)
    variance = x.cpu().double().var(1, correction=0)
    assert torch.allclose(rstd.cpu().double(), (variance + eps).rsqrt(), rtol=1e-5)
    grads = kernels.layer_norm_bwd(dy, x, weight, bias, mean, rstd)
    check(["dx", "dweight", "dbias"], grads, g64, g_same, grad=True)


@pytest.mark.parametrize("shape", [(37, 64), (9, 20), (5, 700)])
@pytest.mark.parametrize(
    ("dtype", "p", "use_dz", "use_rows"),
    [(fp32, 0.1, True, True), (fp16, 0.5, False, False), (fp32, 0.0, True, False)],
)
def test_dropout_add_layer_norm(device, shape, dtype, p, use_dz, use_rows):
    torch.manual_seed(shape[1])
    x, residual, dy, dz = (torch.randn(shape).to(device, dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    seed = torch.tensor([5], device=device) if p else None
    rows = torch.randperm(1000, device=device)[: shape[0]] if use_rows else None
    eps = 1e-12

    def formula(dtype):
        inputs = leaves(dtype, x, residual, weight, bias)
        dropped = inputs[0]
        if p:
            cpu_rows = None if rows is None else rows.cpu()
            dropped = dropped * hidden_mask(x.cpu(), p, seed.cpu(), cpu_rows).to(dtype)
        z = inputs[1] + dropped
        y = layer_norm(z, shape[1:], inputs[2], inputs[3], eps)
        loss = (y * dy.cpu().to(dtype)).sum()
        if use_dz:
            loss = loss + (z * dz.cpu().to(dtype)).sum()
        return [y, z], backward(loss, inputs)

    (y64, g64), (y_same, g_same) = formula(torch.float64), formula(dtype)
    y, z, mean, rstd = kernels.dropout_add_layer_norm_fwd(
        x, residual, weight, bias, p, eps, seed, rows
    )
    check(["y", "z"], [y, z], y64, y_same)
    grads = kernels.dropout_add_layer_norm_bwd(
        dy, dz if use_dz else None, z, weight, bias, mean, rstd, p, seed, rows
    )
    check(["dx", "dresidual", "dweight", "dbias"], grads, g64, g_same, grad=True)


@pytest.fixture
def pieces_of_a_gpu(monkeypatch):
    """The interpreter takes an H100's pieces, 16 or 32 times as wide as its own, and sums the
    partial sums in tiles as wide."""
    tuning = kernels.tuning
    chosen = (tuning.layer_norm, tuning.elementwise)
    for direction in ("fwd", "bwd"):
        of_gpu = tuning.LAYER_NORM[direction, "sm90"]
        monkeypatch.setitem(tuning.LAYER_NORM, (direction, "interpreter"), of_gpu)
    monkeypatch.setitem(tuning.ELEMENTWISE, "interpreter", {0: tuning.RowTile(2, 8192, 4)})
    for function in chosen:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in chosen:
        function.cache_clear()


@pytest.mark.usefixtures("pieces_of_a_gpu")
@pytest.mark.parametrize("cols", WIDE)
@pytest.mark.parametrize(
    ("dtype", "mean"), [(fp32, 0.0), (fp32, 3000.0), (fp16, 0.0), (fp16, 30.0)]
)
def test_wide_rows(device, cols, dtype, mean):
    """Many pieces a row, and a mean that is thousands of deviations."""

    def draw(seed):
        torch.manual_seed(seed)
        x = (torch.randn(2, cols) + mean).to(device, dtype)
        dy = torch.randn(2, cols).to(device, dtype)
        weight, bias = (torch.randn(cols, device=device) for _ in range(2))

        def formula(dtype):
            inputs = leaves(dtype, x, weight, bias)
            y = layer_norm(inputs[0], (cols,), inputs[1], inputs[2], 1e-5)
            return [y], backward((y * dy.cpu().to(dtype)).sum(), inputs)

        (y64, g64), (y_same, g_same) = formula(torch.float64), formula(dtype)
        y, *statistics = kernels.layer_norm_fwd(x, weight, bias, 1e-5)
        check(["y"], [y], y64, y_same)
        grads = kernels.layer_norm_bwd(dy, x, weight, bias, *statistics)
        check(["dx", "dweight", "dbias"], grads, g64, g_same, grad=True)

    hold_in_most_draws(draw)


@pytest.mark.usefixtures("pieces_of_a_gpu")
@pytest.mark.parametrize("cols", WIDE)
@pytest.mark.parametrize(("dtype", "mean"), [(fp32, 3000.0), (fp16, 0.0)])
def test_wide_dropout_add_rows(device, cols, dtype, mean):
    """The same with a residual, which carries the mean, and a gradient that reaches z itself."""

    def draw(seed):
        torch.manual_seed(seed)
        x, residual, dy, dz = (torch.randn(2, cols) for _ in range(4))
        x, residual, dy, dz = (t.to(device, dtype) for t in (x, residual + mean, dy, dz))
        weight, bias = (torch.randn(cols, device=device) for _ in range(2))
        dropout_seed = torch.tensor([seed], device=device)
        rows = torch.tensor([12, 1 << 33], device=device)
        mask = hidden_mask(x.cpu(), 0.1, dropout_seed.cpu(), rows.cpu())

        def formula(dtype):
            inputs = leaves(dtype, x, residual, weight, bias)
            z = inputs[1] + inputs[0] * mask.to(dtype)
            y = layer_norm(z, (cols,), inputs[2], inputs[3], 1e-12)
            loss = (y * dy.cpu().to(dtype)).sum() + (z * dz.cpu().to(dtype)).sum()
            return [y, z], backward(loss, inputs)

        (y64, g64), (y_same, g_same) = formula(torch.float64), formula(dtype)
        y, z, *statistics = kernels.dropout_add_layer_norm_fwd(
            x, residual, weight, bias, 0.1, 1e-12, dropout_seed, rows
        )
        check(["y", "z"], [y, z], y64, y_same)
        grads = kernels.dropout_add_layer_norm_bwd(
            dy, dz, z, weight, bias, *statistics, 0.1, dropout_seed, rows
        )
        check(["dx", "dresidual", "dweight", "dbias"], grads, g64, g_same, grad=True)

    hold_in_most_draws(draw)


@pytest.mark.parametrize("cols", [64, 500])
def test_large_mean(device, cols):
    """E[x²] − mean² would lose every digit here, and the rounding of the mean, up to 1e-4, is not
    in y: x − mean is exact, and what is left of the mean in it is taken off again."""
    x = torch.randn(8, cols, device=device) + 3000
    y, _, rstd = kernels.layer_norm_fwd(x, None, None, 1e-5)
    variance = x.cpu().double().var(1, correction=0)
    assert torch.allclose(rstd.cpu().double(), (variance + 1e-5).rsqrt(), rtol=1e-5)
    exact = layer_norm(x.cpu().double(), (cols,))
    assert (y.cpu() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("cols", [33, 300])
def test_strides_neighbours_and_invariance(device, cols):
    """Rows inside a matrix of NaN; a NaN row that stays alone; a row alone and in a batch."""
    torch.manual_seed(0)
    wide, wide_dy = (torch.full((20, cols + 7), math.nan, device=device) for _ in range(2))
    wide[:, :cols], wide_dy[:, :cols] = torch.randn(2, 20, cols, device=device)
    x, dy, weight = wide[:, :cols], wide_dy[:, :cols], torch.randn(cols, device=device)
    y, mean, rstd = kernels.layer_norm_fwd(x, weight, None, 1e-5)
    dx, dweight, _ = kernels.layer_norm_bwd(dy, x, weight, None, mean, rstd)
    assert all(t.isfinite().all() for t in (y, dx, dweight))
    again = kernels.layer_norm_bwd(dy, x, weight, None, mean, rstd)
    assert torch.equal(again[0], dx)
    assert torch.equal(again[1], dweight)
    assert torch.equal(kernels.layer_norm_fwd(x[3:4], weight, None, 1e-5)[0], y[3:4])
    assert torch.equal(
        kernels.layer_norm_bwd(dy[3:4], x[3:4], weight, None, mean[3:4], rstd[3:4])[0], dx[3:4]
    )
    wide[5] = math.nan
    bad_y, bad_mean, bad_rstd = kernels.layer_norm_fwd(x, weight, None, 1e-5)
    bad_dx = kernels.layer_norm_bwd(dy, x, weight, None, bad_mean, bad_rstd)[0]
    others = torch.arange(20, device=device) != 5
    assert torch.equal(bad_y[others], y[others])
    assert torch.equal(bad_dx[others], dx[others])
    assert bad_y[5].isnan().all()


def test_more_rows_than_partial_sums(device, monkeypatch):
    """Each program owns several tiles of rows."""
    monkeypatch.setattr(kernels.tuning, "LAYER_NORM_PARTIALS", 2)
    x, dy, weight = (torch.randn(s, device=device) for s in ((50, 300), (50, 300), (300,)))
    _, mean, rstd = kernels.layer_norm_fwd(x, weight, weight, 1e-5)
    _, dweight, dbias = kernels.layer_norm_bwd(dy, x, weight, weight, mean, rstd)
    xhat = (x - mean[:, None]) * rstd[:, None]
    assert torch.allclose(dweight, (dy * xhat).sum(0), atol=1e-4)
    assert torch.allclose(dbias, dy.sum(0), atol=1e-4)


def test_no_rows(device):
    x, weight = torch.zeros(0, 16, device=device), torch.ones(16, device=device)
    y, mean, rstd = kernels.layer_norm_fwd(x, weight, weight, 1e-5)
    dx, dweight, dbias = kernels.layer_norm_bwd(x, x, weight, weight, mean, rstd)
    assert y.shape == dx.shape == (0, 16)
    assert (dweight == 0).all()
    assert (dbias == 0).all()
