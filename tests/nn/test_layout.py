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
    assert torch.equal(packed.dropout_rows, padded.dropout_rows)
    assert torch.equal(packed.positions, padded.positions)
    x = torch.randn(10, 4)
    assert packed.pad(x) is x
    assert packed.unpad(x) is x


def test_packed_tokens_past_the_end_have_valid_positions():
    layout = packed_layout(12, torch.tensor([0, 2, 5], dtype=torch.int32), 3, CPU)
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 2, 2, 2, 2]
    assert len(set(layout.dropout_rows.tolist())) == 12


@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 3), (2, 4), (3, 4)])
def test_dropout_rows_of_a_part_are_those_of_the_whole(first, last):
    mask = torch.arange(5) < torch.tensor([[2], [5], [0], [3]])
    whole, _ = padded_layout((4, 5), CPU, mask)
    bounds = whole.cu_seqlens[first : last + 1]
    of_part = slice(int(bounds[0]), int(bounds[-1]))
    part = packed_layout(int(bounds[-1] - bounds[0]), bounds - bounds[0], 5, CPU, first)
    padded, _ = padded_layout((last - first, 5), CPU, mask[first:last], None, first)
    for layout in (part, padded):
        assert torch.equal(layout.dropout_rows, whole.dropout_rows[of_part])
        rows = layout.sequence_rows()
        rows = torch.arange(last) if rows is None else rows  # None: they count from 0
        assert rows.tolist() == list(range(first, last))
    unmasked, _ = padded_layout((last - first, 5), CPU, None, None, first)
    rows = torch.arange(last * 5) if unmasked.dropout_rows is None else unmasked.dropout_rows
    assert rows.tolist() == list(range(first * 5, last * 5))


@pytest.mark.parametrize("slack", [0, 3])
def test_by_sequence(slack):
    lengths = [2, 0, 4, 1]
    cu_seqlens = torch.tensor([0, 2, 2, 6, 7], dtype=torch.int32)
    layout = packed_layout(7 + slack, cu_seqlens, 5, CPU)
    x = torch.randn(7 + slack, 3, requires_grad=True)
    y = layout.by_sequence(x, -1.0)
    assert y.shape == (4, 5, 3)
    for b, length in enumerate(lengths):
        start = int(cu_seqlens[b])
        assert torch.equal(y[b, :length], x[start : start + length])
        assert (y[b, length:] == -1.0).all()
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    assert torch.equal(layout.by_sequence(x.grad, 0.0)[0, :2], weights[0, :2])
    assert (x.grad[7:] == 0).all()
    nothing = packed_layout(0, torch.zeros(3, dtype=torch.int32), 2, CPU)
    assert (nothing.by_sequence(torch.zeros(0, 3), 7.0) == 7.0).all()


def test_padding_is_filled_as_asked():
    layout, _ = padded_layout((2, 2), CPU, torch.tensor([[1, 0], [1, 1]]))
    padded = layout.pad(torch.tensor([1.0, 2.0, 3.0]), -torch.inf)
    assert padded.tolist() == [[1.0, -torch.inf], [2.0, 3.0]]


@pytest.mark.parametrize("offset", [-1, 1.0, None])
def test_offset_errors(offset):
    message = f"sequence_offset must be an int >= 0, not {offset}"
    with pytest.raises(ValueError, match=message):
        packed_layout(4, torch.tensor([0, 4], dtype=torch.int32), 4, CPU, offset)
    with pytest.raises(ValueError, match=message):
        padded_layout((2, 2), CPU, sequence_offset=offset)


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
