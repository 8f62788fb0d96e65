"""What the tests of the benchmark suite share: peers that are not imported, ceilings, small models.

Everything runs on the CPU: the GPU's cases are the same functions at larger sizes.
"""

import pytest
import torch
from bertkern.benchmarks.limits import Limits
from bertkern.benchmarks.model_cases import Run
from bertkern.benchmarks.peers import Peers

from bertkern.models import BertConfig

CPU = torch.device("cpu")


@pytest.fixture
def who():
    """Peers of these names, without the seconds that it takes to try their imports."""

    def make(*names):
        peers = Peers([], CPU, quick=True)
        peers.present = list(names)
        return peers

    return make


@pytest.fixture
def ceilings():
    """1 GB/s whatever the size, and 4 Gflop/s."""
    limits = Limits()
    limits.copies = [(1e3, 1e9), (1e9, 1e9)]
    limits.rates = {"float32": 4e9}
    return limits


@pytest.fixture
def make_run(who, ceilings):
    """A run with these peers and one sample a case, and the rows that it emits."""

    def make(*names):
        rows = []
        facts = {"device": "test", "threads": torch.get_num_threads()}
        run = Run(who(*names), ceilings, facts, 1, 0.1, quick=True, emit=rows.extend)
        return run, rows

    return make


@pytest.fixture
def tiny():
    """A BERT of two small layers, with BERT's vocabulary."""
    return BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
