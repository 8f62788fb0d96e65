"""The cases of the ops under pytest-benchmark: pytest benchmarks/ [--benchmark-json FILE]

Each peer's result is checked before it is timed, as in `bertkern bench`, which interleaves the
peers besides: ratios between them are to be read from there.
"""

from dataclasses import replace

import pytest
import torch
from bertkern.benchmarks import op_cases
from bertkern.benchmarks.harness import check
from bertkern.benchmarks.peers import Peers
from bertkern.benchmarks.row import is_own

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = {
    case.name: case for case in op_cases.cases(Peers(["eager", "sdpa"], DEVICE), DTYPE, quick=True)
}
PEERS = [
    (name, peer, direction)
    for name, case in CASES.items()
    for direction in case.passes
    for peer in case.peers
]


@pytest.mark.parametrize(("name", "peer", "direction"), PEERS)
def test_op(benchmark, name, peer, direction):
    case = CASES[name]
    case = replace(case, peers={peer: case.peers[peer]}, passes=(direction,))
    outcome = check(case, DEVICE)[peer, direction]
    if outcome.error.startswith("not run") and not is_own(peer):
        pytest.skip(outcome.error)
    assert not outcome.error
    benchmark.group = f"{name} {direction}"
    benchmark.extra_info.update(peer=peer, flops=case.flops[direction], bytes=case.bytes[direction])

    def synchronized():
        outcome.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=5, warmup_rounds=2)
