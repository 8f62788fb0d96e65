"""Random attention calls, in every layout, against fp64."""

from pathlib import Path

import pytest
from fuzz import attention
from fuzz.run import cases, run_case

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@cases(
    {
        attention.attention: 12,
        attention.attention_varlen: 12,
        attention.scaled_dot_product_attention: 8,
        attention.attention_decode: 10,
    }
)
def test_case(device, generator, number):
    run_case(Path(__file__).name, generator, number, device)
