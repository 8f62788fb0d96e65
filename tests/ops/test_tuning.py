"""bertkern tune's measuring, with a made-up clock in place of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from bertkern.kernels import tuning

from bertkern.ops import _backend, _tuning

KEY = tuning.Key("attention", "fwd", 2, "sm90", 64)
SHIPPED = tuning.ATTENTION["fwd", 2, "sm90"][64]


def run(measure, stored=None, key=KEY, shipped=SHIPPED):
    stored, writes = {} if stored is None else stored, []
    rows = list(
        _tuning.tune([(key, shipped)], measure, stored, lambda: writes.append(dict(stored)))
    )
    assert len(rows) == 1
    return rows[0], stored, writes


def test_the_fastest_tile_is_stored_with_both_times():
    fast = SHIPPED._replace(warps=4)
    row, stored, writes = run(lambda key, tile, shipped: 50.0 if tile == fast else 100.0)
    assert row.best == fast
    assert row.wins
    assert stored[str(KEY)]["tile"] == list(fast[:-1])
    assert stored[str(KEY)]["microseconds"] == 50
    assert stored[str(KEY)]["shipped_microseconds"] == 100
    assert writes == [stored]
    assert tuning.valid(KEY, stored[str(KEY)]["tile"])


def test_a_gain_within_the_noise_is_not_stored_and_an_old_row_leaves():
    stored = {str(KEY): {"tile": [64, 64, 4, 2]}, "other": 1}
    row, stored, _ = run(lambda key, tile, shipped: 100.0 if tile == shipped else 98.0, stored)
    assert not row.wins
    assert stored == {"other": 1}


def test_rejected_candidates_never_win():
    def measure(key, tile, shipped):
        if tile != shipped:
            raise _tuning.Rejected("out of shared memory")
        return 100.0

    row, stored, _ = run(measure)
    assert (row.best, stored) == (SHIPPED, {})
    assert row.rejected == row.tried > 0


def test_an_error_of_the_shipped_tile_is_not_hidden():
    with pytest.raises(RuntimeError, match="no launch"):
        run(lambda *_: (_ for _ in ()).throw(RuntimeError("no launch")))


def test_rows_before_an_interruption_are_kept():
    writes, calls = [], []

    def measure(key, tile, shipped):
        if key.limit == 128:
            raise KeyboardInterrupt
        calls.append(tile)
        return 10.0 if tile == calls[-1] != shipped else 20.0

    chosen = _tuning.rows(("attention",), "sm90", 2, 0)
    stored = {}
    with pytest.raises(KeyboardInterrupt):
        list(_tuning.tune(chosen, measure, stored, lambda: writes.append(dict(stored))))
    assert writes
    assert writes[-1] == stored
    assert stored


@pytest.mark.parametrize(("key", "shipped"), list(tuning.shipped())[::7])
def test_candidates_are_a_handful_of_valid_neighbours(key, shipped):
    found = list(_tuning.candidates(key, shipped))
    assert len(found) <= 10
    assert len(set(found)) == len(found)
    for tile in found:
        assert tile != shipped
        assert tuning.valid(key, tile[:-1])
        assert sum(a != b for a, b in zip(tile, shipped, strict=True)) == 1


def test_rows_are_chosen_by_op_size_and_dtype():
    for key, _ in _tuning.rows(("attention",), "sm90", 2, 64):
        assert (key.op, key.bytes, key.architecture, key.limit) == ("attention", 2, "sm90", 64)
    # LayerNorm's rows serve every dtype.
    assert _tuning.rows(("layer_norm",), "sm80", 4, 1024)
    with pytest.raises(ValueError, match="no row of attention"):
        _tuning.rows(("attention",), "sm90", 2, 63)


def test_every_op_has_a_workload():
    assert set(_tuning.OPS) == set(_tuning._WORKLOADS)
    assert set(_tuning.OPS) <= set(tuning.TABLES)


def choices(times, chosen=(("fwd", 64), ("bwd", 64)), stored=None):
    """What choose_backends yields and stores; times: {(backend, pass): microseconds or error}."""
    stored, writes = {} if stored is None else stored, []

    def measure(name, direction, head_dim):
        found = times[name, direction]
        if isinstance(found, Exception):
            raise found
        return found

    found = list(
        _tuning.choose_backends(list(chosen), measure, stored, lambda: writes.append(dict(stored)))
    )
    return found, stored, writes


def test_each_pass_goes_to_the_faster_backend():
    times = {("triton", "fwd"): 20.0, ("cuda", "fwd"): 15.0}
    times |= {("triton", "bwd"): 40.0, ("cuda", "bwd"): 41.0}
    found, stored, writes = choices(times, stored={"other": 1})
    assert [choice.backend for choice in found] == ["cuda", "triton"]
    row = stored["attention_fwd/2/64"]
    assert (row["backend"], row["microseconds"]) == ("cuda", 15)
    assert (row["other"], row["other_microseconds"]) == ("triton", 20)
    assert stored["attention_bwd/2/64"]["backend"] == "triton"
    assert stored["other"] == 1
    assert len(writes) == 2  # one a row: Ctrl-C keeps what is there
    assert "attention_bwd/2/64" not in writes[0]


def test_a_kernel_that_disagrees_is_not_chosen():
    times = {("triton", "fwd"): 20.0, ("cuda", "fwd"): _tuning.Rejected("its result differs")}
    (choice,), stored, _ = choices(times, [("fwd", 32)])
    assert (choice.backend, choice.refused) == ("triton", "its result differs")
    assert stored["attention_fwd/2/32"]["backend"] == "triton"
    assert stored["attention_fwd/2/32"]["other_microseconds"] is None


def test_an_error_of_triton_is_not_hidden_by_a_choice():
    with pytest.raises(RuntimeError, match="no launch"):
        choices({("triton", "fwd"): RuntimeError("no launch")})


def test_backends_are_compared_where_both_are_there(monkeypatch):
    device = torch.device("cuda", 3)
    monkeypatch.setattr(_backend, "unusable", lambda name, device_type: None)
    dims = _backend.MEASURED_HEAD_DIMS
    assert _tuning.backend_rows(0, 0, device) == [(p, d) for d in dims for p in ("fwd", "bwd")]
    assert _tuning.backend_rows(2, 64, device) == [("fwd", 64), ("bwd", 64)]
    assert _tuning.backend_rows(4, 0, device) == []
    monkeypatch.setattr(_backend, "unusable", lambda name, device_type: "no driver")
    assert _tuning.backend_rows(0, 0, device) == []
