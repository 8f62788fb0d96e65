"""Random layer_norm, dropout_add_layer_norm and dropout calls against fp64."""

from pathlib import Path

import pytest
from fuzz import rows
from fuzz.run import cases, run_case

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@cases(
    {
        rows.layer_norm: 12,
        rows.dropout_add_layer_norm: 12,
        rows.dropout: 6,
        rows.embedding_layer_norm: 10,
    }
)
def test_case(device, generator, number):
    run_case(Path(__file__).name, generator, number, device)
