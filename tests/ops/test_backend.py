"""Who computes: forcing, reasons, and errors that say why."""

import subprocess
import sys

import pytest
import torch

import bertkern
from bertkern.ops import _backend


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="backend='metal': allowed are cuda, triton, cpu, reference"
    ):
        bertkern.backend("metal")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variable as if Python had started with it."""

    def start_with(name):
        monkeypatch.setenv("BERTKERN_BACKEND", name)
        _backend._environment_backend.cache_clear()

    yield start_with
    monkeypatch.undo()
    _backend._environment_backend.cache_clear()


def test_environment_is_checked(environment):
    environment("fast")
    with pytest.raises(ValueError, match="BERTKERN_BACKEND='fast'"):
        bertkern.layer_norm(torch.zeros(2, 4))


def test_environment_forces(environment):
    environment("reference")
    function = _backend.implementation("attention", "_fwd", torch.zeros(1))
    assert function.__module__ == "bertkern.reference.attention"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_impossible_choice_says_why():
    with (
        bertkern.backend("cuda"),
        pytest.raises(NotImplementedError, match="cuda tensors, not cpu"),
    ):
        bertkern.layer_norm(torch.zeros(2, 4))


def test_the_innermost_block_wins_and_is_undone():
    x = torch.zeros(2, 4)
    with bertkern.backend("triton"), bertkern.backend("reference"):
        assert "reference" in _backend.implementation("layer_norm", "_fwd", x).__module__
    assert _backend._forced is None


def test_float64_is_the_reference_whatever_is_forced():
    with bertkern.backend("triton"):
        function = _backend.implementation("linear", "_fwd", torch.zeros(1, dtype=torch.float64))
    assert function.__module__ == "bertkern.reference.linear"


def test_every_backend_has_the_same_functions():
    for name, ops in _backend._OPS.items():
        if _backend.unusable(name, "cuda" if torch.cuda.is_available() else "cpu"):
            continue
        for op in ops:
            for direction in [""] if op in ("dropout", "attention_decode") else ["_fwd", "_bwd"]:
                assert callable(_backend._function(name, op, op + direction))


def test_info_names_every_backend_and_a_reason_for_each_gap():
    found = bertkern.info()
    assert [b.name for b in found.backends] == list(_backend.BACKENDS)
    for one in found.backends:
        assert one.devices or one.reasons
        assert all(one.reasons.values())
    assert found.versions["bertkern"] == bertkern.__version__
    assert "backends" in str(found)


def test_triton_without_interpreter_says_how():
    code = (
        "import torch, bertkern\n"
        "with bertkern.backend('triton'): bertkern.layer_norm(torch.zeros(2, 4))"
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the tensors below are on the cpu")
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "TRITON_INTERPRET=1" in run.stderr


def test_backends_of_an_op_in_the_order_in_which_they_are_asked(monkeypatch):
    monkeypatch.setattr(_backend, "unusable", lambda name, device_type: None)
    assert _backend.backends_of("layer_norm", "cuda") == ["cuda", "triton", "reference"]
    assert _backend.backends_of("ffn", "cpu") == ["cpu", "reference"]
    monkeypatch.setattr(
        _backend, "unusable", lambda name, _: "no driver" if name == "cuda" else None
    )
    assert _backend.backends_of("layer_norm", "cuda") == ["triton", "reference"]


@pytest.fixture
def tuned(monkeypatch):
    """A GPU of such a capability, on which `bertkern tune` stored such rows."""

    def clear():
        for cached in (_backend._choose, _backend._slower):
            cached.cache_clear()

    def device(capability, rows):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(_backend, "triton_interpreted", lambda: False)
        tuning_file = pytest.importorskip("bertkern.kernels.tuning_file")
        monkeypatch.setattr(tuning_file, "rows_of_this_gpu", lambda: rows)
        clear()
        return torch.device("cuda", 7)

    yield device
    clear()


@pytest.mark.parametrize(
    ("capability", "broken", "dtype", "head_dim", "aligned", "module"),
    [
        ((8, 0), (), torch.float16, 64, True, "bertkern.ops._cuda_attention"),
        ((8, 9), (), torch.bfloat16, 8, True, "bertkern.ops._cuda_attention"),
        ((9, 0), (), torch.float16, 64, True, "bertkern.kernels.attention"),  # it has wgmma
        ((9, 0), ("triton",), torch.float16, 64, True, "bertkern.ops._cuda_attention"),
        ((8, 0), ("cuda",), torch.float16, 64, True, "bertkern.kernels.attention"),
        ((8, 0), (), torch.float32, 64, True, "bertkern.kernels.attention"),
        ((8, 0), (), torch.float16, 20, True, "bertkern.kernels.attention"),
        ((8, 0), (), torch.float16, 136, True, "bertkern.kernels.attention"),
        ((8, 0), (), torch.float16, 64, False, "bertkern.kernels.attention"),
        ((9, 0), ("triton", "cuda"), torch.float16, 64, True, "bertkern.reference.attention"),
    ],
)
def test_who_computes_attention_on_a_gpu(
    monkeypatch, tuned, capability, broken, dtype, head_dim, aligned, module
):
    monkeypatch.setattr(_backend, "unusable", lambda name, _: "broken" if name in broken else None)
    assert who_computes(tuned(capability, {}), "_fwd", dtype, head_dim, aligned) == module


@pytest.mark.parametrize(
    ("capability", "rows", "direction", "dtype", "head_dim", "aligned", "name"),
    [
        ((9, 0), {"attention_fwd/2/64": "cuda"}, "_fwd", torch.bfloat16, 64, True, "cuda"),
        ((9, 0), {"attention_fwd/2/64": "cuda"}, "_fwd", torch.float16, 40, True, "cuda"),
        ((9, 0), {"attention_fwd/2/64": "cuda"}, "_fwd", torch.float16, 72, True, "triton"),
        ((9, 0), {"attention_fwd/2/64": "cuda"}, "_bwd", torch.bfloat16, 64, True, "triton"),
        ((9, 0), {"attention_fwd/2/64": "cuda"}, "_fwd", torch.float32, 64, True, "triton"),
        ((9, 0), {"attention_fwd/2/64": "cuda"}, "_fwd", torch.bfloat16, 64, False, "triton"),
        ((8, 0), {"attention_bwd/2/128": "triton"}, "_bwd", torch.bfloat16, 128, True, "triton"),
        ((8, 0), {"attention_bwd/2/128": "triton"}, "_bwd", torch.bfloat16, 96, True, "cuda"),
        ((8, 0), {"attention_fwd/2/64": [64, 64, 4, 2]}, "_fwd", torch.float16, 64, True, "cuda"),
    ],
)
def test_what_was_measured_on_the_gpu_decides(
    monkeypatch, tuned, capability, rows, direction, dtype, head_dim, aligned, name
):
    monkeypatch.setattr(_backend, "unusable", lambda name, _: None)
    module = {"cuda": "bertkern.ops._cuda_attention", "triton": "bertkern.kernels.attention"}[name]
    assert who_computes(tuned(capability, rows), direction, dtype, head_dim, aligned) == module


def who_computes(device, direction, dtype, head_dim, aligned):
    chosen = _backend._choose("attention", direction, dtype, device, head_dim, 0, aligned, None)
    return chosen.__module__
