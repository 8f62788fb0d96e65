"""The benchmark of host time: that it measures every op, on stubs, and leaves the backends as they
were."""

import json

import pytest
import torch
from bertkern.benchmarks import overhead

import bertkern
from bertkern.ops import _backend

CPU = torch.device("cpu")


def test_every_op_with_a_gradient_is_measured():
    """But the one that is for inference alone."""
    functions = {name for name in bertkern.__all__ if callable(getattr(bertkern, name))}
    others = {"backend", "info", "patch", "unpatch", "attention_decode"}
    assert set(overhead.calls(CPU)) - {"dropout"} == functions - others


@pytest.mark.parametrize("op", overhead.calls(CPU))
def test_a_frozen_stub_returns_what_the_backend_returned(op):
    function, inputs = overhead.calls(CPU)[op]
    leaves = [t.detach().requires_grad_() for t in inputs]
    with overhead.stubs() as made:
        out = function(*leaves)
        torch.autograd.grad(out.sum(), leaves)
        assert len(made) == (1 if op == "dropout" else 2)  # its forward and its backward
        for stub in made:
            with torch.no_grad():
                real = stub(*stub.arguments)
                stub.frozen, stub.function = True, None
                found = stub(*stub.arguments)
            pairs = zip(real, found, strict=True) if isinstance(real, tuple) else [(real, found)]
            for one, other in pairs:
                assert (one is None) == (other is None)
                assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype)
    assert not isinstance(_backend.implementation("linear", "_fwd", leaves[0]), overhead.Stub)
    assert torch.isfinite(function(*leaves)).all()


def test_rows(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        overhead.main(
            ["--device", "cpu", "--samples", "2", "--only", "ffn", "--results", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("overhead-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(row["op"], row["direction"], row["peer"]) for row in rows}
    for direction in ("forward", "forward, no grad", "backward"):
        for peer in ("stub launch", "bertkern on a stub"):
            assert ("ffn", direction, peer) in found
    assert all(row["median_s"] > 0 and row["provenance"]["commit"] for row in rows)
    assert "us of host time" in capsys.readouterr().out
