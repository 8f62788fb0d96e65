"""The benchmarks' ceiling of multiply-adds."""

import pytest

from bertkern import _C

TYPES = ("float32", "bfloat16", "int8")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("type_name", TYPES)
def test_rates_are_those_of_a_processor_or_absent(type_name, threads):
    rates = _C.cpu_fma_rates(type_name, threads)
    assert all(isinstance(rate, float) for rate in rates)
    assert all(1e8 < rate < threads * 1e13 for rate in rates)
    if rates:
        assert len(rates) > 3


def test_every_processor_has_float32():
    assert _C.cpu_fma_rates("float32", 1)


def test_narrow_types_are_not_slower():
    """An instruction for bfloat16 or int8 does two and four times as much."""
    whole = max(_C.cpu_fma_rates("float32", 1))
    for type_name in TYPES[1:]:
        rates = _C.cpu_fma_rates(type_name, 1)
        assert not rates or max(rates) > whole


@pytest.mark.parametrize("type_name", ["float64", "", "FLOAT32"])
def test_an_unknown_type_is_refused_with_those_allowed(type_name):
    with pytest.raises(ValueError, match=f"'{type_name}'.*float32, bfloat16, int8"):
        _C.cpu_fma_rates(type_name, 1)


@pytest.mark.parametrize("threads", [0, -1])
def test_a_number_of_threads_that_cannot_be_is_refused(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}; allowed are 1 and more"):
        _C.cpu_fma_rates("float32", threads)
