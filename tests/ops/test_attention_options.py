"""Attention's masks, bias, window, cap and grouped heads, through the public functions on every
backend, against a formula in fp64."""

import math

import pytest
import torch
from computable import finest_dtype, skip_unless_computable

import bertkern
from bertkern.reference.tolerance import assert_close, hold_in_most_draws

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CUDA_CAPABILITIES = (80, 90)  # Hopper has kernels of its own
B, SQ, SK, D = 3, 37, 41, 16
CASES = {
    "grouped heads": dict(key_heads=2),
    "window": dict(window=(6, 2)),
    "window, causal": dict(window=(9, -1), causal=True),
    "softcap": dict(softcap=1.5),
    "key padding mask": dict(padding=True),
    "key padding mask, causal": dict(padding=True, causal=True),
    "bias": dict(bias=(B, 4, SQ, SK)),
    "bias shared by the batch": dict(bias=(1, 4, SQ, SK)),
    "bias of a query": dict(bias=(4, SQ, 1)),
    "bias of a key": dict(bias=(B, 1, 1, SK)),
    "bool bias": dict(bias=(SQ, SK), bool_bias=True),
    "everything": dict(bias=(1, 4, SQ, SK), padding=True, key_heads=1, window=(20, 5), softcap=2.0),
}


def formula(q, k, v, bias, keys, causal=False, window=(-1, -1), softcap=0.0):
    """out [B, Sq, H, D], 0 for queries that see nothing."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    s = softcap * (s / softcap).tanh() if softcap else s
    i = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1], device=q.device)
    allowed = torch.ones_like(s, dtype=torch.bool)
    if causal or window[1] >= 0:
        allowed = allowed & (j <= i + (0 if causal else window[1]))
    if window[0] >= 0:
        allowed = allowed & (j >= i - window[0])
    if keys is not None:
        allowed = allowed & keys[:, None, None]
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        s = s + bias
    p = s.masked_fill(~allowed, -6e4).softmax(-1).masked_fill(~allowed, 0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@pytest.mark.dtypes_in_turn("attention")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", CASES)
def test_options(backend, device, name, dtype):
    options = CASES[name]
    skip_unless_computable("attention", backend, dtype, device, D)
    given = {key: options[key] for key in ("causal", "window", "softcap") if key in options}

    def check(draw):
        torch.manual_seed(draw)
        heads, key_heads = 4, options.get("key_heads", 4)
        q, dout = (torch.randn(B, SQ, heads, D).to(device, dtype) for _ in range(2))
        k, v = (torch.randn(B, SK, key_heads, D).to(device, dtype) for _ in range(2))
        bias = keys = None
        if "bias" in options:
            bias = torch.randn(options["bias"], device=device)
            bias = bias > -0.5 if options.get("bool_bias") else bias
        if options.get("padding"):
            keys = torch.rand(B, SK, device=device) > 0.3
            keys[0, :20] = False

        def run(function, dtype):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
            if bias is not None and bias.dtype != torch.bool:
                leaves.append(bias.to(torch.float64 if dtype == torch.float64 else bias.dtype))
                leaves[-1] = leaves[-1].detach().requires_grad_()
            out = function(*leaves[:3], leaves[3] if len(leaves) > 3 else bias)
            return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

        exact = run(lambda q, k, v, b: formula(q, k, v, b, keys, **given), torch.float64)
        same = run(
            lambda q, k, v, b: formula(
                q, k, v, b if b is None or b.dtype == torch.bool else b.to(q.dtype), keys, **given
            ),
            dtype,
        )
        with bertkern.backend(backend):
            ours = run(
                lambda q, k, v, b: bertkern.attention(
                    q, k, v, bias=b, key_padding_mask=keys, **given
                ),
                dtype,
            )
        names = ("out", "dq", "dk", "dv", "dbias")
        for what, got, want, plain in zip(names, ours, exact, same, strict=False):
            if what != "dbias":
                got, want, plain = (t.transpose(1, 2) for t in (got, want, plain))
            elif dtype != torch.float32:  # ours is summed in fp32, and so must be no worse
                got = got.to(dtype)
            assert_close(got, want, plain, grad=what != "out", name=what)

    hold_in_most_draws(check)


def test_bias_in_varlen_is_that_of_the_padded_batch(backend, device):
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    lengths = [9, 40, 17]
    padded = [torch.randn(3, 40, 2, 8, device=device, dtype=dtype) for _ in range(3)]
    bias = torch.randn(1, 2, 40, 40, device=device, dtype=dtype, requires_grad=True)
    key_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    cu = torch.nn.functional.pad(key_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    packed = [torch.cat([t[b, :n] for b, n in enumerate(lengths)]) for t in padded]
    with bertkern.backend(backend):
        one = bertkern.attention(*padded, key_lengths=key_lengths, bias=bias)
        one = torch.cat([one[b, :n] for b, n in enumerate(lengths)])
        two = bertkern.attention_varlen(*packed, cu, cu, 40, 40, bias=bias)
        grads = [torch.autograd.grad(out.square().sum(), bias)[0] for out in (one, two)]
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_poison_behind_the_key_padding_mask(backend, device):
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 2, 8, device=device, dtype=dtype) for _ in range(3))
    keys = torch.rand(2, 40, device=device) > 0.4
    keys[1, :11] = False  # left padding

    def run(q, k, v):
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        with bertkern.backend(backend):
            out = bertkern.attention(q, k, v, key_padding_mask=keys, causal=True)
            return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    clean = run(q, k, v)
    for t in (k, v):
        t[~keys] = math.nan
    q[1, :11] = math.inf  # these queries see nothing
    dirty = run(q, k, v)
    for one, two in zip(clean, dirty, strict=True):
        assert torch.equal(one, two)
    assert (dirty[2][~keys] == 0).all()
    assert (dirty[0][1, :11] == 0).all()


def test_gradients_of_gradients_with_every_option(device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, h, 4, dtype=torch.float64, device=device) for h in (4, 2, 2))
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64, device=device)
    keys = torch.tensor([[True, False, True, True, True]], device=device)

    def function(q, k, v, bias):
        return bertkern.attention(
            q, k, v, bias=bias, key_padding_mask=keys, window=(3, 1), softcap=2.0
        )

    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
