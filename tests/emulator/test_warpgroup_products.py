"""Products of a warpgroup (csrc/ptx/wgmma.cuh) against plain matrices: every N, type, kind of
operand and layout of its tile (csrc/common/shared_tile.h)."""

import itertools

import pytest
import torch
from emulator import emulated, faults

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SPANS = (16, 32, 64, 128)  # bytes of a row of a tile; 16: no swizzle
MODES = {16: 0, 128: 1, 64: 2, 32: 3}
REGISTERS = None  # instead of a span: the left operand is in registers
K = 16


def swizzled(offset, span):
    """Bytes of tiles with rows of a span: chunks (16 bytes) are flipped by their row's number."""
    row, chunk = offset // span, offset % span // 16
    flips = {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2, 16: 0 * row}[span]
    return row * span + (chunk ^ flips) * 16 + offset % 16


class Operand:
    """A matrix [rows, k] as tiles in shared memory; rows are m of a or n of b.

    places [rows, k]: the byte of each element; at [k / 16]: those of the tiles that each step
    starts at; descriptor: the bits that tell the rest.
    """

    def __init__(self, matrix, span, transposed, start, gap):
        """`gap`: how much is left empty between what stands side by side or below each other."""
        count, depth = matrix.shape
        row, k = torch.arange(count)[:, None], torch.arange(depth)
        width = span // 2  # elements of a tile's row
        if span == 16:  # 8 rows of 8 elements, 128 bytes, side by side along one dimension
            block = 128 * (1 + gap)
            leading, stride = block, block * (depth // 8)
            if gap % 2 == 0:
                leading, stride = block * (count // 8), block
            inside = k % 8 * 16 + row % 8 * 2 if transposed else row % 8 * 16 + k % 8 * 2
            offset = k // 8 * leading + row // 8 * stride + inside
            steps = [k0 // 8 * leading for k0 in range(0, depth, K)]
        elif transposed:
            stride = 8 * span * (1 + gap)
            leading = stride * (depth // 8)
            inside = k % 8 * span + row % width * 2
            offset = row // width * leading + k // 8 * stride + inside
            steps = [k0 // 8 * stride for k0 in range(0, depth, K)]
        else:  # what of k is more than a span is in another tile
            stride, leading = 8 * span * (1 + gap), 0
            tile = stride * (count // 8)
            offset = k // width * tile + row // 8 * stride + row % 8 * span + k % width * 2
            steps = [k0 // width * tile + k0 % width * 2 for k0 in range(0, depth, K)]
        assert max(leading, stride) < 1 << 18
        self.descriptor = MODES[span] << 62 | stride >> 4 << 32 | leading >> 4 << 16
        self.places = start + swizzled(offset, span)
        self.at = [start + step for step in steps]

    def end(self):
        """A place behind it where any tile may start."""
        return (self.places.max().item() + 1024) // 1024 * 1024


def registers_of(a):
    """[steps, 4, 128] words of a [64, 16 steps]: the fragments by their layout."""
    t = torch.arange(128)
    row, k = t // 32 * 16 + t % 32 // 4, 2 * (t % 4)
    words = []
    for step in range(a.shape[1] // K):
        for i in range(4):
            pair = [a[row + 8 * (i % 2), K * step + k + 8 * (i // 2) + j] for j in range(2)]
            low, high = (x.view(torch.int16).int() & 0xFFFF for x in pair)
            words.append(high << 16 | low)
    return torch.stack(words).view(-1, 4, 128)


def accumulators_of(d):
    """[n / 2, 128] of d [64, n]."""
    t, i = torch.arange(128), torch.arange(d.shape[1] // 2)[:, None]
    row = t // 32 * 16 + t % 32 // 4 + 8 * (i % 4 // 2)
    return d[row, i // 4 * 8 + 2 * (t % 4) + i % 2].contiguous()


def product(a, b, d, left, right, transpose_a, transpose_b, gap=0, seed=0):
    """The accumulators after d += a b.T, or d = a b.T where d is None: a [64, k], b [n, k]."""
    right_operand = Operand(b, right, transpose_b, 0, gap)
    left_operand, end = right_operand, right_operand.end()  # a descriptor is none of registers
    shared = torch.full((113 * 1024,), -1, dtype=torch.int16)
    shared[right_operand.places // 2] = b.view(torch.int16)
    if left is not REGISTERS:
        left_operand = Operand(a, left, transpose_a, end, gap)
        end = left_operand.end()
        shared[left_operand.places // 2] = a.view(torch.int16)
    operands = (left_operand, right_operand)
    steps = a.shape[1] // K
    descriptors = torch.tensor([o.descriptor - (o.descriptor >> 63 << 64) for o in operands])
    registers = accumulators_of(torch.full((64, len(b)), float("nan")) if d is None else d)
    tensors = {
        "shared": shared[: end // 2],
        "a": registers_of(a),
        "tiles": descriptors.repeat(steps, 1),
        "places": torch.tensor([o.at for o in operands]).int().T.contiguous(),
        "d": registers,
    }
    machine = faults.module()
    machine.configure(seed)
    machine.clear_memory()
    machine.warpgroup_products(
        *(faults.register(name, tensor) for name, tensor in tensors.items()),
        end,
        steps,
        len(b),
        a.dtype == torch.bfloat16,
        left is REGISTERS,
        transpose_a,
        transpose_b,
        d is not None,
    )
    return registers


def numbers(rows, k, dtype):
    """Integers that both types hold, of which all sums are exact."""
    return torch.randint(-128, 129, (rows, k)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("n", [32, 64, 96, 128, 192, 256])
def test_every_kind_of_product(n, dtype):
    """All layouts of both operands, two steps along k, distances that are as small as can be or
    not, with and without what the accumulators held."""
    lefts = [(REGISTERS, False), *itertools.product(SPANS, (False, True))]
    for number, ((left, transpose_a), right, transpose_b) in enumerate(
        itertools.product(lefts, SPANS, (False, True))
    ):
        a, b = numbers(64, 2 * K, dtype), numbers(n, 2 * K, dtype)
        d = torch.randint(-1000, 1000, (64, n)).float() if number % 2 else None
        gap = number // 2 % 3 if n < 128 else 0
        ours = product(a, b, d, left, right, transpose_a, transpose_b, gap, number)
        theirs = a.float() @ b.float().T + (0 if d is None else d)
        assert torch.equal(ours, accumulators_of(theirs)), (left, transpose_a, right, transpose_b)


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_steps_along_k(span, transpose_a, transpose_b):
    """Four steps inside one tile of 128 bytes, or across tiles of fewer."""
    a, b = numbers(64, 4 * K, torch.bfloat16), numbers(64, 4 * K, torch.bfloat16)
    for seed in range(5):
        ours = product(a, b, None, span, span, transpose_a, transpose_b, 0, seed)
        assert torch.equal(ours, accumulators_of(a.float() @ b.float().T))


def test_products_accumulate_in_fp32():
    """Neither 1 + 2^-20 nor 2049 is a half."""
    for first, second in ((1, 2.0**-20), (2048, 1)):
        a, b = torch.zeros(64, K).half(), torch.zeros(32, K).half()
        a[:, 0], b[:, 0] = first, 1
        a[:, 1], b[:, 1] = second**0.5, second**0.5
        for left in (REGISTERS, 32):
            assert (product(a, b, None, left, 128, False, True) == first + second).all()


def test_products_of_special_values():
    """Inf, NaN, subnormal and largest halves come through as what they are; NaN in d is not added
    when the product overwrites."""
    values = torch.tensor([float("inf"), float("nan"), 2.0**-24, 65504.0, -(2.0**-14)])
    a, b = torch.zeros(64, K).half(), torch.zeros(32, K).half()
    a[:5, 0], b[:, 0] = values.half(), 1
    expected = accumulators_of((a.float() @ b.float().T).nan_to_num(-1))
    for left in (REGISTERS, 32):
        assert torch.equal(product(a, b, None, left, 32, False, False).nan_to_num(-1), expected)
