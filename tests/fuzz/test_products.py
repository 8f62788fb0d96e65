"""Random linear and ffn calls against fp64."""

from pathlib import Path

import pytest
from fuzz import products
from fuzz.run import cases, run_case

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@cases({products.linear: 12, products.ffn: 8, products.linear_cross_entropy: 10})
def test_case(device, generator, number):
    run_case(Path(__file__).name, generator, number, device)
