"""Products, fragments and casts of the machine against plain matrices and torch's casts."""

import pytest
import torch
from emulator import emulated, faults

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

OPERANDS = {"fragments by their layout": 0, "ldmatrix": 1, "ldmatrix transposed": 2}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def product(a, b, d, operands, seed):
    machine = faults.module()
    machine.configure(seed)
    machine.clear_memory()
    machine.product(
        *(faults.register(name, t) for name, t in (("a", a), ("b", b), ("d", d))),
        a.dtype == torch.bfloat16,
        operands,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS.keys())
def test_product(operands, dtype):
    """Integers of which all sums are exact, every element of each matrix another one."""
    # 8 bits hold 256 numbers: enough for a, and odd ones for b.
    a = (torch.randperm(256) - 128).view(16, 16).to(dtype)
    b = (torch.randperm(128) * 2 - 127).view(16, 8).to(dtype)
    d = torch.arange(128.0).view(16, 8) * 1000
    assert len(set(a.flatten().tolist())) == 256
    assert len(set(b.flatten().tolist())) == 128
    for seed in range(20):
        ours = d.clone()
        product(a, b, ours, operands, seed)
        assert torch.equal(ours, d + a.float() @ b.float())


def test_product_accumulates_in_fp32():
    """Neither 1 + 2^-20 nor 2049 is a half."""
    for first, second in ((1, 2.0**-20), (2048, 1)):
        a, b = torch.zeros(16, 16).half(), torch.zeros(16, 8).half()
        a[:, 0], b[0] = first, 1
        a[:, 1], b[1] = second**0.5, second**0.5
        d = torch.zeros(16, 8)
        product(a, b, d, 0, 0)
        assert (d == first + second).all()


def test_product_of_special_values():
    """Inf, NaN, subnormal and largest halves come through as what they are."""
    values = torch.tensor([float("inf"), float("nan"), 2.0**-24, 65504.0, -(2.0**-14)])
    a, b = torch.zeros(16, 16).half(), torch.zeros(16, 8).half()
    a[:5, 0], b[0] = values.half(), 1
    d = torch.zeros(16, 8)
    product(a, b, d, 1, 0)
    assert torch.equal(d[:5, 3].nan_to_num(-1), values.nan_to_num(-1))


def casts(x):
    count = len(x)
    half, bfloat16 = (torch.full((count,), -1, dtype=torch.int16) for _ in range(2))
    from_half, from_bfloat16 = torch.zeros(count), torch.zeros(count)
    outputs = {"half": half, "bf": bfloat16, "from half": from_half, "from bf": from_bfloat16}
    machine = faults.module()
    machine.configure(0)
    machine.clear_memory()
    addresses = [faults.register("x", x)]
    addresses += [faults.register(name, t, initialised=False) for name, t in outputs.items()]
    machine.casts(*addresses, count)
    return half.view(torch.float16), bfloat16.view(torch.bfloat16), from_half, from_bfloat16


def test_casts():
    """Every 16-bit pattern to fp32, and fp32 back: around all halves, ties, tiny and huge ones."""
    patterns = torch.arange(65536).to(torch.int16)
    halves = patterns.view(torch.float16).float()
    neighbours = halves + torch.randn(65536) * halves.abs() * 2**-12
    bits = torch.randint(-(2**31), 2**31, (65536,)).to(torch.int32).view(torch.float32)
    ties = (patterns.int() << 13 | 1 << 12).view(torch.float32)
    bfloat16_ties = (patterns.int() << 16 | 1 << 15).view(torch.float32)
    tiny = torch.randn(65536) * 2.0**-24
    for x in (halves, neighbours, bits, ties, bfloat16_ties, tiny):
        half, bfloat16, from_half, from_bfloat16 = casts(x)
        same = {"half": (half, x.half()), "bfloat16": (bfloat16, x.bfloat16())}
        same["from half"] = (from_half, halves)
        same["from bfloat16"] = (from_bfloat16, patterns.view(torch.bfloat16).float())
        for name, (ours, theirs) in same.items():
            assert torch.equal(ours.isnan(), theirs.isnan()), name
            assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), name
            assert torch.equal(ours.signbit() | ours.isnan(), theirs.signbit() | theirs.isnan())
