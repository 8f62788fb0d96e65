"""The interpreter that the tests make quicker computes what Triton's computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import quick_interpreter

# Forward, gradients, dropout, a bias with its gradient; in a process of its own, since an
# interpreter that was made quicker stays so.
PROGRAM = """
import sys
import torch
import bertkern
if sys.argv[1] == "quick":
    import quick_interpreter
    quick_interpreter.install()

torch.manual_seed(0)
q, k, v = (torch.randn(2, 33, 2, 24, requires_grad=True) for _ in range(3))
bias = torch.randn(1, 2, 33, 33, requires_grad=True)
weight, shift = torch.randn(24, requires_grad=True), torch.randn(24, requires_grad=True)
with bertkern.backend("triton"):
    out = bertkern.attention(
        q, k, v, bias=bias, causal=True, dropout_p=0.2, dropout_seed=torch.tensor([3]),
        key_lengths=torch.tensor([33, 20], dtype=torch.int32),
    )
    out = bertkern.layer_norm(out, weight, shift)
    grads = torch.autograd.grad(out, [q, k, v, bias, weight, shift], torch.randn_like(out))
    half = bertkern.attention(*(t.detach().half() for t in (q, k, v)), softcap=2.0)
torch.save([out.detach(), half, *grads], sys.argv[2])
"""


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or quick_interpreter.PLAIN,
    reason="Triton's interpreter is not used, or as it is",
)
def test_same_bits_as_tritons_own_interpreter(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    results = []
    for which in ("plain", "quick"):
        file = tmp_path / which
        subprocess.run([sys.executable, "-c", PROGRAM, which, file], env=environment, check=True)
        results.append(torch.load(file))
    assert len(results[0]) == 8
    for plain, quick in zip(*results, strict=True):
        assert plain.isfinite().all()
        assert torch.equal(plain, quick)
