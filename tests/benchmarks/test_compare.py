"""What counts as a regression between two result files, and what does not."""

import json

import pytest
from bertkern.benchmarks import compare
from bertkern.benchmarks.row import Row, write_rows


def row(peer, median, *, spread=0.01, error="", device="cpu A", **changes):
    values = {
        **{"suite": "ops", "op": "attention", "direction": "forward", "dtype": "float32"},
        **{"shape": {"B": 8, "S": 128}, "samples": 25, "flops": 1e9, "bytes": 1e6},
    }
    return Row(
        **(values | changes),
        peer=peer,
        median_s=median,
        p20_s=median and median * (1 - spread),
        p80_s=median and median * (1 + spread),
        correct=not error,
        error=error,
        provenance={"device": device, "commit": "c0ffee", "date": "2026-01-02"},
    )


OLD = [row("bertkern", 1e-3), row("torch", 2e-3), row("eager", 4e-3)]


@pytest.fixture
def compared(tmp_path, capsys):
    """Writes both files and compares them: exit code, stdout, stderr."""

    def run(old, new, *arguments):
        paths = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
        for path, rows in zip(paths, (old, new), strict=True):
            path.unlink(missing_ok=True)
            write_rows(rows, path)
        code = compare.main([*map(str, paths), *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_same_file_has_no_regression(compared):
    code, out, _ = compared(OLD, OLD)
    assert code == 0
    assert "1 case compared, 2 ratios to 2 peers: 0 regressions, 0 improvements" in out
    assert "1 the same" in out


def test_a_slower_bertkern_is_a_regression(compared):
    code, out, _ = compared(OLD, [row("bertkern", 1.2e-3), *OLD[1:]])
    assert code == 1
    assert "regressions (time of the peer" in out
    line = next(line for line in out.splitlines() if line.startswith("attention"))
    assert line.split()[-4:] == ["2.00x", "1.67x", "-16.7%", "2.0%"]  # noise: sqrt(4) * 1 %
    assert "1 regression," in out


def test_a_slower_machine_is_none(compared):
    slower = [row(r.peer, 3 * r.median_s) for r in OLD]
    assert compared(OLD, slower)[0] == 0


def test_a_fall_within_the_noise_is_none(compared):
    noisy = [row("bertkern", 1.2e-3, spread=0.2), row("torch", 2e-3), row("eager", 4e-3)]
    assert compared(OLD, noisy)[0] == 0
    quiet = [row("bertkern", 1.2e-3, spread=0.1), row("torch", 2e-3), row("eager", 4e-3)]
    assert compared(OLD, quiet)[0] == 1


def test_a_fall_within_the_threshold_is_none(compared):
    new = [row("bertkern", 1.04e-3), *OLD[1:]]
    assert compared(OLD, new)[0] == 0
    assert compared(OLD, new, "--threshold", "0.01")[0] == 1
    assert compared(OLD, [row("bertkern", 1.2e-3), *OLD[1:]], "--threshold", "0.3")[0] == 0


def test_a_peer_that_became_faster_is_named_and_not_counted(compared):
    code, out, _ = compared(OLD, [OLD[0], row("torch", 1e-3), OLD[2]])
    assert code == 0
    changed = out.partition("peer changed")[2]
    assert "torch" in changed.splitlines()[2]
    assert "eager" not in changed
    assert "1 where a peer changed" in out


def test_with_one_peer_only_a_fall_is_a_regression(compared):
    assert compared(OLD[:2], [OLD[0], row("torch", 1e-3)])[0] == 1


def test_an_improvement_is_named(compared):
    code, out, _ = compared(OLD, [row("bertkern", 5e-4), *OLD[1:]])
    assert code == 0
    assert "improvements (time" in out
    assert "1 improvement," in out


@pytest.mark.parametrize(
    "now",
    [
        [row("bertkern", None, error="wrong: output 0 differs by 0.5")],
        [row("bertkern", 1e-4, error="wrong: output 0 differs by 0.5")],
        [row("bertkern", None, error="not run: no kernel")],
        [],
    ],
    ids=["wrong", "wrong and fast", "not run", "no row"],
)
def test_an_output_that_is_no_longer_right_is_a_regression(compared, now):
    code, out, _ = compared(OLD, [*now, *OLD[1:]])
    assert code == 1
    assert "1 regression (1 no longer measured correctly)" in out
    assert (now[0].error if now else "no row") in out


def test_wrong_peers_are_not_compared_with(compared):
    wrong = row("torch", 1e-4, error="wrong: output 0")
    code, out, _ = compared(OLD, [OLD[0], wrong, OLD[2]])
    assert code == 0
    assert "1 ratio to 1 peer" in out


def test_each_of_our_rows_is_a_case(compared):
    old = [*OLD, row("bertkern [triton]", 1e-3)]
    code, out, _ = compared(old, [*OLD, row("bertkern [triton]", 2e-3)])
    assert code == 1
    assert "2 cases compared" in out
    assert "bertkern [triton]" in out.partition("regressions")[2].splitlines()[2]


def test_nothing_in_common(compared):
    code, out, err = compared(OLD, [row(r.peer, 1e-3, op="ffn") for r in OLD])
    assert (code, out) == (2, "")
    assert err.startswith("nothing to compare")
    assert len(err.splitlines()) == 1
    # in common, but against nobody
    assert compared(OLD, OLD[:1])[0] == 2
    # ceilings are the machine's
    limits = [row(r.peer, r.median_s, suite="limits") for r in OLD]
    assert compared(limits, limits)[0] == 2


def test_a_file_that_cannot_be_read(compared, tmp_path, capsys):
    compared(OLD, OLD)
    (tmp_path / "broken.jsonl").write_text('{"suite": "ops"\n')
    for name in ("broken.jsonl", "missing.jsonl"):
        code = compare.main([str(tmp_path / "old.jsonl"), str(tmp_path / name)])
        err = capsys.readouterr().err
        assert code == 2
        assert name in err
        assert len(err.splitlines()) == 1


def test_cases_of_one_file_are_counted(compared):
    extra = [row(r.peer, 1e-3, op="ffn") for r in OLD]
    code, out, _ = compared([*OLD, *extra], OLD)
    assert code == 0
    assert "1 in one file only" in out


def test_other_devices_are_warned_of(compared):
    assert "warning" not in compared(OLD, OLD)[1]
    out = compared(OLD, [row(r.peer, r.median_s, device="cpu B") for r in OLD])[1]
    assert "warning: different devices, cpu A and cpu B" in out


def test_the_order_of_a_shapes_keys_does_not_matter(compared, tmp_path):
    compared(OLD, OLD)
    lines = []
    for text in (tmp_path / "old.jsonl").read_text().splitlines():
        values = json.loads(text)
        values["shape"] = dict(reversed(values["shape"].items()))
        lines.append(json.dumps(values))
    (tmp_path / "turned.jsonl").write_text("\n".join(lines))
    assert compare.main([str(tmp_path / "old.jsonl"), str(tmp_path / "turned.jsonl")]) == 0


def test_a_second_measurement_is_a_second_group():
    groups = compare.groups_of([*OLD, *OLD, row("bertkern", 5e-3, curve="S")])
    assert [len(group.rows) for group in groups] == [3, 3, 1]
    assert len(compare.once(groups)) == 1
    assert groups[0].speedup == pytest.approx(2)


def test_ours_is_the_one_that_is_named_so():
    triton, default = row("bertkern [triton]", 1e-4), row("bertkern", 1e-3)
    assert compare.Group([triton, default]).own is default
    packed = row("bertkern packed", 5e-5)
    assert compare.Group([triton, packed]).own is packed


def many(own, peers_of, count=30):
    """Cases with one time of ours and those of two peers, all without noise of their own."""
    rows = []
    for i in range(count):
        first, second = peers_of(i)
        for peer, seconds in (("bertkern", own(i)), ("first", first), ("second", second)):
            rows.append(row(peer, seconds, shape={"N": i}, spread=0.0))
    return rows


def test_what_two_peers_do_to_each_other_is_noise():
    """Ours is 15 % slower in one case. It counts where peers keep still, not where they wander."""
    old = many(lambda i: 1.0, lambda i: (1.0, 1.0))
    slower = {"own": lambda i: 1.15 if i == 3 else 1.0}
    still = many(slower["own"], lambda i: (1.0, 1.0))
    wandering = many(slower["own"], lambda i: (1.0, 1.3 if i % 2 else 1.0))
    assert compare.drift_of(old, still) == 0.0
    assert compare.drift_of(old, wandering) == pytest.approx(1 - 1 / 1.3)
    kinds = [v.kind for v in compare.judge(old, still)]
    assert kinds.count("regression") == 1
    assert "regression" not in [v.kind for v in compare.judge(old, wandering)]


def test_few_peers_tell_no_drift():
    old = many(lambda i: 1.0, lambda i: (1.0, 1.0), count=5)
    new = many(lambda i: 1.0, lambda i: (1.0, 2.0), count=5)
    assert compare.drift_of(old, new) == 0.0
