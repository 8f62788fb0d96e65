"""`bertkern.scaled_dot_product_attention` means what torch's does: layouts, masks, groups."""

import contextlib
import math

import pytest
import torch
from computable import finest_dtype, skip_unless_computable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import bertkern
from bertkern.reference.tolerance import assert_close, cancelling, hold_in_most_draws

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
CUDA_CAPABILITIES = (80, 90)  # Hopper has kernels of its own

B, H, SQ, SK, D = 2, 4, 24, 37, 16
MASKS = {
    "bool [Sq, Sk]": ((SQ, SK), torch.bool),
    "bool by key": ((B, 1, 1, SK), torch.bool),
    "bool by key, of every sequence": ((1, SK), torch.bool),
    "bool by head": ((1, H, SQ, SK), torch.bool),
    "float [B, 1, Sq, Sk]": ((B, 1, SQ, SK), torch.float32),
    "float by head": ((H, SQ, SK), torch.float32),
    "float by key": ((B, 1, 1, SK), torch.float32),
    "float of one number": ((1, 1), torch.float32),
}


def compare(backend, inputs, dout, **options):
    """Output and gradients by ours in q's dtype against torch's in fp64 and in it."""
    dtype = inputs[0].dtype

    def run(function, dtype):
        leaves = [
            t if t is None or t.dtype == torch.bool else t.detach().to(dtype).requires_grad_()
            for t in inputs
        ]
        out = function(*leaves, **options)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        return out, torch.autograd.grad(out, wanted, dout.to(dtype))

    exact = run(F.scaled_dot_product_attention, torch.float64)
    same = run(F.scaled_dot_product_attention, dtype)
    with bertkern.backend(backend):
        ours = run(bertkern.scaled_dot_product_attention, dtype)
    assert_close(ours[0], exact[0], same[0])
    mask = next((t for t in inputs[3:] if t is not None), None)
    for i, (got, want, plain) in enumerate(zip(ours[1], exact[1], same[1], strict=True)):
        got, want, plain = (t.reshape(-1, t.shape[-1]) if t.dim() < 2 else t for t in
                            (got, want, plain))  # fmt: skip
        # The gradients of a query's scores add up to 0: that of a mask equal for all keys is 0.
        cancels = i == 3 and mask.shape[-1] == 1
        noise = cancelling(dout * exact[0], dtype) if cancels else 0.0
        assert_close(got, want, plain, grad=True, name=f"gradient {i}", noise=noise)


def heads_after_tokens(*shape):
    """[B, H, S, D] as transformers passes it: a transposed view of [B, S, H, D]."""
    return torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("len_q", "len_k"), [(24, 24), (9, 30), (30, 9)])
def test_causal_and_lengths(backend, device, len_q, len_k, is_causal):
    """Causal from the top left."""
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)

    def check(draw):
        torch.manual_seed(draw)
        q, k, v, dout = (
            heads_after_tokens(2, 3, n, 16).to(device, dtype) for n in (len_q, len_k, len_k, len_q)
        )
        compare(backend, (q, k, v, None), dout, is_causal=is_causal)

    hold_in_most_draws(check)


@pytest.mark.parametrize("name", MASKS)
def test_masks(backend, device, name):
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    shape, mask_dtype = MASKS[name]

    def check(draw):
        torch.manual_seed(draw)
        q, dout = (heads_after_tokens(B, H, SQ, D).to(device, dtype) for _ in range(2))
        k, v = (heads_after_tokens(B, H, SK, D).to(device, dtype) for _ in range(2))
        mask = torch.randn(shape)
        mask = mask > -0.8 if mask_dtype == torch.bool else mask
        compare(backend, (q, k, v, mask.to(device)), dout)

    hold_in_most_draws(check)


def test_a_float_mask_of_minus_infinity_and_whole_rows(backend, device):
    """Rows without a key give 0, as torch gives them, and no gradient anywhere.

    torch's own output in 16 bits depends on the processor, so the truth is its output in fp64.
    """
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, device=device).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.zeros(9, 9, device=device, dtype=dtype).masked_fill(
        torch.rand(9, 9, device=device) < 0.5, -math.inf
    )
    mask[3] = -math.inf
    with bertkern.backend(backend):
        out = bertkern.scaled_dot_product_attention(q, k, v, mask)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        exact, same = (
            F.scaled_dot_product_attention(*(t.to(d) for t in (q, k, v, mask)))
            for d in (torch.float64, dtype)
        )
    assert_close(out, exact, same)
    assert (out[:, :, 3] == 0).all()
    assert (grads[0][:, :, 3] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads(backend, device, masked):
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)

    def check(draw):
        torch.manual_seed(draw)
        q, dout = (torch.randn(2, 6, 20, 8, device=device).to(dtype) for _ in range(2))
        k, v = (torch.randn(2, 2, 33, 8, device=device).to(dtype) for _ in range(2))
        mask = torch.randn(6, 20, 33, device=device) if masked else None
        compare(backend, (q, k, v, mask), dout, enable_gqa=True, is_causal=not masked)

    hold_in_most_draws(check)


@pytest.mark.parametrize("value_dim", [5, 24])
def test_value_of_another_width(device, value_dim):
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, n, 16, device=device, requires_grad=True) for n in (7, 9))
    v = torch.randn(2, 3, 9, value_dim, device=device, requires_grad=True)
    results = []
    for function in (bertkern.scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((5, 8), None),
        ((5, 8), (5, 5)),
        ((3, 5, 8), (1, 5, 5)),
        ((3, 5, 8), (3, 1, 5)),
        ((2, 4, 3, 5, 8), (5, 5)),
        ((2, 4, 3, 5, 8), (3, 5, 5)),
        ((2, 4, 3, 5, 8), (4, 1, 5, 5)),
        ((2, 4, 3, 5, 8), (2, 1, 3, 5, 5)),
        ((2, 4, 3, 5, 8), (1, 1, 1, 5, 5)),
    ],
)
def test_any_leading_dimensions(device, shape, mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    attn_mask = None if mask is None else torch.randn(mask, device=device)
    torch.testing.assert_close(
        bertkern.scaled_dot_product_attention(q, k, v, attn_mask),
        F.scaled_dot_product_attention(q, k, v, attn_mask),
    )


@pytest.mark.parametrize("sizes", [(5, 5), (4, 7), (7, 4)])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_biases_of_torch_are_the_masks_they_mean(device, make, sizes):
    """They are tensors that hold no mask: of whatever memory they have, nothing is read."""
    torch.manual_seed(0)
    rows, keys = sizes
    q, k, v = (torch.randn(2, 3, n, 8, device=device) for n in (rows, keys, keys))
    seen = torch.ones(sizes, dtype=torch.bool, device=device)
    seen = seen.tril(keys - rows if make is causal_lower_right else 0)
    expected = F.scaled_dot_product_attention(q, k, v, seen)
    expected = expected.masked_fill(~seen.any(-1)[:, None], 0.0)
    for routed in (False, True):
        with bertkern.integrations.torch.sdpa() if routed else contextlib.nullcontext():
            function = F if routed else bertkern
            out = function.scaled_dot_product_attention(q, k, v, attn_mask=make(*sizes))
        torch.testing.assert_close(out, expected)


def test_a_causal_bias_of_other_sizes_is_refused():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"causal bias of \[4, 5\].*\[4, 4\]"):
        bertkern.scaled_dot_product_attention(q, q, q, attn_mask=causal_upper_left(4, 5))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_with_what_to_do(layout):
    parts = [torch.zeros(3, 2, 8), torch.zeros(5, 2, 8)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    for call in (
        lambda: bertkern.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3),
        lambda: bertkern.attention(x, x, x),
        lambda: bertkern.layer_norm(x),
        lambda: bertkern.linear(x, torch.zeros(4, 8)),
    ):
        with pytest.raises(TypeError, match=r"nested tensor; give its values\(\)"):
            call()


def test_wrong_arguments_are_named():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"attn_mask has shape \[3, 4\]"):
        bertkern.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"attn_mask has dtype torch\.int64"):
        bertkern.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(4, 4).long())
    with pytest.raises(ValueError, match="is_causal=True with an attn_mask"):
        bertkern.scaled_dot_product_attention(q, q, q, torch.zeros(4, 4), is_causal=True)
    with pytest.raises(ValueError, match="multiple"):
        bertkern.scaled_dot_product_attention(
            q, q.repeat(1, 2, 1, 1)[:, :3], q.repeat(1, 2, 1, 1)[:, :3], enable_gqa=True
        )
    with pytest.raises(ValueError, match="enable_gqa"):
        bertkern.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), q, q)
