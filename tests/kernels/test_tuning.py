"""The tuning table: every row is there, and the user's file takes a row's place or is refused."""

import json

import pytest

pytest.importorskip("triton")

from bertkern.kernels import tuning, tuning_file

from bertkern._version import __version__

GPU = "NVIDIA H100 80GB HBM3"
KEY = tuning.Key("attention", "fwd", 2, "sm90", 64)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, on a machine with one GPU."""
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_file, "gpu_name", lambda: GPU)
    tuning.reread()
    yield tuning_file.path_of(GPU)
    monkeypatch.undo()
    tuning.reread()


def store(rows):
    path = tuning_file.path_of(GPU)
    tuning_file.write(path, GPU, {str(key): {"tile": list(tile)} for key, tile in rows.items()})
    tuning.reread()


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize(
    "kernel", ["fwd", "fwd_short", "bwd_dq", "bwd_dkdv", "bwd_short", "bwd_dbias"]
)
def test_every_pass_and_head_dim_has_a_row_of_its_own(kernel, head_dim, itemsize, architecture):
    rows = tuning.ATTENTION[kernel, itemsize, architecture]
    assert tuning.attention(kernel, head_dim, itemsize, architecture) == rows[head_dim]
    assert tuning.attention(kernel, head_dim - 1, itemsize, architecture) == rows[head_dim]


def test_every_row_is_valid_and_says_how_it_was_chosen():
    rows = dict(tuning.shipped())
    assert len(rows) > 200
    for key, tile in rows.items():
        assert tuning.valid(key, tile[:-1]), (str(key), tile)
        assert tile.measured
    assert len({str(key) for key in rows}) == len(rows)


def test_a_wide_row_is_read_in_pieces_and_a_narrow_one_whole():
    assert tuning.layer_norm("fwd", 768, "sm90").block_c == 1024
    assert tuning.layer_norm("fwd", 5, "sm90").block_c == 16
    for kernel in ("fwd", "bwd"):
        widest = max(tuning.LAYER_NORM[kernel, "sm90"])
        assert tuning.layer_norm(kernel, widest, "sm90").block_c == widest
        assert tuning.layer_norm(kernel, 65536, "sm90").block_c == widest


def test_options_tell_rows_apart_and_dtypes_that_do_not_know_them_ignore_them():
    rows = tuning.ATTENTION
    assert tuning.attention("fwd", 64, 2, "sm90", biased=True) == rows["fwd_biased", 2, "sm90"][64]
    assert tuning.attention("fwd", 64, 4, "sm90", biased=True) == rows["fwd", 4, "sm90"][64]
    assert (
        tuning.attention("fwd", 64, 4, "sm90", precision="tf32") == rows["fwd_tf32", 4, "sm90"][64]
    )
    assert tuning.attention("fwd", 64, 2, "sm90", precision="tf32") == rows["fwd", 2, "sm90"][64]
    dbias = rows["bwd_dbias", 2, "sm90"][64]
    assert tuning.attention("bwd_dbias", 64, 2, "sm90", biased=True) == dbias
    small = tuning.attention("bwd_dq", 64, 4, "interpreter", True, "tf32")
    assert small == rows["bwd_dq", 4, "interpreter"][256]


def test_the_users_row_takes_the_place_of_the_shipped_one(cache):
    shipped = tuning.attention("fwd", 64, 2, "sm90")
    store({KEY: (64, 32, 4, 2)})
    assert tuning.attention("fwd", 64, 2, "sm90") == (64, 32, 4, 2, "bertkern tune")
    assert tuning.attention("fwd", 40, 2, "sm90") == (64, 32, 4, 2, "bertkern tune")
    assert tuning.attention("fwd", 32, 2, "sm90") != (64, 32, 4, 2, "bertkern tune")
    assert tuning.attention("fwd", 64, 2, "sm80").measured != "bertkern tune"
    cache.unlink()
    tuning.reread()
    assert tuning.attention("fwd", 64, 2, "sm90") == shipped


def test_the_file_is_read_once(cache):
    store({KEY: (64, 32, 4, 2)})
    assert tuning.attention("fwd", 64, 2, "sm90").block_m == 64
    cache.unlink()
    assert tuning.attention("fwd", 60, 2, "sm90").block_m == 64


def test_the_interpreter_never_reads_it(cache):
    store({KEY._replace(architecture="interpreter", limit=256): (64, 64, 4, 1)})
    assert tuning.attention("fwd", 64, 2, "interpreter").block_m == 16


@pytest.mark.parametrize(
    "tile",
    [
        (96, 64, 8, 2),  # not a power of two
        (8, 64, 8, 2),  # less than one mma
        (64, 64, 3, 2),  # warps
        (64, 64, 8, 0),  # stages
        (64, 64, 8),
        (64, 64, 8, 2, 1),
        (64.0, 64, 8, 2),
        ("64", 64, 8, 2),
        (True, 64, 8, 2),
        None,
        64,
    ],
)
def test_a_row_that_no_kernel_could_run_is_not_taken(cache, tile):
    shipped = tuning.attention("fwd", 64, 2, "sm90")
    cache.parent.mkdir(parents=True)
    rows = {str(KEY): {"tile": tile}}
    cache.write_text(json.dumps({"bertkern": __version__, "rows": rows}))
    tuning.reread()
    assert tuning.attention("fwd", 64, 2, "sm90") == shipped


def test_a_row_cannot_move_the_border_between_the_length_classes(cache):
    key = KEY._replace(kernel="fwd_short")
    tile = tuning.attention("fwd_short", 64, 2, "sm90")
    assert not tuning.valid(key, (tile.block_m, tile.block_n // 2, tile.warps, tile.stages))
    assert not tuning.valid(tuning.Key("layer_norm", "fwd", 0, "sm90", 1024), (4, 512, 4))
    assert not tuning.valid(KEY._replace(limit=65), (64, 64, 4, 2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rows": {}}',
        '{"bertkern": "0", "rows": []}',
        '{"bertkern": "0", "rows": {"attention/fwd/2/sm90/64": {}}}',
        '{"bertkern": "0", "rows": {"attention/fwd/2/sm90/64": 1}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_file_is_warned_about_and_ignored(cache, text):
    shipped = tuning.attention("fwd", 64, 2, "sm90")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(text if isinstance(text, bytes) else text.encode())
    tuning.reread()
    with pytest.warns(UserWarning, match="damaged and ignored"):
        assert tuning.attention("fwd", 64, 2, "sm90") == shipped


def test_rows_of_another_version_are_warned_about_and_ignored(cache):
    shipped = tuning.attention("fwd", 64, 2, "sm90")
    store({KEY: (64, 32, 4, 2)})
    cache.write_text(cache.read_text().replace(f'"{__version__}"', '"0.0.0"'))
    tuning.reread()
    with pytest.warns(UserWarning, match=r"bertkern 0\.0\.0"):
        assert tuning.attention("fwd", 64, 2, "sm90") == shipped


def test_no_half_written_file_is_ever_in_place(cache, monkeypatch):
    store({KEY: (64, 32, 4, 2)})
    before = cache.read_text()
    with pytest.raises(TypeError):
        tuning_file.write(cache, GPU, {"x": {"tile": object()}})
    assert cache.read_text() == before
    assert list(cache.parent.iterdir()) == [cache], "the part that failed is left behind"


def test_a_trial_ends_with_its_block():
    shipped = tuning.attention("fwd", 64, 2, "sm90")

    def failing_trial():
        with tuning.trial(KEY, shipped._replace(block_m=16)):
            assert tuning.attention("fwd", 64, 2, "sm90").block_m == 16
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_trial()
    assert tuning.attention("fwd", 64, 2, "sm90") == shipped


def test_the_folder_is_the_users_to_choose(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BERTKERN_CACHE", raising=False)
    assert tuning_file.folder() == tmp_path / "bertkern"
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path / "own"))
    assert tuning_file.folder() == tmp_path / "own"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("BERTKERN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning_file.folder() == tmp_path / ".cache" / "bertkern"
    name = tuning_file.path_of("NVIDIA A100-SXM4/40GB", "3.7.1").name
    assert name == "tuning-NVIDIA-A100-SXM4-40GB-3.7.1.json"
