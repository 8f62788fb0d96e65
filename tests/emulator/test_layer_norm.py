"""The CUDA LayerNorm kernels, executed: their own sources, compiled for the host, against fp64.

The sources of csrc/cuda are compiled with this folder's machine of fibers in place of csrc/ptx and
of the launch (see machine.h).
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bertkern.reference.dropout import hidden_mask, threshold_and_scale
from bertkern.reference.tolerance import assert_close

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAN = float("nan")
SEED = 12345678901


class Dropout(ctypes.Structure):
    """DeviceDropout of csrc/cuda/layer_norm.h."""

    _fields_ = (
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("seed", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    )


def fields(pointers: str, sizes: str, *last):
    return (
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int64) for name in sizes.split()),
        ("dtype", ctypes.c_int),
        ("weight_dtype", ctypes.c_int),
        *last,
        ("dropout", Dropout),
    )


class NormArguments(ctypes.Structure):
    """NormArguments of csrc/cuda/layer_norm.h."""

    _fields_ = fields(
        "x residual weight bias y z mean rstd",
        "x_stride residual_stride rows cols",
        ("eps", ctypes.c_float),
    )


class NormGradArguments(ctypes.Structure):
    """NormGradArguments of csrc/cuda/layer_norm.h."""

    _fields_ = fields(
        "dy dz z weight mean rstd dx dresidual dweight dbias partial",
        "dy_stride dz_stride z_stride rows cols",
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The library of emulated kernels."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    compiler = shutil.which(configured.split()[0]) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tree = tmp_path_factory.mktemp("emulator")
    for room in ("common", "cuda"):
        shutil.copytree(CSRC / room, tree / room)
    shutil.copytree(HERE, tree, dirs_exist_ok=True)
    library = tree / "kernels.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    done = subprocess.run(
        [*command, str(tree / "layer_norm.cpp"), "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    for name in ("layer_norm_fwd", "layer_norm_bwd"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.layer_norm_partials.restype = ctypes.c_int64
    loaded.layer_norm_partials.argtypes = [ctypes.c_int64]
    return loaded


def at(t):
    return None if t is None else t.data_ptr()


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, NAN, dtype=dtype)


def dropout(p, seed, rows):
    return Dropout(*threshold_and_scale(p), at(seed), at(rows))


def forward(kernels, x, residual, weight, bias, p, seed, rows, descending):
    n, cols = x.shape
    y, mean, rstd = poisoned(n, cols, dtype=x.dtype), poisoned(n), poisoned(n)
    z = None if residual is None else poisoned(n, cols, dtype=x.dtype)
    arguments = NormArguments(
        *(at(t) for t in (x, residual, weight, bias, y, z, mean, rstd)),
        *(x.stride(0), 0 if residual is None else residual.stride(0), n, cols),
        *(DTYPES[x.dtype], DTYPES[weight.dtype], 1e-5, dropout(p, seed, rows)),
    )
    error = kernels.layer_norm_fwd(ctypes.byref(arguments), int(descending))
    assert error is None, error
    return y, z, mean, rstd


def backward(kernels, dy, dz, z, weight, mean, rstd, p, seed, rows, descending):
    n, cols = z.shape
    dx = poisoned(n, cols, dtype=z.dtype)
    dresidual = poisoned(n, cols, dtype=z.dtype) if p else None
    dweight, dbias = (poisoned(cols, dtype=weight.dtype) for _ in range(2))
    partial = poisoned(max(1, kernels.layer_norm_partials(n)), 2, cols)
    arguments = NormGradArguments(
        *(at(t) for t in (dy, dz, z, weight, mean, rstd, dx, dresidual, dweight, dbias, partial)),
        *(dy.stride(0), 0 if dz is None else dz.stride(0), z.stride(0), n, cols),
        *(DTYPES[z.dtype], DTYPES[weight.dtype], dropout(p, seed, rows)),
    )
    error = kernels.layer_norm_bwd(ctypes.byref(arguments), int(descending))
    assert error is None, error
    return dx, dx if dresidual is None else dresidual, dweight, dbias


def same(first, second):
    return all(
        a is b or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


# A tile of each size (512, 1024, 8192 columns), aligned rows and odd ones, more rows than blocks.
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide_weight", [True, False], ids=["fp32 weight", "same weight"])
def test_against_float64(kernels, shape, with_residual, p, dtype, wide_weight):
    torch.manual_seed(shape[1])
    x, residual, dy, dz = (torch.randn(shape).to(dtype) for _ in range(4))
    weight_dtype = torch.float32 if wide_weight else dtype
    weight, bias = (torch.randn(shape[1]).to(weight_dtype) for _ in range(2))
    seed, rows = torch.tensor([SEED]), torch.arange(shape[0]) * 3 + 7
    mask = hidden_mask(x, p, seed, rows)
    residual, dz = (residual, dz) if with_residual else (None, None)

    def expected(dtype):
        leaves = [x, weight, bias] + ([residual] if with_residual else [])
        leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
        z = leaves[0] * mask.to(dtype) + leaves[3] if with_residual else leaves[0]
        y = F.layer_norm(z, shape[1:], *leaves[1:3], 1e-5)
        outputs, grads = ((y, z), (dy, dz)) if with_residual else ((y,), (dy,))
        grads = torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])
        return y.detach(), grads

    results = []
    for descending in (False, True):
        y, z, mean, rstd = forward(
            kernels, x, residual, weight, bias, p, seed, rows, descending=descending
        )
        z = x if z is None else z
        grads = backward(
            kernels, dy, dz, z, weight, mean, rstd, p, seed, rows, descending=descending
        )
        results.append((y, z, mean, rstd, *grads))
    assert same(*results), "the order in which threads run shows: a barrier is missing"
    y64, grads64 = expected(torch.float64)
    y_same, grads_same = expected(dtype)
    assert_close(y, y64, y_same)
    dx, dresidual, dweight, dbias = grads
    assert_close(dx, grads64[0], grads_same[0], grad=True, name="dx")
    if with_residual:
        assert_close(dresidual, grads64[3], grads_same[3], grad=True, name="dresidual")
        if p and shape[0]:
            assert torch.equal(dx == 0, mask == 0)
    for name, i, grad in (("dweight", 1, dweight), ("dbias", 2, dbias)):
        if grad.dtype == dtype:
            assert_close(grad, grads64[i], grads_same[i], grad=True, name=name)


def test_strides_and_a_large_mean(kernels):
    torch.manual_seed(0)
    x = (torch.randn(20, 200) + 30)[:, 3:100]
    weight, bias = torch.randn(97), torch.randn(97)
    y, _, mean, _ = forward(kernels, x, None, weight, bias, 0.0, None, None, descending=False)
    exact = F.layer_norm(x.double(), (97,), weight.double(), bias.double())
    assert_close(y, exact, F.layer_norm(x, (97,), weight, bias))
    torch.testing.assert_close(mean, x.double().mean(1).float(), rtol=1e-6, atol=0)


def test_too_many_columns(kernels):
    arguments = NormArguments(*[None] * 8, 0, 0, 1, 8193)
    message = kernels.layer_norm_fwd(ctypes.byref(arguments), 0)
    assert b"at most 8192 columns" in message
