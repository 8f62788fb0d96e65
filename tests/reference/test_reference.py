"""The truth itself: exact derivatives in fp64 to second order, and plain-torch agreement."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import bertkern
from bertkern.ops import dropout
from bertkern.reference.attention import CAUSAL_BOTTOM_RIGHT, attention_fwd

SEED = torch.tensor([3])
CU_SEQLENS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
LENGTHS = torch.tensor([0, 3], dtype=torch.int32)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def finite(out_and_lse):
    out, lse = out_and_lse
    return out, lse.masked_fill(lse.isinf(), 0.0)


CASES = {
    "attention": (
        lambda q, k, v: bertkern.attention(q, k, v, return_lse=True),
        [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)],
    ),
    "attention causal, dropout, lengths": (
        lambda q, k, v: finite(
            bertkern.attention(
                q,
                k,
                v,
                key_lengths=LENGTHS,
                causal=True,
                dropout_p=0.3,
                dropout_seed=SEED,
                return_lse=True,
            )
        ),
        [(2, 4, 2, 3), (2, 4, 2, 3), (2, 4, 2, 3)],
    ),
    "attention_varlen": (
        lambda q, k, v: bertkern.attention_varlen(
            q, k, v, CU_SEQLENS, CU_SEQLENS, 3, 3, dropout_p=0.3, dropout_seed=SEED
        ),
        [(6, 2, 4)] * 3,
    ),
    "scaled_dot_product_attention": (
        lambda q, k, v: bertkern.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 4, 3), (2, 5, 3), (2, 5, 3)],
    ),
    "layer_norm": (bertkern.layer_norm, [(4, 5), (5,), (5,)]),
    "layer_norm without parameters": (bertkern.layer_norm, [(4, 5)]),
    "dropout_add_layer_norm": (
        lambda x, r, w, b: bertkern.dropout_add_layer_norm(x, r, w, b, 0.4, 1e-12, True, SEED),
        [(3, 5), (3, 5), (5,), (5,)],
    ),
    "dropout_add_layer_norm without dropout": (
        lambda x, r, w, b: bertkern.dropout_add_layer_norm(x, r, w, b, 0.0, 1e-12, True),
        [(3, 5), (3, 5), (5,), (5,)],
    ),
    "linear": (lambda x, w: bertkern.linear(x, w), [(3, 5), (4, 5)]),
    "linear gelu, residual, dropout": (
        lambda x, w, b, r: bertkern.linear(
            x, w, b, activation="gelu", residual=r, dropout_p=0.3, dropout_seed=SEED
        ),
        [(3, 5), (4, 5), (4,), (3, 4)],
    ),
    "linear gelu_tanh": (
        lambda x, w, b: bertkern.linear(x, w, b, activation="gelu_tanh"),
        [(3, 5), (4, 5), (4,)],
    ),
    "linear relu": (
        lambda x, w, b: bertkern.linear(x, w, b, activation="relu"),
        [(3, 5), (4, 5), (4,)],
    ),
    "ffn": (
        lambda *tensors: bertkern.ffn(*tensors, "gelu", 0.3, SEED),
        [(3, 5), (4, 5), (4,), (6, 4), (6,)],
    ),
    "dropout": (lambda x: dropout(x, 0.3, SEED), [(3, 5)]),
}


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives(name):
    torch.manual_seed(0)
    function, shapes = CASES[name]
    inputs = tuple(leaf(*shape) for shape in shapes)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_inputs_that_depend_on_each_other_get_right_second_derivatives():
    """q, k and v from one tensor: only the direct path of each may count in the op's own
    derivative."""
    torch.manual_seed(0)
    x = leaf(1, 3, 1, 4)
    assert gradgradcheck(lambda x: bertkern.attention(x, 2 * x, x * x), (x,))


def test_attention_is_torchs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 8, dtype=torch.float64) for _ in range(3))
    for causal in (0, CAUSAL_BOTTOM_RIGHT):
        out, lse = attention_fwd(
            q, k, v, *[None] * 6, 7, 7, causal, -1, -1, 0.0, 0.0, 8**-0.5, 0, False
        )
        theirs = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=bool(causal)
        )
        torch.testing.assert_close(out, theirs.transpose(1, 2))
        assert lse.shape == (2, 3, 7)


def test_half_precision_is_computed_in_fp32():
    torch.manual_seed(0)
    q = torch.randn(1, 30, 2, 16).bfloat16()
    options = (*[None] * 6, 30, 30, 0, -1, -1, 0.0, 0.0, 0.25, 0, False)
    out, lse = attention_fwd(q, q, q, *options)
    wide, _ = attention_fwd(*[q.float()] * 3, *options)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, wide.bfloat16(), rtol=0, atol=0)
