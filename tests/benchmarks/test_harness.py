"""The benchmark harness: a wrong output is shown as wrong, not timed; a row says all it should."""

import json

import pytest
import torch
from bertkern.benchmarks import harness, op_cases, run

CPU = torch.device("cpu")


def double_case(**peers):
    """A small case: y = 2 x, with the given peers."""
    return harness.Case(
        op="double",
        shape={"N": 4, "C": 8},
        dtype=torch.float32,
        inputs=op_cases.random((4, 8)),
        plain=lambda x: x + x,
        peers={name: harness.Peer(run) for name, run in peers.items()},
        flops={"forward": 32.0, "forward+backward": 64.0},
        bytes={"forward": 256.0, "forward+backward": 512.0},
    )


def rows_of(case):
    return {(r.peer, r.direction): r for r in harness.run_case(case, CPU, 3, {"device": "test"})}


def test_a_right_peer_is_timed():
    rows = rows_of(double_case(bertkern=lambda x: 2 * x))
    row = rows["bertkern", "forward"]
    assert row.correct
    assert not row.error
    assert 0 < row.p20_s <= row.median_s <= row.p80_s
    assert row.samples == 3


def test_a_wrong_output_is_wrong_and_not_timed():
    rows = rows_of(double_case(bertkern=lambda x: 2 * x, other=lambda x: 2.001 * x))
    row = rows["other", "forward"]
    assert not row.correct
    assert row.error.startswith("wrong: output")
    assert row.median_s is None
    assert rows["bertkern", "forward"].correct


def test_a_wrong_gradient_is_wrong():
    rows = rows_of(double_case(bertkern=lambda x: x + x.detach()))
    assert rows["bertkern", "forward"].correct
    assert rows["bertkern", "forward+backward"].error.startswith("wrong: gradient 1")


def test_a_peer_that_cannot_run_says_why():
    def refuse(x):
        raise NotImplementedError("no kernel for this")

    row = rows_of(double_case(bertkern=refuse))["bertkern", "forward"]
    assert row.error == "not run: no kernel for this"
    assert row.median_s is None


def test_rows_are_json_lines(tmp_path):
    rows = list(rows_of(double_case(bertkern=lambda x: 2 * x)).values())
    harness.write_rows(rows, tmp_path / "new" / "rows.jsonl")
    lines = (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2
    assert first["shape"] == {"N": 4, "C": 8}
    assert first["provenance"] == {"device": "test"}


def test_provenance_says_machine_versions_and_commit():
    facts = harness.provenance(CPU)
    assert {"device", "threads", "bertkern", "torch", "triton", "commit", "date"} <= set(facts)
    assert all(str(value) for value in facts.values())


def test_every_case_is_right_on_this_machine():
    """The suite's own shapes take a while; the same cases at small sizes."""
    small = [
        op_cases.attention(2, 24, torch.float32),
        op_cases.attention_varlen([5, 17, 1], torch.float32),
        op_cases.layer_norm(9, 32, torch.float32),
        op_cases.dropout_add_layer_norm(9, 32, torch.float32),
    ]
    for case in small:
        for row in harness.run_case(case, CPU, 1, {}):
            assert row.correct, f"{case.name} {row.peer} {row.direction}: {row.error}"


def test_mixed_lengths_never_change():
    lengths = op_cases.mixed_lengths(8, 512)
    assert lengths == op_cases.mixed_lengths(8, 512)
    assert (min(lengths), max(lengths)) == (32, 512)


def test_the_command_prints_a_table_and_writes_rows(tmp_path, capsys):
    code = run.main(
        ["--device", "cpu", "--samples", "1", "--only", "layer_norm[", "--results", str(tmp_path)]
    )
    assert code == 0
    assert "layer_norm" in capsys.readouterr().out
    (file,) = tmp_path.glob("ops-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["peer"] for row in rows} == {"bertkern", "torch"}


def test_an_unknown_dtype_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--dtype", "float7"])
    assert "allowed are float32, bfloat16, float16" in capsys.readouterr().err
