"""Unpadding: any mask, its inverse, labels, and packed batches."""

import pytest
import torch

from bertkern.nn import packed_layout, padded_layout

CPU = torch.device("cpu")


def masks():
    torch.manual_seed(0)
    right = torch.arange(7) < torch.tensor([[7], [3], [1]])
    yield "right padding", right
    yield "left padding", right.flip(1)
    yield "holes", torch.rand(3, 7) < 0.5
    yield (
        "an empty sequence first, last and between",
        torch.tensor([[0] * 7, [1, 0, 1, 0, 1, 0, 0], [0] * 7, [1] * 7, [0] * 7]),
    )
    yield "nothing at all", torch.zeros(2, 7, dtype=torch.bool)
    yield "no sequence", torch.zeros(0, 7, dtype=torch.bool)
    yield "no column", torch.zeros(2, 0, dtype=torch.bool)


@pytest.mark.parametrize(("name", "mask"), [pytest.param(n, m, id=n) for n, m in masks()])
def test_mask(name, mask):
    shape = tuple(mask.shape)
    labels = torch.randint(0, 50, shape).masked_fill(torch.rand(shape) < 0.6, -100)
    layout, (tokens, targets) = padded_layout(shape, CPU, mask, labels)
    flat = mask.flatten().nonzero()[:, 0]
    assert torch.equal(layout.rows, flat)
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
    assert layout.max_seqlen == (int(mask.sum(1).max()) if len(mask) else 0)
    assert torch.equal(layout.positions, flat % max(shape[1], 1))
    x = torch.randn(*shape, 4)
    kept = layout.unpad(x)
    assert torch.equal(kept, x.flatten(0, 1)[flat])
    assert torch.equal(layout.pad(kept), torch.where((mask != 0)[..., None], x, 0.0))
    unpadded_labels = layout.unpad(labels)
    assert torch.equal(tokens, (unpadded_labels != -100).nonzero()[:, 0])
    assert torch.equal(targets, unpadded_labels[tokens])
    first = layout.first_tokens(kept)
    for b, row in enumerate(mask):
        expected = x[b][row != 0][:1].sum(0)
        assert torch.equal(first[b], expected)


def test_without_mask():
    layout, (tokens, targets) = padded_layout(
        (2, 3), CPU, None, torch.tensor([[-100, 5, -100]] * 2)
    )
    assert layout.rows is None
    assert layout.cu_seqlens.tolist() == [0, 3, 6]
    assert layout.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert (tokens.tolist(), targets.tolist()) == ([1, 4], [5, 5])


def test_labels_at_padding_do_not_count():
    mask = torch.tensor([[1, 1, 0]])
    _, (tokens, _) = padded_layout((1, 3), CPU, mask, torch.tensor([[-100, 4, 4]]))
    assert tokens.tolist() == [1]


def test_packed_rows_are_those_of_the_padded_batch():
    mask = torch.arange(5) < torch.tensor([[2], [5], [0], [3]])
    padded, _ = padded_layout((4, 5), CPU, mask)
    packed = packed_layout(10, padded.cu_seqlens, 5, CPU)
    assert torch.equal(packed.rows, padded.rows)
    assert torch.equal(packed.positions, padded.positions)
    x = torch.randn(10, 4)
    assert packed.pad(x) is x
    assert packed.unpad(x) is x


def test_packed_tokens_past_the_end_have_valid_positions():
    layout = packed_layout(12, torch.tensor([0, 2, 5], dtype=torch.int32), 3, CPU)
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 2, 2, 2, 2]
    assert len(set(layout.rows.tolist())) == 12


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, torch.tensor([0, 4]), 4), ValueError, "int32"),
        ((4, torch.tensor([0, 5], dtype=torch.int32), 5), ValueError, "T = 4"),
        ((4, torch.tensor([1, 4], dtype=torch.int32), 4), ValueError, "rise from 0"),
        ((4, torch.tensor([0, 3, 2], dtype=torch.int32), 4), ValueError, "rise from 0"),
        ((4, torch.tensor([0, 4], dtype=torch.int32), 3), ValueError, "max_seqlen = 3"),
        (
            (4, torch.tensor([0, 4], dtype=torch.int32), 4.0),
            ValueError,
            "max_seqlen must be an int",
        ),
    ],
)
def test_packed_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        packed_layout(*arguments, CPU)


def test_mask_errors():
    with pytest.raises(
        ValueError, match=r"attention_mask must have the shape of input_ids, \(2, 3\)"
    ):
        padded_layout((2, 3), CPU, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(
        TypeError, match=r"attention_mask must be bool or integer, not torch.float32"
    ):
        padded_layout((2, 3), CPU, torch.ones(2, 3))
