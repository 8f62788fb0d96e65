"""tanh of the kernels against fp64, over every argument that fp32 tells from 0 or from 1."""

import math

import pytest
import torch
import triton
import triton.language as tl
from bertkern.kernels.tanh import tanh

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

BOUND = 2.5e-7  # relative; measured 1.7e-7 in the interpreter, a GPU's exp2 and division add 1 bit
BLOCK = 4096


@triton.jit
def tanh_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < count, other=0.0)
    tl.store(y_ptr + index, tanh(x), mask=index < count)


def apply(x):
    y = torch.empty_like(x)
    tanh_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
    return y


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_relative_error(device, sign):
    generator = torch.Generator().manual_seed(0)
    logarithmic = torch.logspace(-8, math.log10(20), 200_001, dtype=torch.float64)
    uniform = 20 * torch.rand(100_000, generator=generator, dtype=torch.float64) + 1e-8
    border = torch.linspace(0.6, 0.8, 50_000, dtype=torch.float64)  # where the forms meet
    x = (sign * torch.cat([logarithmic, uniform, border])).float().to(device)
    exact = x.double().tanh()
    error = (apply(x).double() - exact).abs() / exact.abs()
    worst = error.argmax()
    assert error[worst] <= BOUND, f"tanh({x[worst].item()}): relative error {error[worst].item()}"


@pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")  # x² and inf - inf, unused
def test_special_values(device):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, -1e-40]
    y = apply(torch.tensor(values, device=device)).cpu()
    assert y[0].isnan()
    assert y[1:7].tolist() == [1.0, -1.0, 0.0, 0.0, 1.0, -1.0]
    if device == "cpu":  # a GPU may flush denormals
        assert torch.equal(y[7:], torch.tensor(values[7:]))
    assert y[7:].abs().max() <= 1e-40


def test_is_odd_and_never_passes_one(device):
    x = torch.linspace(0, 30, 30_001, device=device)
    y = apply(x)
    assert torch.equal(apply(-x), -y)
    assert y.max() <= 1
    assert (y[1:] > 0).all()
