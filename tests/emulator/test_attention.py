"""The CUDA attention kernels under several orders of threads and blocks: no fault, the same bits.

That the bits are right is held by tests/ops, which run on the emulator, too.
"""

import pytest
import torch
from emulator import emulated

import bertkern

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

ORDERS = [(seed, blocks) for seed, blocks in zip(range(6), (1, 2, 2, 3, 4, 7), strict=True)]
# name: (options of bertkern.attention, queries, keys, head dim)
CASES = {
    "plain, several tiles": ({}, 150, 200, 64),
    "causal, dropout": ({"causal": True, "dropout_p": 0.3}, 140, 140, 32),
    "window, softcap": ({"window": (40, 20), "softcap": 3.0}, 130, 130, 96),
    "bias of all": ({"bias": (2, 2)}, 70, 90, 128),
    "bias shared by the batch, one for all queries": ({"bias": (1, 2), "rows": 1}, 70, 140, 32),
    "key lengths, padding, grouped heads": ({"lengths": True, "heads": 4}, 100, 150, 40),
    "few keys": ({"causal": True}, 60, 60, 64),
}


def run(options, queries, keys, dim, dtype):
    torch.manual_seed(0)
    options = dict(options)
    heads, rows = options.pop("heads", 2), options.pop("rows", queries)
    q = torch.randn(2, queries, heads, dim, dtype=dtype)
    k, v = torch.randn(2, 2, keys, 2, dim, dtype=dtype)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    if "bias" in options:
        options["bias"] = torch.randn(*options["bias"], rows, keys).requires_grad_()
        leaves.append(options["bias"])
    if options.pop("lengths", False):
        options["key_lengths"] = torch.tensor([keys, keys // 3], dtype=torch.int32)
        options["key_padding_mask"] = torch.rand(2, keys) < 0.8
    seed = torch.tensor([5])
    out, lse = bertkern.attention(*leaves[:3], return_lse=True, dropout_seed=seed, **options)
    grads = torch.autograd.grad((out.square().sum() + lse[lse.isfinite()].sum()), leaves)
    return [t.detach() for t in (out, lse, *grads)]


@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_order_gives_the_same_bits(case, dtype, capability):
    results = []
    for seed, resident_blocks in ORDERS:
        emulator = emulated.emulated(seed, resident_blocks, capability=capability)
        with emulator, bertkern.backend("cuda"):
            results.append(run(*case, dtype))
    for result in results:
        assert not any(t.isnan().any() for t in result)
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["dropout", "general"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_one_key_of_several_tiles_gives_no_gradient(dim, options, capability):
    """p is 1, so ds is 0; from delta summed over the rounded out it was that rounding, 1e-3."""
    queries, keys = 130, 200  # blocks of 128 queries see keys of two tiles
    q, dout = torch.randn(2, 1, queries, 1, dim, dtype=torch.float16)
    k, v = torch.randn(2, 1, keys, 1, dim, dtype=torch.float16)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    emulator = emulated.emulated(0, capability=capability)
    with emulator, bertkern.backend("cuda"):
        out = bertkern.attention(
            *leaves, window=(0, 0), dropout_p=0.3, dropout_seed=torch.tensor([5]), **options
        )
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    seen = v[:, keys - queries :]
    assert torch.equal((out != 0).any(-1), (dv[:, keys - queries :] != 0).any(-1))
    assert torch.allclose(out, torch.where(out != 0, seen / 0.7, 0), rtol=2e-3)
    assert dq.abs().max() < 2e-5
    assert dk.abs().max() < 2e-5
