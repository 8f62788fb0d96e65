"""Attention in both layouts against fp64, on every backend: outputs, lse, gradients, dropout,
neighbours. Its masks, bias and the like: test_attention_options.py. Over 500 lines: one table of
cases serves every test."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from computable import finest_dtype, skip_unless_computable
from torch.nn import functional as F

import bertkern
from bertkern.reference.dropout import random_bits, threshold_and_scale
from bertkern.reference.tolerance import assert_close, hold_in_most_draws

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SEED = 0x5EED_1234_5678
CUDA_CAPABILITIES = (80, 90)  # Hopper has kernels of its own


def plain_attention(q, k, v, allowed, scale, keep=None, keep_scale=1.0):
    """Softmax attention of one sequence in the inputs' dtype: q [Sq, H, D], allowed bool [Sq,
    Sk]."""
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    s = s.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(s.float() if s.dtype != torch.float64 else s, -1)
    p = torch.softmax(s, -1)
    if keep is not None:
        p = p * keep * keep_scale
    return torch.einsum("hqk,khd->qhd", p, v), lse


def allowed_keys(len_q, len_k, causal, device, longest_k=None):
    """Aligned to the bottom right of the sequence, or of the padded matrix of `longest_k` keys."""
    allowed = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    return allowed.tril((longest_k or len_k) - len_q) if causal else allowed


def keep_mask(sequence, heads, len_q, len_k, p, device):
    index = [torch.arange(n, device=device) for n in (heads, len_q, len_k)]
    bits = random_bits(
        torch.tensor([SEED], device=device),
        torch.tensor(sequence, device=device),
        index[0][:, None, None],
        index[1][None, :, None],
        index[2][None, None, :],
    )
    threshold, scale = threshold_and_scale(p)
    return bits >= threshold, scale


@dataclass(frozen=True)
class Case:
    """One batch of sequences: (query length, key length) of each, and the options."""

    why: str
    lengths: tuple[tuple[int, int], ...]
    heads: int = 2
    head_dim: int = 32
    causal: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    longest_k: int | None = None  # keys of the padded layout


CASES = [
    Case("odd lengths, not a tile", ((37, 53), (5, 3))),
    Case("causal, Sq = Sk, several tiles", ((67, 67), (64, 64)), causal=True),
    Case("causal, fewer queries than keys: bottom right", ((9, 41), (17, 33)), causal=True),
    Case(
        "causal, more queries than keys: the first rows see nothing",
        ((41, 9), (33, 33)),
        causal=True,
    ),
    Case("empty sequences", ((0, 0), (7, 7), (0, 5), (4, 0)), heads=1),
    Case("head dim 1", ((64, 23),), head_dim=1),
    Case("head dim 20: neither a power of two nor of 8", ((19, 23),), head_dim=20),
    Case("head dim 64", ((70, 130),), head_dim=64, heads=1),
    Case("head dim 80, causal", ((35, 35),), head_dim=80, heads=1, causal=True),
    Case("head dim 128", ((33, 65),), head_dim=128, heads=1),
    Case("head dim 256", ((17, 40),), head_dim=256, heads=1),
    Case("dropout", ((37, 53), (40, 20)), heads=3, dropout_p=0.2),
    Case("dropout and causal", ((66, 66),), dropout_p=0.5, causal=True),
    Case("everything dropped", ((5, 7),), dropout_p=1.0),
    Case("scale given", ((20, 30),), scale=0.5),
    Case("negative scale", ((20, 30),), scale=-0.3),
]


def random_inputs(case, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total_q, total_k = (sum(pair[i] for pair in case.lengths) for i in (0, 1))
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    shape = (case.heads, case.head_dim)
    q, k, v = make(total_q, *shape), make(total_k, *shape), make(total_k, *shape)
    return q, k, v, make(total_q, *shape), make(case.heads, total_q).float()


def expected(case, q, k, v, dout, dlse, dtype):
    """Out, lse and gradients by plain torch in `dtype`, sequence by sequence."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    outs, lses, at_q, at_k = [], [], 0, 0
    for sequence, (len_q, len_k) in enumerate(case.lengths):
        part_q, part_k = slice(at_q, at_q + len_q), slice(at_k, at_k + len_k)
        at_q, at_k = part_q.stop, part_k.stop
        allowed = allowed_keys(len_q, len_k, case.causal, q.device, case.longest_k)
        keep, keep_scale = None, 1.0
        if case.dropout_p:
            keep, keep_scale = keep_mask(
                sequence, case.heads, len_q, len_k, case.dropout_p, q.device
            )
        # Rows that see nothing: torch gives NaN; the rule of the house is out 0, lse -inf, gradient
        # 0.
        seen = allowed.any(-1)
        out = torch.zeros(len_q, case.heads, case.head_dim, dtype=dtype, device=q.device)
        lse = torch.full((case.heads, len_q), float("-inf"), dtype=torch.float64, device=q.device)
        if seen.any():
            some_keep = keep[:, seen] if keep is not None else None
            some_out, some_lse = plain_attention(
                q[part_q][seen], k[part_k], v[part_k], allowed[seen], scale, some_keep, keep_scale
            )
            out = out.index_put((seen.nonzero()[:, 0],), some_out)
            lse = lse.index_put(
                (
                    torch.arange(case.heads, device=q.device)[:, None],
                    seen.nonzero()[:, 0][None],
                ),
                some_lse.double(),
            )
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    loss = (out * dout.to(dtype)).sum().double()
    loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * dlse).sum()
    grads = torch.autograd.grad(loss, (q, k, v), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, (q, k, v), strict=True)]
    return out, lse, grads


def check(case, dtype, run, q, k, v, dout, dlse):
    """Holds run(q, k, v) -> (out, lse) and its gradients to the tolerance rule."""
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = run(*inputs)
    loss = (out.float() * dout.float()).sum() + (lse.masked_fill(lse.isinf(), 0.0) * dlse).sum()
    grads = torch.autograd.grad(loss, inputs)
    exact = expected(case, q, k, v, dout, dlse, torch.float64)
    same = expected(case, q, k, v, dout, dlse, dtype)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    heads_first = lambda t: t.transpose(0, 1)  # noqa: E731
    assert_close(heads_first(out), heads_first(exact[0]), heads_first(same[0]))
    assert torch.equal(lse.isinf(), exact[1].isinf())
    finite = ~exact[1].isinf()
    torch.testing.assert_close(
        lse[finite].double(),
        exact[1][finite],
        atol=3e-6 if dtype == torch.float32 else 3e-3,
        rtol=1e-5,
    )
    for name, grad, exact_grad, same_grad in zip("qkv", grads, exact[2], same[2], strict=True):
        assert grad.dtype == dtype
        assert_close(
            heads_first(grad),
            heads_first(exact_grad),
            heads_first(same_grad),
            grad=True,
            name=f"d{name}",
        )


@pytest.mark.dtypes_in_turn("attention")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_varlen(backend, device, case, dtype):
    skip_unless_computable("attention", backend, dtype, device, case.head_dim)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    cu = F.pad(lengths.cumsum(0, dtype=torch.int32), (0, 0, 1, 0)).to(device)
    seed = torch.tensor([SEED], device=device)

    def run(q, k, v):
        return bertkern.attention_varlen(
            q,
            k,
            v,
            cu[:, 0],
            cu[:, 1],
            int(lengths[:, 0].max()),
            int(lengths[:, 1].max()),
            causal=case.causal,
            dropout_p=case.dropout_p,
            dropout_seed=seed,
            scale=case.scale,
            return_lse=True,
        )

    with bertkern.backend(backend):
        hold_in_most_draws(
            lambda draw: check(case, dtype, run, *random_inputs(case, dtype, device, seed=2 * draw))
        )


@pytest.mark.dtypes_in_turn("attention")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_batched_with_key_lengths(backend, device, case, dtype):
    """The same sequences padded to [B, S, H, D]; what lies behind the lengths is NaN and Inf."""
    skip_unless_computable("attention", backend, dtype, device, case.head_dim)
    len_q = {pair[0] for pair in case.lengths}
    if (
        len(len_q) > 1
    ):  # the batched layout has one query length: take each sequence's keys for the longest
        case = replace(case, lengths=tuple((max(len_q), pair[1]) for pair in case.lengths))
    batch, len_q = len(case.lengths), case.lengths[0][0]
    key_lengths = torch.tensor([pair[1] for pair in case.lengths], dtype=torch.int32)
    longest = int(key_lengths.max()) + 3
    case = replace(case, longest_k=longest)
    seed = torch.tensor([SEED], device=device)
    behind = torch.arange(longest)[None] >= key_lengths[:, None]

    def padded(t):
        poison = torch.full(
            (batch, longest, *t.shape[1:]), float("nan"), dtype=t.dtype, device=device
        )
        poison[:, 1::2] = float("inf")
        return poison.index_put(tuple((~behind).nonzero().t().to(device)), t)

    def run(q, k, v):
        out, lse = bertkern.attention(
            q.reshape(batch, len_q, *q.shape[1:]),
            padded(k),
            padded(v),
            key_lengths=key_lengths.to(device),
            causal=case.causal,
            dropout_p=case.dropout_p,
            dropout_seed=seed,
            scale=case.scale,
            return_lse=True,
        )
        return out.reshape(q.shape), lse.transpose(0, 1).reshape(case.heads, -1)

    with bertkern.backend(backend):
        hold_in_most_draws(
            lambda draw: check(
                case, dtype, run, *random_inputs(case, dtype, device, seed=2 * draw + 1)
            )
        )


@pytest.mark.usefixtures("nan_filled_memory")
def test_one_key(backend, device):
    """Softmax over one key is 1: out = v and dv = dout to the bit, dq and dk are 0 up to rounding.

    Plain torch gets an exact 0 here, which no kernel with ds = p (dp − delta) can: dp and delta are
    the same sum of D products, added in two orders. The bound is that of the two sums.
    """
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    head_dim = 32
    q, k, v, dout = (torch.randn(5, 1, 2, head_dim, device=device, dtype=dtype) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_()
    with bertkern.backend(backend):
        out = bertkern.attention(q, k, v)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(out, v, rtol=2e-7, atol=0)
    torch.testing.assert_close(dv, dout, rtol=2e-7, atol=0)
    eps = torch.finfo(dtype).eps
    ds_bound = 4 * eps * (dout.abs() * v.abs()).sum(-1, keepdim=True) / head_dim**0.5
    assert (dq.abs() <= ds_bound * k.abs()).all()
    assert (dk.abs() <= ds_bound * q.abs()).all()


def test_tokens_behind_the_last_sequence_give_zero(backend, device):
    """A fixed token budget: rows past cu_seqlens[-1] hold NaN, and give 0 and no gradient."""
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    q, k, v = (torch.randn(50, 2, 16, device=device, dtype=dtype) for _ in range(3))
    for t in (q, k, v):
        t[40:] = float("nan")
        t.requires_grad_()
    cu = torch.tensor([0, 15, 40], dtype=torch.int32, device=device)
    with bertkern.backend(backend):
        out = bertkern.attention_varlen(q, k, v, cu, cu, 25, 25)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for t in (out, *grads):
        assert (t[40:] == 0).all()
        assert t[:40].isfinite().all()


def test_nan_inside_a_sequence_stays_in_it_and_propagates(backend, device):
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    q, k, v = (torch.randn(60, 1, 32, device=device, dtype=dtype) for _ in range(3))
    k[25, 0, 3] = float("nan")
    cu = torch.tensor([0, 20, 40, 60], dtype=torch.int32, device=device)
    with bertkern.backend(backend):
        out = bertkern.attention_varlen(q, k, v, cu, cu, 20, 20)
    assert out[20:40].isnan().all()
    assert out[:20].isfinite().all()
    assert out[40:].isfinite().all()


@pytest.mark.parametrize("keys", [128, 200])
def test_infinite_key_gives_nan_nowhere(backend, device, keys):
    """Its scores are -Inf, so nobody attends to it; nor do rows behind the last query."""
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device, 64)
    q = torch.rand(1, 60, 2, 64, device=device).add(0.1).to(dtype).requires_grad_()
    k, v = (torch.randn(1, keys, 2, 64, device=device).to(dtype) for _ in range(2))
    k[0, 7, 0, 3] = -math.inf
    k, v = k.requires_grad_(), v.requires_grad_()
    with bertkern.backend(backend):
        out = bertkern.attention(q, k, v)
        _, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert out.isfinite().all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize(
    ("cu", "longest", "dim"),
    [([0, 0, 0], (0, 0), 128), ([0, 0], (0, 200), 64), ([0], (0, 200), 64)],
)
def test_nothing_but_tokens_behind_the_last_sequence(backend, device, cu, longest, dim):
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device, dim)
    q, k, v = (torch.full((5, 2, dim), math.nan, dtype=dtype, device=device) for _ in range(3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    cu = torch.tensor(cu, dtype=torch.int32, device=device)
    with bertkern.backend(backend):
        out = bertkern.attention_varlen(*leaves, cu, cu, *longest)
        grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    for t in (out, *grads):
        assert (t == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_padded_and_unpadded_are_the_same(backend, device, causal):
    """The mask depends on logical coordinates only; so do the results, bit for bit, causal or
    not."""
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    lengths = [17, 40, 5]
    padded = [torch.randn(3, 40, 2, 16, device=device, dtype=dtype) for _ in range(3)]
    packed = [torch.cat([t[b, :n] for b, n in enumerate(lengths)]) for t in padded]
    key_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    cu = F.pad(key_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    seed = torch.tensor([SEED], device=device)
    options = {"dropout_p": 0.3, "dropout_seed": seed, "causal": causal}
    with bertkern.backend(backend):
        a = bertkern.attention(*padded, key_lengths=key_lengths, **options)
        b = bertkern.attention_varlen(*packed, cu, cu, 40, 40, **options)
    torch.testing.assert_close(
        torch.cat([a[i, :n] for i, n in enumerate(lengths)]), b, rtol=0, atol=0
    )


def test_backends_drop_the_same(backend, device):
    """Uniform attention over unit values shows the mask itself: every backend's equals the
    reference's."""
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    heads, len_q, len_k, p = 2, 40, 33, 0.35
    q = torch.zeros(2, len_q, heads, 64, device=device, dtype=dtype)
    k = torch.zeros(2, len_k, heads, 64, device=device, dtype=dtype)
    v = torch.eye(len_k, 64, device=device, dtype=dtype)[None, :, None].expand(2, len_k, heads, 64)
    with bertkern.backend(backend):
        out = bertkern.attention(
            q,
            k,
            v,
            dropout_p=p,
            dropout_seed=torch.tensor([SEED], device=device),
            sequence_offset=7,
        )
    for sequence in range(2):
        keep, _ = keep_mask(sequence + 7, heads, len_q, len_k, p, device)
        got = out[sequence, :, :, :len_k].transpose(0, 1) > 0
        assert torch.equal(got, keep)


def test_a_sequence_does_not_feel_its_batch(backend, device):
    """Output and gradients of a sequence alone and in a batch are the same bits."""
    dtype = finest_dtype(backend)
    skip_unless_computable("attention", backend, dtype, device)
    torch.manual_seed(0)
    lengths = [33, 90, 12]
    tensors = [torch.randn(sum(lengths), 2, 32, device=device, dtype=dtype) for _ in range(4)]

    def run(tensors, lengths):
        cu = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        cu = cu.to(device)
        q, k, v = (t.detach().clone().requires_grad_() for t in tensors[:3])
        out = bertkern.attention_varlen(q, k, v, cu, cu, max(lengths), max(lengths))
        return out, *torch.autograd.grad(out, (q, k, v), tensors[3])

    with bertkern.backend(backend):
        together = run(tensors, lengths)
        alone = run([t[33:123] for t in tensors], [90])
        again = run(tensors, lengths)
    for whole, part, repeat in zip(together, alone, again, strict=True):
        assert torch.equal(whole[33:123], part)
        assert torch.equal(whole, repeat)


def test_unseeded_dropout_follows_manual_seed(device):
    q = torch.randn(1, 20, 2, 16, device=device)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(bertkern.attention(q, q, q, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


GOOD = {"q": (2, 5, 3, 8), "k": (2, 6, 3, 8), "v": (2, 6, 3, 8)}
BAD_CALLS = [
    ({"q": (5, 3, 8)}, {}, ValueError, "q has shape"),
    ({"k": (2, 6, 3, 7), "v": (2, 6, 3, 7)}, {}, ValueError, "head dim"),
    ({"v": (2, 7, 3, 8)}, {}, ValueError, "v has shape"),
    ({"k": (3, 6, 3, 8), "v": (3, 6, 3, 8)}, {}, ValueError, "batch 3"),
    ({"k": (2, 6, 2, 8), "v": (2, 6, 2, 8)}, {}, ValueError, "multiple of"),
    ({"q": (2, 5, 3, 300), "k": (2, 6, 3, 300), "v": (2, 6, 3, 300)}, {}, ValueError, "1 to 256"),
    ({}, {"dropout_p": 1.5}, ValueError, "dropout_p=1.5"),
    ({}, {"dropout_p": 0.1, "dropout_seed": 3}, TypeError, "dropout_seed"),
    ({}, {"dropout_p": 0.1, "dropout_seed": torch.zeros(2)}, ValueError, "int64"),
    ({}, {"key_lengths": torch.tensor([1, 2])}, TypeError, "torch.int32"),
    (
        {},
        {"key_lengths": torch.tensor([1], dtype=torch.int32)},
        ValueError,
        "key_lengths has shape",
    ),
    ({}, {"bias": torch.zeros(5, 5)}, ValueError, r"bias has shape \[5, 5\]"),
    ({}, {"bias": torch.zeros(1, 2, 3, 5, 6)}, ValueError, "bias has shape"),
    ({}, {"bias": torch.zeros(5, 6).half()}, TypeError, r"bias has dtype torch\.float16"),
    ({}, {"bias": [0.0]}, TypeError, "bias must be a torch.Tensor, not list"),
    ({}, {"window": 4}, TypeError, r"window=4; it must be None or \(left, right\)"),
    ({}, {"window": (4, -2)}, ValueError, r"window=\(4, -2\)"),
    ({}, {"softcap": -20.0}, ValueError, r"softcap=-20\.0"),
    ({}, {"key_padding_mask": torch.ones(2, 6)}, TypeError, r"torch\.bool"),
    (
        {},
        {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        "key_padding_mask has shape",
    ),
]


@pytest.mark.parametrize(("shapes", "options", "error", "message"), BAD_CALLS)
def test_wrong_arguments_are_named(shapes, options, error, message):
    tensors = {name: torch.zeros(shape) for name, shape in (GOOD | shapes).items()}
    with pytest.raises(error, match=message):
        bertkern.attention(tensors["q"], tensors["k"], tensors["v"], **options)


def test_wrong_dtypes_are_named():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(TypeError, match=r"k has dtype torch\.float16, but q has torch\.float32"):
        bertkern.attention(q, q.half(), q)
    with pytest.raises(TypeError, match="int64"):
        bertkern.attention(q.long(), q.long(), q.long())
    with pytest.raises(TypeError, match="ndarray"):
        bertkern.attention(q.numpy(), q, q)


def test_varlen_wants_lengths_as_ints():
    q, cu = torch.zeros(4, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match="max_seqlen_q is a tensor"):
        bertkern.attention_varlen(q, q, q, cu, cu, torch.tensor(4), 4)
    with pytest.raises(ValueError, match="cu_seqlens_k has shape"):
        bertkern.attention_varlen(q, q, q, cu, torch.tensor([0, 2, 4], dtype=torch.int32), 4, 4)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", ["cuda", "cpu", "triton", "reference"])
@pytest.mark.usefixtures("nan_filled_memory")
def test_keys_without_query_heads_have_gradients_of_zero(name, with_bias, device):
    dtype = finest_dtype(name)
    skip_unless_computable("attention", name, dtype, device, 8)
    q = torch.randn(2, 5, 0, 8, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(2, 5, 2, 8, device=device, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    leaves = [q, k, v]
    if with_bias:
        leaves.append(torch.randn(1, 1, 5, 5, device=device, requires_grad=True))
    with bertkern.backend(name):
        out = bertkern.attention(q, k, v, bias=leaves[3] if with_bias else None)
        grads = torch.autograd.grad(out.sum(), leaves)
    for grad, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(leaf))
