"""Rows: what was written is read back, what is not a row is named, and quantiles are of samples."""

import dataclasses
import json
from fractions import Fraction

import pytest
from bertkern.benchmarks.row import Row, geometric_mean, quantile, read_rows, write_rows


def row(**changes):
    values = {
        **{"suite": "ops", "op": "attention", "direction": "forward", "dtype": "float32"},
        **{"shape": {"B": 8, "S": "1..9"}, "peer": "bertkern", "samples": 3, "correct": True},
        **{"median_s": 2e-3, "p20_s": 1e-3, "p80_s": 3e-3, "flops": 1e9, "bytes": 1e6},
    }
    return Row(**(values | changes))


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    rows = [
        row(),
        row(peer="torch", median_s=None, error="not run: “ü”\u2028 x", provenance={"a": 1}),
    ]
    write_rows(rows[:1], path)
    write_rows([], path)
    write_rows(rows[1:], path)
    assert read_rows([path]) == rows
    assert read_rows([path, path]) == rows * 2
    assert len(path.read_text().split("\n")) == 3  # one line a row, and what is after the last


def test_a_line_is_json_for_every_reader(tmp_path):
    """NaN is none of JSON's values: an output of NaN must not make the file one of Python's."""

    def refuse(constant):
        raise ValueError(constant)

    write_rows([row(max_error=float("nan")), row(max_error=float("inf"))], tmp_path / "rows.jsonl")
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows([row()], path)
    path.write_text("\n" + path.read_text() + "\n  \n")
    assert read_rows([path]) == [row()]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "Expecting value"),
        (json.dumps(dataclasses.asdict(row()))[:-20], ""),  # the run was cut off
        *(("3", ""), ("null", ""), ("[1]", ""), ('"text"', ""), ("{}", "missing")),
        (
            json.dumps(dataclasses.asdict(row()) | {"colour": 1, "smell": 2}),
            "unknown colour, smell",
        ),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, why):
    path = tmp_path / "rows.jsonl"
    write_rows([row()], path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: not a measurement: .*{why}"):
        read_rows([path])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match=r"nothing\.jsonl"):
        read_rows([tmp_path / "nothing.jsonl"])


def test_rows_of_peers_agree_in_what_was_computed():
    assert row().what == row(peer="torch", median_s=1.0, note="x").what
    changes = [
        *({"suite": "models"}, {"op": "ffn"}, {"shape": {"B": 8, "S": 9}}, {"dtype": "bfloat16"}),
        *({"direction": "forward+backward"}, {"cache": "cold"}),
    ]
    assert len({row(**change).what for change in [{}, *changes]}) == 1 + len(changes)
    assert row().shape_text == "B=8 S=1..9"


def test_of_floor_and_rate():
    measured = row(floor_s=1e-3, items=100.0)
    assert measured.of_floor == pytest.approx(0.5)
    assert measured.rate == pytest.approx(5e4)
    for missing in (row(floor_s=1e-3, items=1.0, median_s=None), row()):
        assert missing.of_floor is None
        assert missing.rate is None


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_share_of_the_samples_lies_below_a_quantile(share):
    for count in range(1, 60):
        samples = [float(i * 7 % count) if count % 7 else float(count - i) for i in range(count)]
        found = quantile(samples, share)
        assert found in samples
        assert sum(s < found for s in samples) == int(Fraction(str(share)) * count)


def test_quantiles_rise_and_leave_the_samples_as_they_are():
    samples = [3.0, 1.0, 2.0, 5.0, 4.0, 4.0, 1.0]
    before = list(samples)
    assert quantile(samples, 0.2) <= quantile(samples, 0.5) <= quantile(samples, 0.8)
    assert quantile(samples, 0.5) == 3.0
    assert quantile(samples, 1.0) == 5.0
    assert samples == before


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)
