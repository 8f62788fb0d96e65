"""bertkern tune, without a GPU: refusals, what is stored, and a run with a made-up clock."""

import json

import pytest
import torch

pytest.importorskip("triton")

from bertkern.kernels import tuning, tuning_file

from bertkern.ops import _tuning

GPU = "Some GPU"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    tuning.reread()


@pytest.fixture
def clock(monkeypatch):
    """A GPU on which every tile of 4 warps is twice as fast."""

    class Clock:
        def __init__(self, device):
            pass

        def __call__(self, key, tile, shipped):
            return 10.0 if tile.warps == 4 else 20.0

    class BackendsClock:
        """CUDA's forward is faster than Triton's, its backward is wrong."""

        def __init__(self, device):
            pass

        def __call__(self, name, direction, head_dim):
            if name == "cuda" and direction == "bwd":
                raise _tuning.Rejected("its result differs from Triton's at 128 tokens")
            return {"cuda": 10.0, "triton": 20.0}[name]

    monkeypatch.setattr(_tuning, "this_gpu", lambda device: (GPU, "sm90"))
    monkeypatch.setattr(_tuning, "OnGpu", Clock)
    monkeypatch.setattr(_tuning, "BackendsOnGpu", BackendsClock)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(refused, cache):
    assert "torch sees none here" in refused("tune")
    assert not cache.exists()


def test_wrong_options_name_those_allowed(refused):
    assert "use attention," in refused("tune", "--op", "convolution")
    assert "use 16, 32 or all" in refused("tune", "--bits", "8")


def test_measures_stores_shows_and_clears(run, clock, cache):
    result = run("tune", "--op", "attention", "--bits", "16", "--head-dim", "64")
    assert result.exit_code == 0, result.output
    path = tuning_file.path_of(GPU)
    stored = json.loads(path.read_text())
    assert stored["gpu"] == GPU
    rows = [key for key, tile in _tuning.rows(("attention",), "sm90", 2, 64) if tile.warps == 8]
    assert set(stored["rows"]) == {str(key) for key in rows} != set()
    assert all(row["tile"][2] == 4 for row in stored["rows"].values())
    for key in rows:
        assert str(key) in result.stdout
    shown = run("tune", "--show")
    assert shown.exit_code == 0
    assert str(path) in shown.stdout
    assert "attention/fwd" in shown.stdout
    assert run("tune", "--clear").exit_code == 0
    assert not list(cache.glob("*.json"))
    assert "nothing is stored" in run("tune", "--show").stderr


def test_backends_of_attention_are_stored_and_shown(run, clock, cache, monkeypatch):
    monkeypatch.setattr(_tuning, "cannot", lambda *call: None)  # as if CUDA's kernels ran here
    result = run("tune", "--op", "attention", "--bits", "16", "--head-dim", "64")
    assert result.exit_code == 0, result.output
    assert "attention_fwd/2/64: cuda (triton 20.0 µs, cuda 10.0 µs)" in result.stdout
    assert "attention_bwd/2/64: triton (triton 20.0 µs, cuda its result differs" in result.stdout
    monkeypatch.setattr(tuning_file, "gpu_name", lambda: GPU)
    tuning.reread()
    rows = tuning_file.rows_of_this_gpu()
    assert rows["attention_fwd/2/64"] == "cuda"
    assert rows["attention_bwd/2/64"] == "triton"
    assert len(rows["attention/fwd/2/sm90/64"]) == 4
    shown = run("tune", "--show").stdout
    assert "attention_fwd/2/64" in shown
    assert "cuda" in shown


def test_a_size_without_a_row_is_refused(refused, clock):
    assert "no row" in refused("tune", "--head-dim", "65")


def test_a_damaged_file_is_shown_as_such_and_cleared(run, refused, cache):
    cache.mkdir()
    (cache / "tuning-x-1.json").write_text("{")
    result = run("tune", "--show")
    assert result.exit_code == 1
    assert "damaged" in result.stderr
    assert run("tune", "--clear").exit_code == 0
    assert not list(cache.iterdir())
