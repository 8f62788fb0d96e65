"""Native CPU LayerNorm, bias, activation and dropout against float64."""

import pytest
import torch
from torch.nn import functional as F

from bertkern import _C
from bertkern.reference.tolerance import assert_close
from csrc import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 12345678901
ACTIVATIONS = {
    _C.Activation.GELU: F.gelu,
    _C.Activation.GELU_TANH: lambda z: F.gelu(z, approximate="tanh"),
    _C.Activation.RELU: F.relu,
    _C.Activation.NONE: lambda z: z + 0,
}


def norm_expected(dtype, x, residual, weight, bias, mask, dy):
    x, residual, weight, bias, mask, dy = (
        t.detach().to(dtype) for t in (x, residual, weight, bias, mask, dy)
    )
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    z = residual + x * mask
    y = F.layer_norm(z, z.shape[-1:], weight, bias, 1e-5)
    return y, torch.autograd.grad((y, z), leaves, (dy, dy))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (130, 768), (3, 1500)], ids=str)
def test_dropout_add_layer_norm(isa, shape, dtype, p):
    torch.manual_seed(shape[1])
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    drop, rows = native.dropout(p, SEED), torch.arange(shape[0]) * 3
    mask = native.hidden_dropout(torch.ones(shape), drop, rows)
    inputs = (x, residual, weight, bias, mask, dy)
    y64, grads64 = norm_expected(torch.float64, *inputs)
    y_same, grads_same = norm_expected(dtype, *inputs)
    y, z, mean, rstd = native.layer_norm_fwd(
        x, weight, bias, residual=residual, drop=drop, rows=rows
    )
    assert_close(y, y64, y_same.detach())
    dx, dresidual, dweight, dbias = native.layer_norm_bwd(
        dy, z, weight, bias, mean, rstd, dz=dy, residual=True, drop=drop, rows=rows
    )
    assert_close(dx, grads64[0], grads_same[0], grad=True, name="dx")
    assert_close(dresidual, grads64[1], grads_same[1], grad=True, name="dresidual")
    if dtype == torch.float32:
        for name, i, grad in (("dweight", 2, dweight), ("dbias", 3, dbias)):
            assert_close(
                *(t[:, None] for t in (grad, grads64[i], grads_same[i])), grad=True, name=name
            )


def test_layer_norm_with_a_large_mean_and_strides(isa):
    torch.manual_seed(0)
    x = (torch.randn(40, 200) + 3000)[:, :97]
    y, _, mean, rstd = native.layer_norm_fwd(x, None, None)
    y64 = F.layer_norm(x.double(), (97,))
    assert_close(y, y64, F.layer_norm(x, (97,)))
    torch.testing.assert_close(mean, x.double().mean(1).float())
    dx, _, _, _ = native.layer_norm_bwd(y, x, None, None, mean, rstd)
    assert dx.isfinite().all()


def test_nan_stays_in_its_row(isa):
    x = torch.randn(4, 50)
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    y, _, _, _ = native.layer_norm_fwd(x, None, None)
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_activation(isa, activation, dtype):
    torch.manual_seed(0)
    function = ACTIVATIONS[activation]
    x = torch.cat([torch.linspace(-14, 14, 4100), torch.randn(4100)]).reshape(100, 82).to(dtype)
    bias, residual, dy = (
        torch.randn(82) * 0.01,
        torch.randn(100, 82).to(dtype),
        torch.randn(100, 82),
    )
    dy, drop = dy.to(dtype), native.dropout(0.1, SEED)
    mask = native.hidden_dropout(torch.ones(100, 82), drop)

    def expected(dtype, z, residual=None):
        z = z.detach().to(dtype).requires_grad_()
        y = function(z) * mask.to(dtype)
        (dz,) = torch.autograd.grad(y, z, dy.to(dtype))
        return y.detach() + (0 if residual is None else residual.to(dtype)), dz

    y, z = native.bias_act_fwd(x, bias, activation, residual=residual, save_z=True, drop=drop)
    torch.testing.assert_close(z, (x.float() + bias).to(dtype), rtol=0, atol=0)
    assert_close(
        y, expected(torch.float64, x.double() + bias, residual)[0],
        expected(dtype, x + bias.to(dtype), residual)[0],
    )  # fmt: skip
    dz, dbias = native.act_bwd(dy, z, activation, bias, drop=drop)
    dz64 = expected(torch.float64, z)[1]
    assert_close(dz, dz64, expected(dtype, z)[1], grad=True, name="dz")
    torch.testing.assert_close(dbias, dz64.sum(0).float(), atol=2e-5, rtol=1e-5)


def test_gelu_of_every_size(isa):
    """Φ and gelu' are right to 2.5e-7 absolute, and 0 or 1 far out, where z would magnify an
    error."""
    z = torch.cat(
        [torch.linspace(-7, 7, 200001), torch.logspace(1, 38, 99), -torch.logspace(1, 38, 99)]
    )
    z64 = z.double().requires_grad_()
    y64 = 0.5 * z64 * torch.special.erfc(-z64 / 2**0.5)
    (slope64,) = torch.autograd.grad(y64.sum(), z64)
    y, _ = native.bias_act_fwd(z[None], None, _C.Activation.GELU)
    slope, _ = native.act_bwd(torch.ones_like(y), z[None], _C.Activation.GELU)
    size = z.abs().clamp(min=1).double()
    assert ((y[0].double() - y64) / size).abs().max() < 2.5e-7
    assert (slope[0].double() - slope64).abs().max() < 3e-7
    far = z.abs() > 6
    assert torch.equal(y[0][far], z[far].clamp(min=0))


def test_gelu_tanh_slope_keeps_its_digits(isa):
    """1 - tanh² would be 0 from |z| of about 4 on; in fp64 it still has digits there."""
    z = torch.linspace(-7, 7, 2801)[None]
    z64 = z.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(z64, approximate="tanh").sum(), z64)
    slope, _ = native.act_bwd(torch.ones_like(z), z, _C.Activation.GELU_TANH)
    assert (slope - exact).abs().max() < 3e-7
    tail = (z > -5) & (z < -3)
    assert ((slope - exact) / exact)[tail].abs().max() < 1e-5
    huge, _ = native.act_bwd(
        torch.ones(1, 2), torch.tensor([[-1e30, 1e30]]), _C.Activation.GELU_TANH
    )
    assert huge.tolist() == [[0.0, 1.0]]


def test_column_sums_do_not_lose_digits_with_rows(isa):
    """Runs of rows are added with compensation: the error is that of a run, not of all rows."""
    dy = torch.rand(20000, 33) + 1
    _, dbias = native.act_bwd(dy, None, _C.Activation.NONE, torch.zeros(33))
    torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1.5e-7, atol=0)
    dy[3, 5], dy[7, 6], dy[8, 6] = float("inf"), float("inf"), -float("inf")
    _, dbias = native.act_bwd(dy, None, _C.Activation.NONE, torch.zeros(33))
    assert dbias[5] == float("inf")
    assert dbias[6].isnan()
    assert dbias[7:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_casts_of_every_16_bit_number(isa, dtype):
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).reshape(16, 4096)
    y = native.hidden_dropout(x, native.NO_DROPOUT)
    torch.testing.assert_close(y, x, equal_nan=True, rtol=0, atol=0)
    wide = torch.randn(16, 4096) * torch.logspace(-9, 6, 4096)
    bias = wide[0]
    z = native.bias_act_fwd(torch.zeros(1, 4096, dtype=dtype), bias, _C.Activation.NONE)[0]
    assert torch.equal(z[0], bias.to(dtype))


def test_threads_do_not_change_a_bit(isa):
    torch.manual_seed(0)
    x, dy, weight, bias = (torch.randn(s) for s in ((1000, 70), (1000, 70), (70,), (70,)))
    results = []
    for threads in (1, 2, 3):
        y, _, mean, rstd = native.layer_norm_fwd(x, weight, bias, threads=threads)
        grads = native.layer_norm_bwd(dy, x, weight, bias, mean, rstd, threads=threads)
        results.append((y, mean, rstd, grads[0], *grads[2:]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)], ids=str)
def test_sizes_of_zero(isa, shape):
    """A tensor without elements has the address 0, as one that is absent; sums over no rows are
    0."""
    x, parameter, drop = torch.zeros(shape), torch.ones(shape[1]), native.dropout(0.1, SEED)
    y, z, mean, rstd = native.layer_norm_fwd(x, parameter, parameter, residual=x, drop=drop)
    assert y.shape == shape
    _, _, dweight, dbias = native.layer_norm_bwd(y, z, parameter, parameter, mean, rstd)
    _, dbias_of_gelu = native.act_bwd(y, z, _C.Activation.GELU, parameter, drop=drop)
    for grad in (dweight, dbias, dbias_of_gelu):
        assert torch.equal(grad, torch.zeros(shape[1]))
    native.bias_act_fwd(x, parameter, _C.Activation.GELU, residual=x, save_z=True, drop=drop)
    native.hidden_dropout(x, drop)
