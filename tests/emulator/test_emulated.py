"""The emulator under bertkern's ops: it sees each tensor as it is, and leaves nothing behind."""

import pytest
import torch
from emulator import build, emulated

import bertkern
from bertkern.ops import _backend, _cuda, _cuda_attention

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def machine():
    with emulated.emulated(1), bertkern.backend("cuda"):
        yield emulated.module()


def forward(x, y, rows, **changes):
    """One call of the CUDA LayerNorm forward, as _cuda.py makes it, but for `changes`."""
    statistics = [_cuda.torch.empty(max(rows, 1)) for _ in range(2)]
    arguments = {
        **{"x": x, "residual": None, "weight": None, "bias": None, "y": y, "z": None},
        **dict(zip(("mean", "rstd"), statistics, strict=True)),
        **{"dropout_rows": None, "dropout_seed": None},
    }
    arguments = {name: _cuda.address(t) for name, t in arguments.items()}
    arguments |= {"x_stride": x.stride(0), "residual_stride": 0, "rows": rows, "cols": x.shape[1]}
    arguments |= {"dtype": _cuda.DTYPES[x.dtype], "weight_dtype": _cuda.DTYPES[torch.float32]}
    arguments |= {"eps": 1e-5, "dropout_threshold": 0, "dropout_scale": 1.0}
    arguments |= dict(zip(("device", "stream"), _cuda.place(x), strict=True)) | changes
    _cuda._C.cuda_layer_norm_fwd(*arguments.values())
    return y


@pytest.mark.usefixtures("machine")
def test_reads_and_writes_stay_inside_the_tensors():
    x = torch.randn(6, 24)
    assert forward(x, torch.empty(6, 24), 6).isfinite().all()
    with pytest.raises(RuntimeError, match=r"layer_norm_fwd: .* behind the end of x .*out of bo"):
        forward(x, torch.empty(7, 24), 7)
    with pytest.raises(RuntimeError, match=r"layer_norm_fwd: .* behind the end of y .*out of bo"):
        forward(x, torch.empty(5, 24), 6)


@pytest.mark.usefixtures("machine")
def test_what_lies_between_rows_is_not_the_tensors():
    matrix = torch.randn(6, 40)
    assert forward(matrix[:, :24], torch.empty(6, 24), 6).isfinite().all()
    with pytest.raises(RuntimeError, match=r"x .*out of bounds"):
        forward(matrix[:, :24], torch.empty(6, 32), 6, cols=32)


@pytest.mark.usefixtures("machine")
def test_memory_that_torch_hands_out_has_no_values_yet():
    x = _cuda.torch.empty(6, 24)
    assert x.isnan().all()
    with pytest.raises(RuntimeError, match=r"bytes of x .*nobody has written"):
        forward(x, torch.empty(6, 24), 6)
    x = _cuda.torch.empty(6, 24)
    assert forward(x.normal_(), torch.empty(6, 24), 6).isfinite().all()
    y = forward(x, _cuda.torch.empty(6, 24), 6)
    assert forward(y, torch.empty(6, 24), 6).isfinite().all()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("heads_first", [False, True])
def test_what_attention_allocates_has_no_values_yet(heads_first):
    """Or a kernel that leaves rows unwritten could be lucky."""
    assert _cuda_attention._empty_like(torch.randn(2, 3, 4, 8), heads_first).isnan().all()


def test_afterwards_everything_is_as_before():
    names = {"_cuda": ("_C", "torch", "address", "place")}
    before = [getattr(_cuda, name) for name in names["_cuda"]]
    x = torch.randn(3, 8)
    with emulated.emulated(1):
        assert "cuda" in _backend.backends_of("layer_norm", "cpu")
        with bertkern.backend("cuda"):
            bertkern.layer_norm(x)
    assert [getattr(_cuda, name) for name in names["_cuda"]] == before
    if not torch.cuda.is_available():
        assert "cuda" not in _backend.backends_of("layer_norm", "cpu")
    with bertkern.backend("cuda"), pytest.raises(NotImplementedError, match="on cpu"):
        bertkern.layer_norm(x)


def test_the_default_backend_is_what_it_was():
    x = torch.randn(3, 8)
    expected = bertkern.layer_norm(x)
    with emulated.emulated(1):
        assert torch.equal(bertkern.layer_norm(x), expected)
        assert _backend.implementation("layer_norm", "_fwd", x).__module__ != _cuda.__name__


def test_a_build_is_made_once():
    module = build.build()
    before = {path: path.stat().st_mtime_ns for path in build.BUILD.glob("*.o")}
    assert build.build() == module
    assert {path: path.stat().st_mtime_ns for path in build.BUILD.glob("*.o")} == before
