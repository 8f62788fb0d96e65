"""A kernel of the shape of Hopper's attention kernels: right under every order, and every call of
its synchronisation is missed."""

import pytest
import torch
from emulator import emulated, faults

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)


def pipeline(q, k, v, fault=0, seed=0, resident_blocks=2):
    """(q kᵀ) v."""
    out = torch.full_like(q, float("nan"))
    machine = faults.module()
    machine.configure(seed, resident_blocks)
    machine.clear_memory()
    tensors = {"q": q, "k": k, "v": v}
    machine.pipeline(
        *(faults.register(name, tensor) for name, tensor in tensors.items()),
        faults.register("out", out, initialised=False),
        len(q),
        len(k),
        fault,
    )
    return out


def draw(queries, keys):
    """Small integers: q kᵀ is exact in fp16, its product with v in fp32."""
    return (torch.randint(-4, 5, (rows, 64)).half() for rows in (queries, keys, keys))


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (128, 64),  # one tile
        (128, 320),  # stages come again
        (300, 200),  # blocks and tiles that are not full
        (1, 1),
    ],
)
def test_it_is_right(queries, keys):
    for seed in range(10):
        q, k, v = draw(queries, keys)
        out = pipeline(q, k, v, seed=seed, resident_blocks=1 + seed % 3)
        assert torch.equal(out, ((q.float() @ k.float().T) @ v.float()).half())


CALLS = {
    1: "the wait for an empty stage",
    2: "the fence of p and out",
    3: "the commit of p v",
    4: "the fence before the store",
    5: "the barrier before the store",
    6: "the commit of the store",
    7: "the wait for the store",
    8: "the fence behind init",
    9: "the barrier behind init",
    10: "the producer's registers",
    11: "the wait for q",
    12: "the wait for the first scores",
    13: "the wait for k",
    14: "the wait for v",
    15: "the place of the arrival: before the wait",
    16: "the place of packing: before the wait",
    17: "the arrival",
    18: "the wait for out",
}


@pytest.mark.parametrize("fault", CALLS, ids=CALLS.values())
def test_each_call_is_missed(fault):
    """By an error, or by NaN in what comes out."""
    q, k, v = draw(128, 320)
    for seed in range(5):
        try:
            out = pipeline(q, k, v, fault, seed)
        except RuntimeError:
            continue
        assert out.isnan().any()
