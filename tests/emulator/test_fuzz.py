"""Random attention calls on the CUDA kernels: the cases of tests/fuzz in shapes that they take."""

import pytest
from fuzz import attention, case, run
from fuzz.run import cases

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@cases(
    {
        attention.attention: 12,
        attention.attention_varlen: 12,
        attention.scaled_dot_product_attention: 8,
    }
)
def test_case(monkeypatch, device, generator, number):
    for module in (attention, case, run):
        monkeypatch.setattr(module, "BACKEND", "cuda")
    run.run_case("test_attention.py", generator, number, device)
