"""Fixtures of the native tests: every instruction set that this processor has."""

import pytest

_C = pytest.importorskip("bertkern._C")


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    """Runs the test on one compiled instruction set; the best one is in use again afterwards."""
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(_C.cpu_isas()[-1])
