"""Attention with the heads before the tokens, as `scaled_dot_product_attention` has them: what it
returns is memory of its own, [B, S, H, D] in memory, and no view.

Legend: B batch, S queries, T keys, H heads, G key heads, D head dim.
"""

import pytest
import torch
from torch.nn import functional as F

import bertkern

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

B, S, T, H, D = 2, 5, 7, 4, 8


def heads_first(*shape, dtype=torch.float64, grad=False):
    """A leaf [B, H, S, D] of strides that no layout here has: [S, B, D, H] in memory, every other
    number of it."""
    b, h, s, d = shape
    memory = torch.randn(s, b, 2 * d, h).to(dtype)
    return memory.permute(1, 3, 0, 2)[..., ::2].detach().requires_grad_(grad)


def tokens_first(t):
    """The strides of [B, S, H, D] in memory, the dimensions in the order of t's."""
    return t.transpose(1, 2).contiguous().transpose(1, 2).stride()


# q, k and v as an op finds them: their last dimension contiguous, or to be copied first.
LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "tokens first": lambda b, h, s, d: torch.randn(b, s, h, d).transpose(1, 2),
    "packed": lambda b, h, s, d: torch.randn(b, s, 3, h, d).unbind(2)[1].transpose(1, 2),
    "scattered": lambda *shape: heads_first(*shape, dtype=torch.float32),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("computed_by", ["cpu", "reference"])
def test_output_is_no_view_and_tokens_first_in_memory(computed_by, layout, grad):
    with bertkern.backend(computed_by):
        for shape in ((B, H, S, D), (1, H, S, D), (B, 1, S, D), (B, H, 1, D), (B, H, S, 1)):
            q, k, v = (LAYOUTS[layout](*shape).requires_grad_(grad) for _ in range(3))
            out = bertkern.scaled_dot_product_attention(q, k, v)
            assert out.shape == shape
            assert not out._is_view()
            assert out._base is None
            assert out.transpose(1, 2).is_contiguous()
            assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
            _, h, s, d = shape
            assert out.stride() == (s * h * d, d, h * d, 1)


@pytest.mark.parametrize("computed_by", ["cpu", "reference"])
def test_gradients_are_tokens_first_in_memory(computed_by):
    with bertkern.backend(computed_by):
        q, k, v = (torch.randn(B, H, n, D, requires_grad=True) for n in (S, T, T))
        out = bertkern.scaled_dot_product_attention(q, k, v)
        for t, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert grad.stride() == tokens_first(t)


def test_the_shapes_of_meta_tensors_are_the_memorys():
    real = [torch.randn(B, H, n, D) for n in (S, T, T)]
    out = bertkern.scaled_dot_product_attention(*real)
    meta = bertkern.scaled_dot_product_attention(*(t.to("meta") for t in real))
    assert (meta.shape, meta.stride()) == (out.shape, out.stride())


def test_the_output_may_be_changed_in_place():
    q, k, v = (torch.randn(B, H, S, D) for _ in range(3))
    out = bertkern.scaled_dot_product_attention(q, k, v)
    before, inputs = out.clone(), [t.clone() for t in (q, k, v)]
    out.add_(1).mul_(2)
    assert torch.equal(out, (before + 1) * 2)
    assert all(torch.equal(t, was) for t, was in zip((q, k, v), inputs, strict=True))
    assert torch.equal(bertkern.scaled_dot_product_attention(q, k, v), before)


@pytest.mark.parametrize("change", [lambda out: out.mul_(2), lambda out: out[0].zero_()])
def test_what_the_backward_needs_may_not(change):
    """No view's error ("Output 0 of ... is a view and is being modified inplace"): the change is
    allowed, and the backward finds it."""
    q, k, v = (torch.randn(B, H, S, D, requires_grad=True) for _ in range(3))
    out = bertkern.scaled_dot_product_attention(q, k, v)
    change(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_change_after_a_copy_is_differentiated():
    q, k, v = (torch.randn(B, H, S, D, requires_grad=True) for _ in range(3))
    out = bertkern.scaled_dot_product_attention(q, k, v)
    plain = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    doubled = torch.autograd.grad(out.clone().mul_(2).sum(), (q, k, v))
    for one, other in zip(doubled, plain, strict=True):
        torch.testing.assert_close(one, 2 * other)


# Sizes of each mask: a letter is the dimension's own, "1" broadcasts.
MASKS = {
    "none": None,
    "causal": None,
    "bool": "bhst",
    "bool for all heads": "b1st",
    "bool by key": "b11t",
    "bool by key, of every sequence": "111t",
    "float": "bhst",
    "float by head": "1hst",
    "float by query": "b1s1",
    "float of odd strides": "bhst",
}


def mask_of(name, dtype, sizes):
    if MASKS[name] is None:
        return None
    shape = [dict(zip("bhst1", (*sizes[:4], 1), strict=True))[letter] for letter in MASKS[name]]
    if name.startswith("bool"):
        mask = torch.rand(shape) > 0.3
        mask[..., 0] = True  # torch gives NaN where nothing is seen
        return mask
    if name == "float of odd strides":
        return heads_first(*shape, dtype=dtype, grad=True)
    return torch.randn(shape).to(dtype).requires_grad_()


def inputs_of(mask, key_heads, dtype=torch.float64, sizes=(B, H, S, T, D)):
    """(q, k, v, mask), options, the tensors that a gradient is asked for."""
    b, h, s, t, d = sizes
    q = heads_first(b, h, s, d, dtype=dtype, grad=True)
    k, v = (heads_first(b, key_heads, t, d, dtype=dtype, grad=True) for _ in range(2))
    inputs = (q, k, v, mask_of(mask, dtype, sizes))
    options = {"is_causal": mask == "causal", "enable_gqa": key_heads != h}
    return inputs, options, [t for t in inputs if t is not None and t.requires_grad]


def assert_torchs(mask, key_heads, computed_by, dtype, tolerance):
    inputs, options, wanted = inputs_of(mask, key_heads, dtype)
    dout = heads_first(B, H, S, D, dtype=dtype)
    with bertkern.backend(computed_by):
        ours = bertkern.scaled_dot_product_attention(*inputs, **options)
        grads = torch.autograd.grad(ours, wanted, dout)
    exact = [t if t is None or t.dtype == torch.bool else t.double() for t in inputs]
    torchs = F.scaled_dot_product_attention(*exact, **options)
    expected = torch.autograd.grad(torchs, wanted, dout.double())
    for one, other in zip((ours, *grads), (torchs, *expected), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("key_heads", [H, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_torchs(mask, key_heads):
    assert_torchs(mask, key_heads, "reference", torch.float64, 1e-10)


@pytest.mark.parametrize("key_heads", [H, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_the_kernels_gradients_are_torchs(mask, key_heads):
    assert_torchs(mask, key_heads, "cpu", torch.float32, 1e-5)


@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "bool by key", "float by head"])
def test_second_derivatives(mask, key_heads):
    inputs, options, wanted = inputs_of(mask, key_heads, sizes=(1, 2, 2, 3, 2))
    fixed = inputs[len(wanted) :]

    def function(*leaves):
        return bertkern.scaled_dot_product_attention(*leaves, *fixed, **options)

    assert torch.autograd.gradcheck(function, wanted)
    assert torch.autograd.gradgradcheck(function, wanted)


@pytest.mark.parametrize("mask", ["none", "bool by key", "float by head"])
def test_second_derivatives_of_the_kernels_are_those_of_the_formula(mask):
    """The backward op's own gradients, of a backward that a kernel computed."""
    inputs, options, _ = inputs_of(mask, 2, torch.float32)
    results = []
    for function, dtype in (
        (bertkern.scaled_dot_product_attention, torch.float32),
        (F.scaled_dot_product_attention, torch.float64),
    ):
        values = [
            t if t is None or t.dtype == torch.bool else t.detach().to(dtype).requires_grad_()
            for t in inputs
        ]
        leaves = [v for v in values if v is not None and v.requires_grad]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = function(*values, **options)
            grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            penalty = sum(g.square().sum() for g in grads)
            results.append(torch.autograd.grad(penalty, leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key_heads", [H, 2])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "causal"])  # another corner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_attention_with_the_dimensions_renamed(dtype, mask, key_heads):
    """The same bits as the op on [B, S, H, D]."""
    (q, k, v, made), options, wanted = inputs_of(mask, key_heads, dtype)
    q, k, v = (t.detach().contiguous().requires_grad_() for t in (q, k, v))
    wanted[:3] = (q, k, v)
    dout = heads_first(B, H, S, D, dtype=dtype)
    ours = bertkern.scaled_dot_product_attention(q, k, v, made, **options)
    grads = torch.autograd.grad(ours, wanted, dout)
    renamed = bertkern.attention(*(t.transpose(1, 2) for t in (q, k, v)), bias=made).transpose(1, 2)
    expected = torch.autograd.grad(renamed, wanted, dout)
    if mask.startswith("bool by key"):  # a key padding mask there
        torch.testing.assert_close(ours, renamed)
    else:
        assert all(map(torch.equal, (ours, *grads), (renamed, *expected)))
