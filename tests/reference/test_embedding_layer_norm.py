"""The definition: torch.nn.Embedding and F.layer_norm in fp64, with derivatives to second order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import bertkern
from bertkern.reference.dropout import hidden_mask
from bertkern.reference.embedding_layer_norm import embedding_layer_norm_fwd

IDS = torch.tensor([2, 0, 2, 1, 3])
TYPES = torch.tensor([0, 1, 1, 0, 1])
SEED = torch.tensor([3])
SHAPES = ((4, 6), (4, 6), (2, 6), (6,), (6,))


def leaves(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]


@pytest.mark.parametrize("type_ids", [None, TYPES], ids=["type 0", "types"])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_it_is_torchs(type_ids, padding_idx, dropout_p):
    """Value and first and second derivatives, the padding row's missing ones too."""

    def ours(*inputs):
        return bertkern.embedding_layer_norm(
            *(IDS, 3 - IDS, type_ids, *inputs, 1e-12, dropout_p, SEED), padding_idx=padding_idx
        )

    def theirs(word, position, types, weight, bias):
        z = F.embedding(IDS, word, padding_idx) + F.embedding(3 - IDS, position)
        z = z + (types[0] if type_ids is None else F.embedding(type_ids, types))
        y = F.layer_norm(z, (6,), weight, bias, 1e-12)
        return y * hidden_mask(y, dropout_p, SEED, None) if dropout_p else y

    results = []
    for function in (ours, theirs):
        inputs = leaves()
        y = function(*inputs)
        grads = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        results.append((y, *grads, *second))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_first_and_second_derivatives():
    def function(*inputs):
        return bertkern.embedding_layer_norm(IDS, IDS, TYPES, *inputs, 1e-12, 0.3, SEED)

    assert gradcheck(function, leaves())
    assert gradgradcheck(function, leaves())


def test_half_precision_sums_and_normalises_in_float32():
    """1 + 2⁻¹² is 1 in float16: the sum keeps it, and with it the deviations of the row."""
    word, position = torch.ones(1, 4).half(), torch.tensor([[1.0, 2, 3, 4]]).half() * 2**-12
    types, zero = torch.zeros(1, 4).half(), torch.zeros(1, dtype=torch.int64)
    y, mean, _ = embedding_layer_norm_fwd(
        zero, zero, None, word, position, types, None, None, 0.0, 0.0, None, None
    )
    torch.testing.assert_close(y, F.layer_norm(position.float(), (4,), eps=0.0).half())
    assert mean.dtype == torch.float32


@pytest.mark.parametrize(("bad", "value"), [(torch.tensor([0, 4]), 4), (torch.tensor([-1, 9]), -1)])
def test_ids_outside_their_table(bad, value):
    zero = torch.zeros(2, dtype=torch.int64)
    message = f"ids holds {value}, out of range; allowed are 0 to 3"
    with pytest.raises(IndexError, match=message):
        bertkern.embedding_layer_norm(bad, zero, None, *leaves())
    with pytest.raises(IndexError, match=f"position_{message}"):
        bertkern.embedding_layer_norm(zero, bad, None, *leaves())
    with pytest.raises(IndexError, match=f"type_ids holds {value}"):
        bertkern.embedding_layer_norm(zero, zero, bad, *leaves())
