"""The exponential on the FMA pipe (csrc/cuda/sm90/exponential.cuh), compiled for the host."""

import ctypes
import subprocess

import numpy as np
import pytest

from csrc import cuda_binary, cuda_launches

SOURCE = """
#include "cuda/sm90/exponential.cuh"
extern "C" void powers(const float* x, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = bertkern::sm90::exp2_polynomial(x[i]);
}
"""


@pytest.fixture(scope="module")
def powers(tmp_path_factory):
    """float32 array -> float32 array."""
    try:
        compiler = cuda_launches.compiler()
    except cuda_binary.Missing as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("exponential")
    (folder / "powers.cpp").write_text(SOURCE)
    includes = [f"-I{path}" for path in (cuda_launches.EMULATOR, cuda_launches.CSRC)]
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", *includes, "powers.cpp"]
    subprocess.run([*command, "-o", "powers.so"], check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "powers.so"))

    def function(x):
        y = np.empty_like(x)
        pointers = (a.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for a in (x, y))
        library.powers(*pointers, len(x))
        return y

    return function


def test_relative_error(powers):
    x = np.linspace(-126, 127.4, 4_000_001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(powers(x) / exact - 1).max() < 3e-6


def test_special_values(powers):
    """Of the maximum itself 1, of what is not seen +0 and not a small number, of NaN NaN."""
    x = np.array([0.0, -0.0, -np.inf, -127.0, -1e30, np.nan, -np.nan], dtype=np.float32)
    y = powers(x)
    assert (y[:2] == 1).all()
    assert (y[2:5] == 0).all()
    assert not np.signbit(y[2:5]).any()
    assert np.isnan(y[5:]).all()


def test_between_zero_and_normal_numbers(powers):
    x = np.linspace(-127, -126, 10_001, dtype=np.float32)
    y = powers(x)
    assert (y >= 0).all()
    assert (y <= 2.0**-125).all()
