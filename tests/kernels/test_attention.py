"""Attention's Triton kernels against the formula in fp64, by the rule of tests/tolerance.py.

Tiles of the interpreter are 16 to 32 wide, so lengths of 33 and 50 have whole blocks and tails.
"""

import math

import numpy as np
import pytest
import torch
from bertkern.kernels.attention import attention_bwd, attention_fwd
from tolerance import assert_close, hold_in_most_draws

from bertkern.reference.dropout import random_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

fp32, fp16 = torch.float32, torch.float16
SEED, OFFSET = 12345678901234, 3


def keep_factors(sequence, heads, len_q, len_k, p):
    """Dropout factors [H, len_q, len_k] of one sequence, fp64."""
    threshold = round(p * 65536)
    index = [torch.arange(n) for n in (heads, len_q, len_k)]
    bits = random_bits(
        torch.tensor(SEED),
        torch.tensor(sequence + OFFSET),
        index[0][:, None, None],
        index[1][:, None],
        index[2],
    )
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return (bits >= threshold).double() * scale


def formula(q, k, v, diagonal, scale, keep):
    """(out [Sq, H, D], lse [H, Sq]) of one sequence; diagonal None: every key is allowed."""
    len_q, len_k = q.shape[0], k.shape[0]
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    allowed = torch.ones(len_q, len_k, dtype=torch.bool)
    if diagonal is not None:
        allowed = torch.arange(len_k) <= torch.arange(len_q)[:, None] + diagonal
    s = s.masked_fill(~allowed, -math.inf)
    lse = s.logsumexp(-1) if len_k else s.new_full(s.shape[:2], -math.inf)
    p = torch.where(allowed, (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp(), 0)
    if keep is not None:
        p = p * keep.to(p.dtype)
    return torch.einsum("hqk,khd->qhd", p, v), lse


class Problem:
    """Inputs of one case, in the batched or the varlen layout."""

    def __init__(self, device, dim, dtype, lens_q, lens_k, causal=0, p=0.0, heads=2, varlen=False,
                 key_lengths=None, scale=None, slack=0, transposed=False,
                 use_dlse=True):  # fmt: skip
        self.device, self.dtype, self.causal, self.p, self.varlen = device, dtype, causal, p, varlen
        self.lens_q, self.lens_k = lens_q, key_lengths or lens_k
        self.scale = dim**-0.5 if scale is None else scale
        self.heads, batch = heads, len(lens_q)
        self.max_q, self.max_k = max(lens_q), max(lens_k)
        self.key_lengths = self.cu_q = self.cu_k = None

        def tensor(lens):
            if varlen:
                return torch.randn(sum(lens) + slack, heads, dim).to(device, dtype)
            if transposed:  # as torch's SDPA is called: [B, H, S, D] seen as [B, S, H, D]
                return torch.randn(batch, heads, lens[0], dim).to(device, dtype).transpose(1, 2)
            return torch.randn(batch, lens[0], heads, dim).to(device, dtype)

        def int32(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.q, self.k, self.v = tensor(lens_q), tensor(lens_k), tensor(lens_k)
        self.dout = tensor(lens_q)
        if varlen:
            self.starts_q = [sum(lens_q[:i]) for i in range(batch + 1)]
            self.starts_k = [sum(lens_k[:i]) for i in range(batch + 1)]
            self.cu_q, self.cu_k = int32(self.starts_q), int32(self.starts_k)
        elif key_lengths is not None:
            self.key_lengths = int32(key_lengths)
        lse_shape = (heads, self.q.shape[0]) if varlen else (batch, heads, lens_q[0])
        self.dlse = torch.randn(lse_shape, device=device) if use_dlse else None
        self.seed = torch.tensor([SEED], device=device) if p else None

    def run(self):
        """(out, lse, dq, dk, dv) of the kernels."""
        options = (self.cu_q, self.cu_k, self.key_lengths, self.seed, self.max_q, self.max_k,
                   self.causal, self.p, self.scale, OFFSET)  # fmt: skip
        out, lse = attention_fwd(self.q, self.k, self.v, *options)
        grads = attention_bwd(self.dout, self.q, self.k, self.v, out, lse, self.dlse, *options)
        return out, lse, *grads

    def parts(self, b):
        """Sequence b's slices: (queries, keys, index of dlse)."""
        if not self.varlen:
            return (b, slice(None)), (b, slice(self.lens_k[b])), (b,)
        queries = slice(self.starts_q[b], self.starts_q[b + 1])
        keys = slice(self.starts_k[b], self.starts_k[b + 1])
        return (queries,), (keys,), (slice(None), queries)

    def expected(self, dtype):
        """For each sequence (out, lse, dq, dk, dv) by the formula in `dtype`."""
        results = []
        for b in range(len(self.lens_q)):
            at_q, at_k, at_lse = self.parts(b)
            q, k, v = (
                t[at].detach().cpu().to(dtype).requires_grad_()
                for t, at in ((self.q, at_q), (self.k, at_k), (self.v, at_k))
            )
            len_q, len_k = q.shape[0], k.shape[0]
            diagonal = {0: None, 1: len_k - len_q, 2: 0}[self.causal]
            if self.causal == 1 and not self.varlen:
                diagonal = self.max_k - self.max_q
            keep = keep_factors(b, self.heads, len_q, len_k, self.p) if self.p else None
            out, lse = formula(q, k, v, diagonal, self.scale, keep)
            loss = (out * self.dout[at_q].cpu().to(dtype)).sum()
            if self.dlse is not None:
                seen = lse > -math.inf
                loss = loss + (lse[seen] * self.dlse[at_lse].cpu().to(dtype)[seen]).sum()
            results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
        return results

    def check(self):
        got, wanted, plain = self.run(), self.expected(torch.float64), self.expected(self.dtype)
        for b, (ref64, same) in enumerate(zip(wanted, plain, strict=True)):
            at_q, at_k, at_lse = self.parts(b)
            names = ("out", "lse", "dq", "dk", "dv")
            for name, at, t, want, like in zip(
                names, (at_q, at_lse, at_q, at_k, at_k), got, ref64, same, strict=True
            ):
                if name == "lse":
                    empty = want == -math.inf
                    assert torch.equal(t[at].cpu() == -math.inf, empty)
                    lse, want, like = (
                        x.cpu().double().masked_fill(empty, 0) for x in (t[at], want, like)
                    )
                    assert_close(
                        lse.float()[..., None], want[..., None], like[..., None], name=name
                    )
                else:  # rows of each head: [S, H, D] -> [H, S, D]
                    assert_close(*(x.transpose(0, 1) for x in (t[at].cpu(), want, like)),
                                 grad=name != "out", name=f"{name}[{b}]")  # fmt: skip
        return got


CASES = {
    "bert": dict(dim=64, dtype=fp32, lens_q=[50, 50], lens_k=[50, 50], p=0.1),
    "bert fp16": dict(dim=64, dtype=fp16, lens_q=[50], lens_k=[50], p=0.1),
    "no dlse": dict(dim=32, dtype=fp32, lens_q=[33], lens_k=[33], use_dlse=False),
    "one column": dict(dim=1, dtype=fp32, lens_q=[33, 33], lens_k=[33, 33]),
    "one query": dict(dim=32, dtype=fp32, lens_q=[1, 1], lens_k=[33, 33]),
    "one key": dict(dim=8, dtype=fp16, lens_q=[20], lens_k=[1], causal=1),
    "padded head dims": dict(dim=20, dtype=fp32, lens_q=[18], lens_k=[35], causal=1, p=0.5),
    "D 80": dict(dim=80, dtype=fp16, lens_q=[17], lens_k=[20], heads=1),
    "D 96": dict(dim=96, dtype=fp32, lens_q=[17], lens_k=[20], causal=2, heads=1),
    "D 128": dict(dim=128, dtype=fp16, lens_q=[33], lens_k=[17], heads=1),
    "D 256": dict(dim=256, dtype=fp32, lens_q=[17], lens_k=[33], heads=1),
    "bottom right, rows without keys": dict(dim=16, dtype=fp32, lens_q=[50], lens_k=[21], causal=1),
    "bottom right": dict(dim=16, dtype=fp16, lens_q=[21], lens_k=[50], causal=1),
    "top left, keys without queries": dict(dim=16, dtype=fp32, lens_q=[21], lens_k=[50], causal=2),
    "top left": dict(dim=16, dtype=fp32, lens_q=[50], lens_k=[21], causal=2, p=0.2),
    "lengths": dict(
        dim=16, dtype=fp32, lens_q=[20] * 4, lens_k=[40] * 4, key_lengths=[40, 0, 17, 3]
    ),
    "lengths, causal": dict(
        dim=16, dtype=fp32, lens_q=[40] * 3, lens_k=[40] * 3, key_lengths=[33, 0, 5],
        causal=1, p=0.1,
    ),
    "transposed": dict(dim=16, dtype=fp32, lens_q=[20] * 2, lens_k=[30] * 2, transposed=True),
    "varlen": dict(
        dim=16, dtype=fp32, lens_q=[7, 0, 33, 20], lens_k=[40, 5, 33, 0], varlen=True, slack=40,
        p=0.1,
    ),
    "varlen, causal": dict(
        dim=32, dtype=fp16, lens_q=[33, 5, 16], lens_k=[20, 33, 16], varlen=True, causal=1
    ),
    "negative scale": dict(dim=16, dtype=fp32, lens_q=[20], lens_k=[20], scale=-0.7, causal=1),
    "zero scale": dict(dim=16, dtype=fp32, lens_q=[20], lens_k=[20], scale=0.0, causal=1),
    "everything dropped": dict(dim=16, dtype=fp32, lens_q=[20], lens_k=[20], p=1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_formula(device, name):
    def check(draw):
        torch.manual_seed(len(name) + 1000 * draw)
        problem = Problem(device, **CASES[name])
        check_slack(problem, problem.check())

    hold_in_most_draws(check)


def check_slack(problem, got):
    """Tokens and keys that belong to no sequence get zeros."""
    out, lse, dq, dk, dv = got
    if problem.varlen:
        end_q, end_k = problem.starts_q[-1], problem.starts_k[-1]
        assert (lse[:, end_q:] == -math.inf).all()
        assert all(
            (t[end:] == 0).all() for t, end in ((out, end_q), (dq, end_q), (dk, end_k), (dv, end_k))
        )
    if problem.key_lengths is not None:
        for grad in (dk, dv):
            assert all((grad[b, n:] == 0).all() for b, n in enumerate(problem.lens_k))


def poison(t, *indices):
    """NaN and Inf by turns in the given rows."""
    bad = torch.tensor([math.nan, math.inf, -math.inf], device=t.device).to(t.dtype)
    for index in indices:
        t[index] = bad[torch.arange(t[index].numel(), device=t.device) % 3].view_as(t[index])


def test_poisoned_padding_changes_nothing(device):
    problem = Problem(device, 16, fp32, [20] * 3, [40] * 3, key_lengths=[33, 0, 5], p=0.1)
    clean = problem.run()
    for t in (problem.k, problem.v):
        poison(t, *((b, slice(n, None)) for b, n in enumerate(problem.lens_k)))
    assert all(map(torch.equal, problem.run(), clean))


@pytest.mark.parametrize("causal", [0, 1])
def test_poisoned_slack_and_neighbour_change_nothing(device, causal):
    problem = Problem(
        device, 16, fp32, [19, 5, 33], [19, 20, 33], varlen=True, slack=20, causal=causal
    )
    clean = problem.run()
    at_q, at_k, _ = problem.parts(1)
    for t in (problem.q, problem.dout):
        poison(t, at_q, slice(57, None))
    for t in (problem.k, problem.v):
        poison(t, at_k, slice(72, None))
    dirty = problem.run()
    for b in (0, 2):
        at_q, at_k, at_lse = problem.parts(b)
        for at, one, two in zip((at_q, at_lse, at_q, at_k, at_k), clean, dirty, strict=True):
            assert torch.equal(one[at], two[at])
    assert (dirty[0][57:] == 0).all()
    assert all((t[72:] == 0).all() for t in dirty[3:])


def test_poison_where_the_causal_mask_leaves_nothing(device):
    # Bottom right, Sq > Sk: the first queries see no key.
    problem = Problem(device, 16, fp32, [50], [20], causal=1, use_dlse=False)
    clean = problem.run()
    poison(problem.q, (0, slice(30)))
    poison(problem.dout, (0, slice(30)))
    assert all(map(torch.equal, problem.run(), clean))
    # Top left, Sk > Sq: the last keys are seen by no query.
    problem = Problem(device, 16, fp32, [21], [50], causal=2)
    clean = problem.run()
    poison(problem.k, (0, slice(21, None)))
    poison(problem.v, (0, slice(21, None)))
    assert all(map(torch.equal, problem.run(), clean))


def test_nan_and_inf_inside_propagate(device):
    problem = Problem(device, 16, fp32, [20] * 2, [20] * 2, heads=1)
    problem.k[0, 3, 0, 5] = math.nan
    out = problem.run()[0]
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    problem.k[0, 3, 0, 5] = 1.0
    problem.q[0, 2, 0] = math.inf
    assert problem.run()[0][0, 2].isnan().all()


def test_batch_invariance_and_determinism(device):
    torch.manual_seed(0)
    lens = [33, 7, 50]
    batch = Problem(device, 32, fp32, lens, lens, varlen=True, causal=1, use_dlse=False)
    together = batch.run()
    assert all(map(torch.equal, batch.run(), together))
    for b, n in enumerate(lens):
        at_q, _, at_lse = batch.parts(b)
        alone = Problem(device, 32, fp32, [n], [n], causal=1, use_dlse=False)
        alone.q, alone.k, alone.v, alone.dout = (
            t[at_q][None] for t in (batch.q, batch.k, batch.v, batch.dout)
        )
        for at, one, two in zip(
            (at_q, at_lse, at_q, at_q, at_q), together, alone.run(), strict=True
        ):
            assert torch.equal(one[at], two[0])


def test_dropout_is_the_same_padded_and_unpadded(device):
    torch.manual_seed(0)
    lens = [33, 7]
    packed = Problem(device, 16, fp32, lens, lens, varlen=True, p=0.3)
    padded = Problem(device, 16, fp32, [33] * 2, [33] * 2, p=0.3, key_lengths=lens)
    for b, n in enumerate(lens):
        for name in "qkv":
            getattr(padded, name)[b, :n] = getattr(packed, name)[packed.parts(b)[0]]
    one, two = packed.run()[0], padded.run()[0]
    for b, n in enumerate(lens):
        assert torch.equal(one[packed.parts(b)[0]], two[b, :n])


def test_offsets_beyond_2_31_elements(device):
    """int32 offsets wrap: the second sequence and the last head lie 2^31 elements away.

    numpy's zeros are pages that do not exist until they are touched.
    """
    far, (s, h, d) = 2**31 + 8, (5, 2, 8)
    try:
        memory = torch.from_numpy(np.zeros(2 * far + h * d * s, np.float16)).to(device)
    except (MemoryError, RuntimeError) as error:
        pytest.skip(f"no address space: {error}")
    problem = Problem(device, d, fp16, [s] * 2, [s] * 2, use_dlse=False)
    near = problem.run()
    view = memory.as_strided((2, s, h, d), (far, d, far - 4096, 1))
    view.copy_(problem.k)
    problem.k = view
    assert all(map(torch.equal, problem.run(), near))


def test_expanded_gradient_and_empty_sizes(device):
    problem = Problem(device, 16, fp32, [20], [20], use_dlse=False)
    problem.dout = torch.ones(1, device=device).expand(1, 20, 2, 16)  # as sum().backward() makes it
    expanded = problem.run()
    problem.dout = problem.dout.contiguous()
    assert all(map(torch.equal, problem.run(), expanded))
    no_keys = Problem(device, 16, fp32, [5], [5])
    no_keys.k, no_keys.v = no_keys.k[:, :0], no_keys.v[:, :0]
    out, lse, dq, dk, dv = no_keys.run()
    assert (out == 0).all()
    assert (dq == 0).all()
    assert (lse == -math.inf).all()
    assert dk.shape == dv.shape == (1, 0, 2, 16)
    nothing = Problem(device, 16, fp32, [5], [5])
    for name in ("q", "dout"):
        setattr(nothing, name, getattr(nothing, name)[:, :0])
    nothing.dlse = None
    out, lse, dq, dk, dv = nothing.run()
    assert out.shape == (1, 0, 2, 16)
    assert (dk == 0).all()
    assert (dv == 0).all()
