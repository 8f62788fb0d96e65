"""Boxes of tensors (csrc/ptx/tma.cuh, csrc/cuda/tensor_map.h) against slices of padded tensors."""

import random

import pytest
import torch
from emulator import emulated, faults

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

SWIZZLES = (16, 32, 64, 128)  # bytes of a row; 16: none


def places(box, swizzle):
    """Where in shared memory the elements of a box are, in elements: box[0] is innermost.

    Rows are side by side. Chunk c (16 bytes) of row r is at chunk c ^ (r % 8), c ^ (r / 2 % 4) or
    c ^ (r / 4 % 2) of its row, of 128, 64 or 32 bytes (common/shared_tile.h).
    """
    elements = torch.arange(torch.tensor(box).prod().item())
    if swizzle == 16:
        return elements
    row, column = elements // box[0], elements % box[0]
    flips = {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2}[swizzle]
    return row * box[0] + ((column // 8) ^ flips) * 8 + column % 8


def slice_of(tensor, at, box):
    """The box of a tensor whose last dimension is the innermost; zeros outside."""
    padding, index = [], []
    for size, start, length in zip(reversed(tensor.shape), at, box, strict=True):
        before, after = max(0, -start), max(0, start + length - size)
        padding += [before, after]
        index.insert(0, slice(start + before, start + before + length))
    return torch.nn.functional.pad(tensor, padding)[tuple(index)]


def draw(dice, rank, swizzle):
    """(a tensor with gaps between its rows, the box's sizes and coordinates)."""
    row = swizzle // 2 if swizzle > 16 else 8 * dice.randint(1, 6)
    box = [row, *(dice.choice((1, 2, 3, 5)) for _ in range(rank - 2))]
    box.append(dice.choice((1, 4, 8, 13)))
    sizes = [dice.choice((1, 7, 24, 70)), *(dice.choice((1, 2, 4, 9)) for _ in range(rank - 1))]
    at = [dice.randint(1 - b, s - 1) for b, s in zip(box, sizes, strict=True)]
    if dice.random() < 0.2:  # nothing of it is inside
        i = dice.randrange(rank)
        at[i] = dice.choice((-box[i], sizes[i], -1000, 1000))
    storage = list(sizes)
    storage[0] = (sizes[0] + 7) // 8 * 8 + 8 * dice.randint(0, 2)  # strides are multiples of 8
    whole = torch.randn(*reversed(storage)).to(dice.choice((torch.half, torch.bfloat16)))
    return whole[..., : sizes[0]], box, at


def copy(tensor, box, at, swizzle, tile, load, seed):
    machine = faults.module()
    machine.configure(seed)
    machine.clear_memory()
    machine.box(
        faults.register("tensor", tensor),
        tensor.dtype == torch.bfloat16,
        list(reversed(tensor.shape)),
        list(reversed(tensor.stride())),
        box,
        at,
        swizzle,
        faults.register("tile", tile),
        load,
    )


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_boxes(rank, swizzle):
    """Loaded, elements outside the tensor are zeros; stored, they go nowhere."""
    dice, outside = random.Random(f"{rank} {swizzle}"), 0
    for seed in range(25):
        tensor, box, at = draw(dice, rank, swizzle)
        inside = slice_of(torch.ones_like(tensor), at, box).flatten()
        outside += bool((inside == 0).any()) and bool((inside == 1).any())
        place = places(box, swizzle)
        tile = torch.full((len(place),), float("nan"), dtype=tensor.dtype)
        copy(tensor, box, at, swizzle, tile, True, seed)
        assert torch.equal(tile[place], slice_of(tensor, at, box).flatten())

        tile = torch.randn(len(place)).to(tensor.dtype)
        expected = tensor.clone()
        numbers = slice_of(torch.arange(tensor.numel()).view(tensor.shape) + 1, at, box).flatten()
        expected.view(-1)[numbers[numbers > 0] - 1] = tile[place][numbers > 0]
        copy(tensor, box, at, swizzle, tile, False, seed)
        assert torch.equal(tensor, expected)
    assert outside > 10, "boxes that are partly outside"


def test_special_values_pass_as_they_are():
    patterns = torch.arange(65536).to(torch.int16).view(8, 128, 64)
    for part in patterns:
        tile = torch.zeros(128 * 64, dtype=torch.int16)
        copy(part.view(torch.half), [64, 128], [0, 0], 16, tile, True, 0)
        assert torch.equal(tile.view(128, 64), part)


def test_dimensions_may_overlap():
    """A stride of 0 repeats a row, as the heads of grouped queries share one of keys."""
    row = torch.randn(64).half()
    tile = torch.zeros(4 * 64).half()
    copy(row.expand(4, 64), [64, 4], [0, 0], 16, tile, True, 0)
    assert torch.equal(tile, row.repeat(4))


@pytest.mark.parametrize("at", [[0, 2**31 - 1], [0, -(2**31)], [2**31 - 64, 0], [-(2**31), 3]])
def test_coordinates_far_outside(at):
    tensor, tile = torch.ones(4, 64).half(), torch.full((4 * 64,), float("nan")).half()
    copy(tensor, [64, 4], at, 16, tile, True, 0)
    assert torch.equal(tile, torch.zeros(4 * 64).half())
    copy(tensor, [64, 4], at, 16, tile, False, 0)
    assert torch.equal(tensor, torch.ones(4, 64).half())


def test_what_no_map_describes():
    tensor, tile = torch.ones(4, 60).half(), torch.zeros(4 * 64).half()
    with pytest.raises(ValueError, match=r"box: strides\[1\] is 60; allowed: multiples of 8"):
        copy(tensor, [64, 4], [0, 0], 16, tile, True, 0)
