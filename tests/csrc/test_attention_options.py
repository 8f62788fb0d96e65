"""Native CPU attention's bias, masks, window, cap and grouped heads, on every instruction set."""

import math

import pytest
import torch

from bertkern.reference import attention as reference
from bertkern.reference.tolerance import assert_close, hold_in_most_draws
from csrc import native

SEED = 12345678901
B, SQ, SK, D = 2, 53, 61, 20
LONG = dict(sizes=(1, 70, 1100), heads=1, key_heads=1)  # three blocks of keys

# What is not said is B, SQ, SK, D, two heads, nothing masked, no bias.
CASES = {
    "bias of every score": dict(bias=(B, 2, SQ, SK)),
    "bias shared by the batch": dict(bias=(1, 2, SQ, SK), gone=0.3, p=0.1),
    "bias shared by the heads, transposed": dict(bias=(B, 1, SQ, SK), transposed=True),
    "bias of a key": dict(bias=(B, 1, 1, SK)),
    "bias of a query": dict(bias=(1, 2, SQ, 1)),
    "bool bias": dict(bias=(1, 1, SQ, SK), kind=torch.bool, gone=0.4),
    "bool bias of a query: whole rows": dict(bias=(B, 2, SQ, 1), kind=torch.bool, gone=0.4),
    "few keys: whole rows are -inf": dict(sizes=(B, SQ, 3), bias=(B, 1, SQ, 3), gone=0.5),
    "bias of three blocks": dict(LONG, bias=(1, 1, 70, 1100), gone=0.2),
    "bias of a key, three blocks": dict(LONG, bias=(1, 1, 1, 1100)),
    "padding with holes": dict(padding=0.4),
    "padding with holes, three blocks": dict(LONG, padding=0.4, causal=1),
    "padding on the left, dropout": dict(padding=0.0, left=21, p=0.3),
    "window": dict(window=(9, 3)),
    "window, more queries": dict(sizes=(1, 90, 20), window=(5, 5)),
    "window, causal": dict(window=(17, -1), causal=1, p=0.2),
    "window to the right": dict(window=(-1, 4)),
    "window past a block": dict(LONG, sizes=(1, 900, 1000), window=(130, 60)),
    "cap": dict(softcap=1.5),
    "cap, three blocks": dict(LONG, softcap=2.0, bias=(1, 1, 70, 1)),
    "groups": dict(heads=6, key_heads=2, causal=1),
    "groups, three blocks": dict(LONG, heads=3, padding=0.2),
    "everything": dict(
        heads=4, bias=(1, 4, SQ, SK), gone=0.2, padding=0.3, left=5, window=(25, 9), softcap=3.0,
        p=0.2,
    ),
}  # fmt: skip


class Problem:
    """Inputs of one case, and the options of both the kernels and the reference."""

    def __init__(self, draw, dtype=torch.float32, sizes=(B, SQ, SK), heads=2, key_heads=2,
                 bias=None, kind=torch.float32, gone=0.0, transposed=False, padding=None, left=0,
                 causal=0, window=(-1, -1), softcap=0.0, p=0.0) -> None:  # fmt: skip
        torch.manual_seed(draw)
        batch, seqlen_q, seqlen_k = sizes
        self.dtype = dtype
        self.q, self.dout = (torch.randn(batch, seqlen_q, heads, D).to(dtype) for _ in range(2))
        self.k, self.v = (torch.randn(batch, seqlen_k, key_heads, D).to(dtype) for _ in range(2))
        self.bias = self.keys = None
        if bias is not None:
            self.bias = torch.randn(bias).masked_fill(torch.rand(bias) < gone, -math.inf)
            self.bias = self.bias > -9 if kind == torch.bool else self.bias.to(kind)
            if transposed:
                self.bias = self.bias.transpose(2, 3).contiguous().transpose(2, 3)
        if padding is not None:
            self.keys = torch.rand(batch, seqlen_k) >= padding
            self.keys[0, :left] = False
        self.native = dict(
            bias=self.bias, keys=self.keys, causal=causal, window=window, softcap=softcap,
            drop=native.dropout(p, SEED), offset=3,
        )  # fmt: skip
        seed = torch.tensor([SEED]) if p else None
        self.options = (
            self.keys, None, None, None, seed, seqlen_q, seqlen_k, causal, *window, softcap, p,
            D**-0.5, 3, False,
        )  # fmt: skip

    def expected(self, dtype):
        """[out, lse, dq, dk, dv, dbias or None] by the reference."""
        tensors = [t.to(dtype) for t in (self.q, self.k, self.v)]
        float_bias = self.bias is not None and self.bias.dtype != torch.bool
        bias = self.bias.to(dtype) if float_bias else self.bias
        out, lse = reference.attention_fwd(*tensors, bias, *self.options)
        grads = reference.attention_bwd(
            self.dout.to(dtype), *tensors, out, lse, None, bias, *self.options, float_bias
        )
        return [out, lse, *grads]

    def run(self, **changes):
        """[out, lse, dq, dk, dv, perhaps dbias] by the kernels."""
        options = {**self.native, **changes}
        out, lse = native.attention_fwd(self.q, self.k, self.v, **options)
        grads = native.attention_bwd(self.dout, self.q, self.k, self.v, out, lse, **options)
        return [out, lse, *grads]

    def check(self):
        got, want, plain = self.run(), self.expected(torch.float64), self.expected(self.dtype)
        assert torch.equal(got[1] == -math.inf, want[1] == -math.inf)
        torch.testing.assert_close(got[1].double(), want[1], atol=1e-5, rtol=1e-5)
        names = ("out", "lse", "dq", "dk", "dv", "dbias")
        for name, *triple in zip(names, got, want, plain, strict=False):
            if name == "lse":
                continue
            if name == "dbias":
                assert triple[0].dtype == self.bias.dtype
                triple[0] = triple[0].to(self.dtype)
            else:
                triple = [t.transpose(1, 2) for t in triple]
            assert_close(*triple, grad=name != "out", name=name)


@pytest.mark.parametrize("case", CASES)
def test_against_float64(isa, case):
    hold_in_most_draws(lambda draw: Problem(draw, **CASES[case]).check())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["same", "float32"])
@pytest.mark.parametrize("case", ["bias of every score", "bias of a key", "everything"])
def test_16_bit(isa, dtype, kind, case):
    kind = dtype if kind == "same" else torch.float32
    hold_in_most_draws(lambda draw: Problem(draw, dtype, kind=kind, **CASES[case]).check())


@pytest.mark.parametrize("seqlen_k", [40, 700])
def test_a_bias_of_the_lowest_float(isa, seqlen_k):
    """Not −inf: where all keys have it, the row sees them all alike. lse is then the bias itself,
    and the number of keys, which it has lost, must not be lost in the gradients."""
    problem = Problem(0, sizes=(1, 12, seqlen_k), bias=(1, 1, 12, seqlen_k))
    lowest = torch.finfo(torch.float32).min
    problem.bias.zero_()
    problem.bias[:, :, :5] = lowest
    problem.bias[:, :, 5:, 30:] = lowest
    got = problem.run()
    mean = problem.v.mean(1, keepdim=True).expand(1, 5, 2, D)
    torch.testing.assert_close(got[0][:, :5], mean, atol=1e-6, rtol=1e-5)
    assert (got[1][..., :5] == lowest).all()
    for one, exact in zip(got, problem.expected(torch.float64), strict=True):
        torch.testing.assert_close(one.double(), exact, atol=3e-6, rtol=1e-4)


def test_poison_behind_the_masks(isa):
    """NaN in keys that are padding, in keys that no query's window reaches, and in the rows of
    queries that see nothing."""
    for options in (dict(padding=0.5, left=40, causal=1), dict(window=(3, 3), sizes=(2, 9, 50))):
        problem = Problem(1, **options, p=0.2)
        if problem.keys is not None:
            problem.keys[0, -2:] = problem.keys[1, 0] = False
        clean = problem.run()
        unseen = torch.zeros(2, problem.k.shape[1], dtype=torch.bool)
        unseen = ~problem.keys if problem.keys is not None else unseen
        if problem.keys is None:
            unseen[:, : 50 - 9 - 3] = True
        problem.k[unseen], problem.v[unseen] = math.nan, math.inf
        empty = (clean[1] == -math.inf).transpose(1, 2)
        assert empty.any() == ("padding" in options)
        problem.q[empty], problem.dout[empty] = math.nan, math.inf
        for one, two in zip(clean, problem.run(), strict=True):
            assert torch.equal(one, two)
        for grad in clean[3:5]:
            assert (grad[unseen] == 0).all()
        assert (clean[0][empty] == 0).all()
        assert (clean[2][empty] == 0).all()


@pytest.mark.parametrize("bias", ["-inf", "False"])
def test_a_query_of_nan_that_the_bias_masks_whole(isa, bias):
    problem = Problem(0, bias=(B, 2, SQ, SK))
    problem.bias[0, :, 7] = -math.inf
    if bias == "False":
        problem.bias = problem.native["bias"] = problem.bias > -math.inf
    clean = problem.run()
    problem.q[0, 7], problem.dout[0, 7] = math.nan, math.nan
    for one, two in zip(clean, problem.run(), strict=True):
        assert torch.equal(one, two)
    assert (clean[0][0, 7] == 0).all()
    problem.q[0, 8, 0, 3] = math.nan  # this one sees keys: its NaN is its own, and shows
    dirty = problem.run()[0]
    assert dirty[0, 8, 0].isnan().all()
    dirty[0, 8, 0] = clean[0][0, 8, 0]
    assert torch.equal(dirty, clean[0])


def test_nan_in_a_sequence_gives_its_padding_no_gradient(isa):
    problem = Problem(0, padding=0.4)
    problem.q[0, 3] = math.nan
    *_, dk, dv = problem.run()
    assert dk[0].isnan().any()
    for grad in (dk, dv):
        assert (grad[~problem.keys] == 0).all()


def test_padding_without_holes_is_the_sequence_alone(isa):
    """Bit for bit, left and right, and with the dropout of the keys' own columns."""
    problem = Problem(0, padding=0.0)
    keys = problem.keys
    keys[0, :13] = keys[0, 50:] = keys[1, 40:] = False
    lengths = torch.tensor([SK, 40], dtype=torch.int32)
    for p in (0.0, 0.3):
        drop = native.dropout(p, SEED)
        masked = problem.run(drop=drop)
        cut = problem.run(drop=drop, keys=None, key_lengths=lengths)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(masked, cut, strict=True))
        if p == 0:
            alone = Problem(0)
            alone.q, alone.dout = problem.q[:1], problem.dout[:1]
            alone.k, alone.v = problem.k[:1, 13:50], problem.v[:1, 13:50]
            out, lse, dq, dk, dv = alone.run()
            for got, want in zip(masked, (out, lse, dq), strict=False):
                assert torch.equal(got[:1], want)
            for got, want in zip(masked[3:], (dk, dv), strict=True):
                assert torch.equal(got[:1, 13:50], want)


@pytest.mark.parametrize("bias", [(1, 4, 300, 400), (4, 1, 1, 400), (4, 4, 300, 400)], ids=str)
def test_threads_do_not_change_a_bit(isa, bias):
    """Sums over heads and sequences neither; buffers of 16 heads are more than one wave's."""
    options = dict(sizes=(4, 300, 400), heads=4, key_heads=2, bias=bias, p=0.1)
    problem = Problem(0, torch.bfloat16, kind=torch.bfloat16, **options)
    results = [problem.run(threads=threads) for threads in (1, 2, 5)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sequence_does_not_depend_on_its_batch(isa):
    problem = Problem(0, padding=0.3, window=(20, 20), softcap=3.0, heads=4)
    together = problem.run()
    for name in ("q", "k", "v", "dout"):
        setattr(problem, name, getattr(problem, name)[1:])
    alone = problem.run(keys=problem.keys[1:].contiguous())
    assert all(torch.equal(a[1:], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("case", ["window past a block", "cap, three blocks", "everything"])
def test_nothing_is_left_of_an_earlier_call(isa, case):
    """A thread's scratch memory, full of NaN, changes nothing."""
    problem = Problem(0, **CASES[case])
    clean = problem.run(threads=1)
    dirty = Problem(0, **CASES[case])
    for t in (dirty.q, dirty.k, dirty.v, dirty.dout):
        t.fill_(math.nan)
    dirty.run(threads=1)
    for one, two in zip(clean, problem.run(threads=1), strict=True):
        assert torch.equal(one, two)


def test_bias_in_variable_length(isa):
    """That of the padded batch, with the gradient 0 past a sequence's own lengths."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
    q, k, v, dout = (torch.randn(40, 2, D) for _ in range(4))
    bias = torch.randn(3, 1, 33, 35)
    out, lse = native.attention_fwd(q, k, v, cu, cu, bias=bias)
    *_, dbias = native.attention_bwd(dout, q, k, v, out, lse, cu_q=cu, cu_k=cu, bias=bias)
    for i, (first, last) in enumerate(((0, 9), (9, 9), (9, 40))):
        n = last - first
        one = [t[None, first:last] for t in (q, k, v)]
        part = bias[i : i + 1, :, :n, :n]
        if n:
            out_one, lse_one = native.attention_fwd(*one, bias=part)
            assert torch.equal(out[first:last], out_one[0])
            *_, grad = native.attention_bwd(
                dout[None, first:last], *one, out_one, lse_one, bias=part
            )
            assert torch.equal(dbias[i, :, :n, :n], grad[0])
        dbias[i, :, :n, :n] = 0
    assert not dbias.any()
    with pytest.raises(ValueError, match="sequence 2 has 31 queries and 31 keys"):
        native.attention_fwd(q, k, v, cu, cu, bias=bias[:, :, :30])


def test_wrong_options_are_named():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="heads is 3; it must be a multiple of key_heads, 2"):
        native.attention_fwd(q, k, k)
    with pytest.raises(ValueError, match="window"):
        native.attention_fwd(q, q, q, window=(-2, 0))
    with pytest.raises(ValueError, match="bias_sizes"):
        native.attention_fwd(q, q, q, bias=torch.zeros(2, 1, 4, 4))
