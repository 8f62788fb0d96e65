"""Attention's Triton kernels against the formula in fp64, by the house's tolerance rule.

Tiles of the interpreter are 16 to 32 wide, so lengths of 33 and 50 have whole blocks and tails.
"""

import math

import numpy as np
import pytest
import torch
from bertkern.kernels.attention import attention_bwd, attention_fwd

from bertkern.reference.dropout import random_bits
from bertkern.reference.tolerance import assert_close, hold_in_most_draws

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


def formula(q, k, v, allowed, scale, softcap, bias, keep):
    """(out [Sq, H, D], lse [H, Sq]) of one sequence; allowed bool [Sq, Sk], bias [H, Sq, Sk]."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        s = softcap * (s / softcap).tanh()
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        allowed = allowed & (bias > -math.inf)
        s = s + bias.masked_fill(bias == -math.inf, 0)
    s = s.masked_fill(~allowed, -math.inf)
    lse = s.logsumexp(-1) if k.shape[0] else s.new_full(s.shape[:2], -math.inf)
    p = torch.where(allowed, (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp(), 0)
    if keep is not None:
        p = p * keep.to(p.dtype)
    return torch.einsum("hqk,khd->qhd", p, v), lse


class Problem:
    """Inputs of one case, in the batched or the varlen layout."""

    def __init__(self, device, dim, dtype, lens_q, lens_k, causal=0, p=0.0, heads=2, varlen=False,
                 key_lengths=None, scale=None, slack=0, transposed=False, use_dlse=True,
                 key_heads=None, window=(-1, -1), softcap=0.0, bias=None, masked_out=0.0,
                 padding=0.0):  # fmt: skip
        """bias: its shape, or "bool" and its shape; masked_out, padding: shares of -inf or False in
        the bias and of keys that key_padding_mask takes away."""
        self.device, self.dtype, self.causal, self.p, self.varlen = device, dtype, causal, p, varlen
        self.window, self.softcap = window, softcap
        self.lens_q, self.lens_k = lens_q, key_lengths or lens_k
        self.scale = dim**-0.5 if scale is None else scale
        self.heads, batch = heads, len(lens_q)
        self.max_q, self.max_k = max(lens_q), max(lens_k)
        self.key_lengths = self.cu_q = self.cu_k = None

        def tensor(lens, heads=heads):
            if varlen:
                return torch.randn(sum(lens) + slack, heads, dim).to(device, dtype)
            if transposed:  # as torch's SDPA is called: [B, H, S, D] seen as [B, S, H, D]
                return torch.randn(batch, heads, lens[0], dim).to(device, dtype).transpose(1, 2)
            return torch.randn(batch, lens[0], heads, dim).to(device, dtype)

        def int32(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        key_heads = key_heads or heads
        self.q, self.k, self.v = (
            tensor(lens_q),
            tensor(lens_k, key_heads),
            tensor(lens_k, key_heads),
        )
        self.dout = tensor(lens_q)
        self.bias = self.key_padding_mask = None
        if bias is not None:
            shape = bias[1:] if bias[0] == "bool" else bias
            gone = torch.rand(shape) < masked_out
            if bias[0] == "bool":
                self.bias = ~gone.to(device)
            else:
                self.bias = torch.randn(shape).masked_fill(gone, -math.inf).to(device)
        if padding:
            self.key_padding_mask = (torch.rand(batch, self.max_k) >= padding).to(device)
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
        options = (self.bias, self.key_padding_mask, self.cu_q, self.cu_k, self.key_lengths,
                   self.seed, self.max_q, self.max_k, self.causal, *self.window, self.softcap,
                   self.p, self.scale, OFFSET, False)  # fmt: skip
        out, lse = attention_fwd(self.q, self.k, self.v, *options)
        bias_grad = self.bias is not None and self.bias.dtype != torch.bool
        *grads, dbias = attention_bwd(
            self.dout, self.q, self.k, self.v, out, lse, self.dlse, *options, bias_grad
        )
        assert (dbias is not None) == bias_grad
        return out, lse, *grads, *([dbias] if bias_grad else [])

    def parts(self, b):
        """Sequence b's slices: (queries, keys, index of dlse)."""
        if not self.varlen:
            return (b, slice(None)), (b, slice(self.lens_k[b])), (b,)
        queries = slice(self.starts_q[b], self.starts_q[b + 1])
        keys = slice(self.starts_k[b], self.starts_k[b + 1])
        return (queries,), (keys,), (slice(None), queries)

    def allowed(self, b, len_q, len_k):
        """bool [len_q, len_k]: causal, window and key_padding_mask of sequence b."""
        i, j = torch.arange(len_q)[:, None], torch.arange(len_k)
        diagonal = (len_k if self.varlen else self.max_k) - (len_q if self.varlen else self.max_q)
        diagonal = 0 if self.causal == 2 else diagonal
        left, right = self.window
        allowed = torch.ones(len_q, len_k, dtype=torch.bool)
        if left >= 0:
            allowed &= j >= i + diagonal - left
        if right >= 0 or self.causal:
            allowed &= j <= i + diagonal + (0 if self.causal else right)
        if self.key_padding_mask is not None:
            allowed &= self.key_padding_mask[b, :len_k].cpu()
        return allowed

    def expected(self, dtype):
        """For each sequence (out, lse, dq, dk, dv) by the formula in `dtype`; and dbias or None."""
        results, bias = [], self.bias
        if bias is not None:
            bias = bias.detach().cpu()
            bias = bias if bias.dtype == torch.bool else bias.to(dtype).requires_grad_()
        bias_grad = bias is not None and bias.requires_grad
        dbias = torch.zeros_like(bias) if bias_grad else None
        for b in range(len(self.lens_q)):
            at_q, at_k, at_lse = self.parts(b)
            q, k, v = (
                t[at].detach().cpu().to(dtype).requires_grad_()
                for t, at in ((self.q, at_q), (self.k, at_k), (self.v, at_k))
            )
            len_q, len_k = q.shape[0], k.shape[0]
            keep = keep_factors(b, self.heads, len_q, len_k, self.p) if self.p else None
            part = None
            if bias is not None:
                part = bias.expand(len(self.lens_q), self.heads, self.max_q, self.max_k)
                part = part[b, :, :len_q, :len_k]
            allowed = self.allowed(b, len_q, len_k)
            out, lse = formula(q, k, v, allowed, self.scale, self.softcap, part, keep)
            loss = (out * self.dout[at_q].cpu().to(dtype)).sum()
            if self.dlse is not None:
                seen = lse > -math.inf
                loss = loss + (lse[seen] * self.dlse[at_lse].cpu().to(dtype)[seen]).sum()
            inputs = (q, k, v, bias) if bias_grad else (q, k, v)
            grads = torch.autograd.grad(loss, inputs)
            if bias_grad:
                dbias += grads[3]
            results.append((out, lse, *grads[:3]))
        return results, dbias

    def check(self):
        got, (wanted, dbias64) = self.run(), self.expected(torch.float64)
        plain, dbias_same = self.expected(self.dtype)
        for b, (ref64, same) in enumerate(zip(wanted, plain, strict=True)):
            at_q, at_k, at_lse = self.parts(b)
            names = ("out", "lse", "dq", "dk", "dv")
            for name, at, t, want, like in zip(
                names, (at_q, at_lse, at_q, at_k, at_k), got[:5], ref64, same, strict=True
            ):
                if name == "lse":
                    empty = want == -math.inf
                    assert torch.equal(t[at].cpu() == -math.inf, empty)
                    lse, want, like = (
                        x.cpu().double().masked_fill(empty, 0) for x in (t[at], want, like)
                    )
                    rows = (x.reshape(-1, 1) for x in (lse.float(), want, like))
                    assert_close(*rows, name=name)
                else:  # rows of each head: [S, H, D] -> [H, S, D]
                    assert_close(*(x.transpose(0, 1) for x in (t[at].cpu(), want, like)),
                                 grad=name != "out", name=f"{name}[{b}]")  # fmt: skip
        if dbias64 is not None:
            assert_close(got[5].cpu(), dbias64, dbias_same, grad=True, name="dbias")
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
    "grouped heads": dict(
        dim=16, dtype=fp32, lens_q=[40] * 2, lens_k=[50] * 2, heads=6, key_heads=2, causal=1, p=0.1
    ),
    "one key head": dict(
        dim=16, dtype=fp16, lens_q=[20, 5], lens_k=[20, 40], heads=3, key_heads=1, varlen=True
    ),
    "window": dict(dim=16, dtype=fp32, lens_q=[70], lens_k=[70], window=(9, 5)),
    "window, few keys": dict(dim=16, dtype=fp32, lens_q=[40], lens_k=[30], window=(3, 0), p=0.1),
    "window to the left, causal": dict(
        dim=16, dtype=fp16, lens_q=[50, 20], lens_k=[60, 20], window=(17, -1), causal=1, varlen=True
    ),
    "window to the right": dict(dim=16, dtype=fp32, lens_q=[60], lens_k=[40], window=(-1, 7)),
    "a window that leaves the last queries nothing": dict(
        dim=16, dtype=fp32, lens_q=[20], lens_k=[60], window=(4, 4), key_lengths=[45]
    ),
    "softcap": dict(dim=16, dtype=fp32, lens_q=[40], lens_k=[40], softcap=2.0, causal=1),
    "softcap fp16": dict(dim=64, dtype=fp16, lens_q=[20], lens_k=[20], softcap=30.0),
    "holes in the keys": dict(
        dim=16, dtype=fp32, lens_q=[40] * 3, lens_k=[50] * 3, padding=0.4, causal=1, p=0.1
    ),
    "holes in few keys": dict(dim=16, dtype=fp32, lens_q=[40] * 3, lens_k=[9] * 3, padding=0.7),
    "bias of every score": dict(
        dim=16, dtype=fp32, lens_q=[40] * 2, lens_k=[50] * 2, bias=(2, 2, 40, 50), masked_out=0.2
    ),
    "bias of every batch": dict(
        dim=16, dtype=fp32, lens_q=[35] * 3, lens_k=[20] * 3, bias=(1, 2, 35, 20), p=0.1
    ),
    "bias of every head fp16": dict(
        dim=32, dtype=fp16, lens_q=[50] * 2, lens_k=[50] * 2, bias=(2, 1, 50, 50), causal=1
    ),
    "bias of a key": dict(
        dim=16, dtype=fp32, lens_q=[40] * 2, lens_k=[70] * 2, bias=(2, 1, 1, 70), masked_out=0.5
    ),
    "bias of a query": dict(
        dim=16, dtype=fp32, lens_q=[40] * 2, lens_k=[20] * 2, bias=(1, 2, 40, 1)
    ),
    "bias, lengths, window, cap and groups": dict(
        dim=16, dtype=fp32, lens_q=[33] * 3, lens_k=[48] * 3, bias=(1, 4, 33, 48), heads=4,
        key_heads=2, key_lengths=[48, 0, 20], window=(20, 3), softcap=4.0, p=0.1,
    ),
    "bias in varlen": dict(
        dim=16, dtype=fp32, lens_q=[7, 0, 33, 20], lens_k=[40, 5, 33, 0], varlen=True,
        bias=(1, 2, 33, 40), p=0.1, slack=9,
    ),
    "bias of each sequence in varlen": dict(
        dim=16, dtype=fp32, lens_q=[7, 33], lens_k=[40, 20], varlen=True, bias=(2, 1, 33, 40)
    ),
    "rows that the bias masks whole": dict(
        dim=16, dtype=fp32, lens_q=[40], lens_k=[3], bias=(1, 2, 40, 3), masked_out=0.6
    ),
    "bool mask": dict(
        dim=16, dtype=fp32, lens_q=[40] * 2, lens_k=[50] * 2, bias=("bool", 2, 1, 40, 50),
        masked_out=0.5,
    ),
    "bool mask, whole rows": dict(
        dim=16, dtype=fp16, lens_q=[20], lens_k=[4], bias=("bool", 1, 1, 20, 4), masked_out=0.6
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
    out, lse, dq, dk, dv = got[:5]
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


@pytest.mark.parametrize("keys", [20, 40])
def test_poison_under_the_key_padding_mask(device, keys):
    problem = Problem(
        device, 16, fp32, [20] * 3, [keys] * 3, padding=0.5, p=0.1, causal=1, use_dlse=False
    )
    problem.key_padding_mask[1, :9] = False  # left padding: its first queries see nothing
    clean = problem.run()
    gone = ~problem.key_padding_mask
    for t in (problem.k, problem.v):
        poison(t, gone)
    for t in (problem.q, problem.dout):
        poison(t, clean[1].transpose(1, 2)[..., 0] == -math.inf)
    dirty = problem.run()
    assert all(map(torch.equal, dirty, clean))
    assert all((t[gone] == 0).all() for t in dirty[3:])


def test_a_bias_of_the_lowest_float_masks_as_torch_does(device):
    """Not -inf: a row that is masked whole sees all its keys alike."""
    problem = Problem(device, 16, fp32, [20], [40], bias=(1, 1, 20, 40), use_dlse=False)
    lowest = torch.finfo(torch.float32).min
    problem.bias[:, :, :5] = lowest
    problem.bias[:, :, 5:, 30:] = lowest
    out = problem.run()[0]
    mean = problem.v.mean(1, keepdim=True).expand(1, 5, 2, 16)
    torch.testing.assert_close(out[:, :5], mean, atol=1e-5, rtol=1e-5)
    cut = Problem(device, 16, fp32, [20], [40], key_lengths=[30], use_dlse=False)
    cut.q, cut.k, cut.v = problem.q, problem.k, problem.v
    problem.bias[:, :, 5:, :30] = 0
    torch.testing.assert_close(problem.run()[0][:, 5:], cut.run()[0][:, 5:], atol=1e-6, rtol=1e-5)


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
    # The same where all keys fit one tile, and a window that reaches none of the first keys.
    for options in (dict(causal=2), dict(window=(2, 2))):
        problem = Problem(device, 16, fp32, [9], [30], **options)
        clean = problem.run()
        unseen = slice(9, None) if "causal" in options else slice(0, 30 - 9 - 2)
        poison(problem.k, (0, unseen))
        poison(problem.v, (0, unseen))
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
