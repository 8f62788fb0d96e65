"""bertkern tune's measuring, with a made-up clock in place of a GPU."""

import pytest

pytest.importorskip("triton")

from bertkern.kernels import tuning

from bertkern.ops import _tuning

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
