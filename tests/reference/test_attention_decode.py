"""The formula of attention_decode: exact derivatives in fp64 to second order, torch's numbers."""

import math

import pytest
import torch
from plain_attention_decode import CASES, Inputs, plain
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import bertkern
from bertkern.reference.attention_decode import attention_decode

LENGTHS = torch.tensor([0, 3, 5], dtype=torch.int32)
FULL = (3, 4, 1, 5)  # of a bias: [B, H, 1, S]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_is_the_definition(case):
    inputs = Inputs(case, torch.float64, "cpu")
    out, lse = attention_decode(
        inputs.q, inputs.k, inputs.v, inputs.lengths, inputs.bias,
        -1 if case.window is None else case.window[0], case.softcap,
        case.head_dim**-0.5 if case.scale is None else case.scale,
    )  # fmt: skip
    wanted, wanted_lse = plain(inputs, torch.float64)
    empty = wanted_lse == -math.inf
    torch.testing.assert_close(out, wanted.masked_fill(empty[..., None], 0.0))
    torch.testing.assert_close(lse, wanted_lse)
    assert (out[empty] == 0).all()


@pytest.mark.parametrize(
    ("key_heads", "options", "bias_shape"),
    [
        (4, {}, None),
        (2, {"softcap": 1.5, "scale": 0.7}, (1, 4, 1, 5)),
        (1, {"window": (1, 0)}, FULL),
        (4, {"window": (2, -1), "softcap": 0.8}, (5,)),
    ],
)
def test_first_and_second_derivatives(key_heads, options, bias_shape):
    torch.manual_seed(0)
    shape = (3, 5, key_heads, 3)
    inputs = [leaf(3, 4, 3), leaf(*shape), leaf(*shape)]
    if bias_shape:
        inputs.append(leaf(*bias_shape))

    def function(q, k, v, bias=None):
        out, lse = bertkern.attention_decode(
            q, k, v, LENGTHS, bias=bias, return_lse=True, **options
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_is_torchs_with_one_query():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((6, 1), (2, 9), (2, 9)))
    lengths = torch.tensor([9, 9], dtype=torch.int32)
    out = bertkern.attention_decode(q[:, :, 0], k.transpose(1, 2), v.transpose(1, 2), lengths)
    theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, theirs[:, :, 0])


def test_what_is_never_seen_gets_no_gradient_whatever_it_holds():
    torch.manual_seed(0)
    q, k, v = leaf(3, 4, 3), leaf(3, 5, 2, 3), leaf(3, 5, 2, 3)
    bias = leaf(*FULL)
    with torch.no_grad():
        bias[1, 0] = -math.inf  # query head 0 of sequence 1 sees nothing
        q[1, 0] = math.nan
        for t in (k, v):
            for b, length in enumerate(LENGTHS.tolist()):
                t[b, length:] = math.nan
        q[0] = math.nan
    out, lse = bertkern.attention_decode(q, k, v, LENGTHS, bias=bias, return_lse=True)
    loss = out.square().sum() + lse[2].sum()
    dq, dk, dv, dbias = torch.autograd.grad(loss, (q, k, v, bias))
    assert all(t.isfinite().all() for t in (out, dq, dk, dv, dbias))
    assert (dq[0] == 0).all()
    assert (dq[1, 0] == 0).all()
    for b, length in enumerate(LENGTHS.tolist()):
        assert (dk[b, length:] == 0).all()
        assert (dv[b, length:] == 0).all()
        assert (dbias[b, ..., length:] == 0).all()
    assert dk[2].abs().min() > 0
