"""The ceilings: floors by hand, and what is measured on this machine at small sizes."""

import math

import pytest
import torch
from bertkern.benchmarks import limits
from bertkern.benchmarks.limits import Limits, measure_limits

CPU = torch.device("cpu")
FACTS = {"device": "test"}


@pytest.fixture
def by_hand():
    """A cache of 16 GB/s, a memory of 1 GB/s, and two rates."""
    made = Limits()
    made.copies = [(1e4, 16e9), (1e6, 4e9), (1e8, 1e9)]
    made.rates = {"float32": 1e10, "bfloat16": 2e10}
    return made


@pytest.mark.parametrize(
    ("moved", "bandwidth"),
    [
        *((1.0, 16e9), (1e4, 16e9), (1e6, 4e9), (1e8, 1e9), (1e12, 1e9), (0.0, 16e9)),
        *((1e5, 8e9), (1e7, 2e9)),  # halfway in the logarithm of both
        (1e4 * 100**0.25, 16e9 * 0.25**0.25),
    ],
)
def test_bandwidth_is_interpolated_between_the_sizes_that_were_measured(by_hand, moved, bandwidth):
    assert by_hand.bandwidth(moved) == pytest.approx(bandwidth)
    assert by_hand.bandwidth(moved, "graph") == pytest.approx(bandwidth)


def test_cold_caches_are_filled_from_memory(by_hand):
    for moved in (1.0, 1e4, 1e5, 1e6, 1e8, 1e12):
        assert by_hand.bandwidth(moved, "cold") == 1e9


def test_the_floor_is_the_larger_of_both(by_hand):
    assert by_hand.floor(1e6, 1.0, "float32") == pytest.approx(1e6 / 4e9)
    assert by_hand.floor(1e6, 1.0, "float32", "cold") == pytest.approx(1e6 / 1e9)
    assert by_hand.floor(1e6, 1e10, "float32") == pytest.approx(1.0)
    assert by_hand.floor(1e6, 1e10, "bfloat16") == pytest.approx(0.5)
    assert by_hand.floor(0.0, 1e10, "float32") == pytest.approx(1.0)
    assert by_hand.floor(1e6, 0.0, "float32") == pytest.approx(1e6 / 4e9)


def test_there_is_no_floor_where_nothing_is_known(by_hand):
    assert by_hand.floor(0.0, 0.0, "float32") is None
    assert by_hand.floor(1e6, 1e6, "float16") is None
    assert by_hand.floor(1e6, 1e6, "") is None


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(limits, "COPIES", (2**14, 2**16, 2**18))
    monkeypatch.setattr(limits, "PRODUCT", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(limits, "SAMPLES", 3)


def test_limits_of_this_machine(small):
    measured = measure_limits(CPU, ("float32", "bfloat16"), FACTS, quick=True)
    sizes = [size for size, _ in measured.copies]
    assert sizes == [2**14, 2**16]  # the largest is for GPUs
    assert all(0 < rate < 1e14 for _, rate in measured.copies)
    assert {"float32", "bfloat16"} <= set(measured.rates)
    assert all(rate > 0 for rate in measured.rates.values())
    for row in measured.rows:
        assert row.suite == "limits"
        assert row.correct
        assert row.provenance == FACTS
        assert 0 < row.p20_s <= row.median_s <= row.p80_s
        assert bool(row.flops) != bool(row.bytes)
    by_op = {(row.op, row.dtype): row for row in measured.rows if row.op != "copy"}
    assert by_op["matrix product", "float32"].shape == {"M": 32, "N": 32, "K": 32}
    assert by_op["matrix product", "float32"].flops == 2 * 32**3
    assert measured.floor(1e3, 1e3, "float32") > 0


def test_a_copy_reads_and_writes_together_what_its_row_says(small, monkeypatch):
    moved = []

    def counting(calls, *arguments):
        (call,) = calls.values()
        out = call()
        moved.append(2 * out.numel() * out.element_size())
        return {name: [1.0] * 3 for name in calls}

    monkeypatch.setattr(limits, "measure", counting)
    rows = measure_limits(CPU, (), FACTS, quick=True).rows
    copies = [row for row in rows if row.op == "copy"]
    assert [row.bytes for row in copies] == moved == [2**14, 2**16]
    assert [row.shape for row in copies] == [{"bytes": 2**14}, {"bytes": 2**16}]


@pytest.mark.parametrize("fma", [1e9, 1e15], ids=["product is faster", "registers are faster"])
def test_every_ceiling_can_be_read_from_a_row(small, monkeypatch, fma):
    spread = [fma, fma * 0.6, fma * 0.7, fma * 0.8, fma * 0.9]
    monkeypatch.setattr(limits, "_fma_rates", lambda: {"float32": spread, "int8": spread})
    measured = measure_limits(CPU, ("float32",), FACTS, quick=True)
    for size, bandwidth in measured.copies:
        (row,) = [r for r in measured.rows if r.op == "copy" and r.bytes == size]
        assert bandwidth == pytest.approx(row.bytes / row.p20_s)
    for dtype, rate in measured.rates.items():
        rates = [r.flops / r.p20_s for r in measured.rows if r.flops and r.dtype == dtype]
        assert rate == pytest.approx(max(rates)), dtype


def test_registers_are_no_ceiling_where_the_extension_is_missing(small, monkeypatch):
    monkeypatch.setattr(limits, "_fma_rates", dict)
    measured = measure_limits(CPU, ("float32",), FACTS, quick=True)
    assert set(measured.rates) == {"float32"}
    assert not [row for row in measured.rows if row.op == "multiply-add"]
    assert math.isfinite(measured.floor(1.0, 1.0, "float32"))
