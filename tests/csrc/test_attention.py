"""Native CPU attention against float64: layouts, masks, dropout, dtypes, threads, NaN."""

import pytest
import torch

from bertkern.reference import attention as reference
from bertkern.reference.tolerance import assert_close
from csrc import native

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 12345678901

# (B, Sq, Sk, H, D, causal): one block and several, cut panels, odd sizes, empty rows, no keys.
SHAPES = [
    (2, 33, 33, 2, 64, 0),
    (1, 5, 700, 1, 7, 1),
    (2, 100, 37, 2, 32, 1),
    (1, 1, 1, 1, 1, 0),
    (1, 600, 600, 1, 40, 2),
    (2, 17, 0, 1, 16, 0),
    (1, 70, 1100, 1, 256, 1),
]


def compare(shape, dtype, p):
    batch, seqlen_q, seqlen_k, heads, head_dim, causal = shape
    torch.manual_seed(seqlen_q + seqlen_k)
    q, dout = (torch.randn(batch, seqlen_q, heads, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, seqlen_k, heads, head_dim).to(dtype) for _ in range(2))
    lengths = None
    if batch == 2 and seqlen_k:
        lengths = torch.tensor([seqlen_k - 3, seqlen_k], dtype=torch.int32)
    seed = torch.tensor([SEED]) if p else None
    options = (*[None] * 4, lengths, seed, seqlen_q, seqlen_k, causal, -1, -1, 0.0, p)
    options = (*options, head_dim**-0.5, 3, False)

    def expected(dtype):
        qkv = [t.to(dtype) for t in (q, k, v)]
        out, lse = reference.attention_fwd(*qkv, *options)
        grads = reference.attention_bwd(dout.to(dtype), *qkv, out, lse, None, *options, False)
        return out, lse, grads[:3]

    out64, lse64, grads64 = expected(torch.float64)
    out_same, _, grads_same = expected(dtype)
    k, v = k.clone(), v.clone()
    if lengths is not None:
        k[0, -3:], v[0, -3:] = NAN, float("inf")
    mask = {"key_lengths": lengths, "causal": causal, "drop": native.dropout(p, SEED), "offset": 3}
    out, lse = native.attention_fwd(q, k, v, **mask)
    assert_close(*(t.transpose(1, 2) for t in (out, out64, out_same)))
    torch.testing.assert_close(lse.double(), lse64, atol=1e-5, rtol=1e-5)
    grads = native.attention_bwd(dout, q, k, v, out, lse, **mask)
    for name, *triple in zip(("dq", "dk", "dv"), grads, grads64, grads_same, strict=True):
        assert_close(*(t.transpose(1, 2) for t in triple), grad=True, name=name)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(isa, shape, p):
    compare(shape, torch.float32, p)


def test_one_key(isa):
    """dp and delta are the same bits: dq and dk are exactly 0, whatever lse's size."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(4, 1, 3, 33) * 5 for _ in range(4))
    for drop in (native.NO_DROPOUT, native.dropout(0.3, SEED)):
        out, lse = native.attention_fwd(q, k, v, drop=drop)
        dq, dk, dv = native.attention_bwd(dout, q, k, v, out, lse, drop=drop)
        assert not dq.any()
        assert not dk.any()
        assert dv.any()


def test_no_queries_or_no_keys(isa):
    """A tensor without elements has the address 0: its gradient's neighbours are filled all the
    same."""
    for len_q, len_k in ((0, 5), (5, 0), (0, 0)):
        q, k, v = (torch.randn(2, n, 2, 8) for n in (len_q, len_k, len_k))
        out, lse = native.attention_fwd(q, k, v)
        grads = native.attention_bwd(out, q, k, v, out, lse)
        assert not any(t.any() for t in (out, *grads))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_16_bit(isa, shape, dtype):
    compare(shape, dtype, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variable_length_is_the_sequences_alone(isa, dtype):
    """Bit for bit, with strided views, empty sequences, NaN tokens of no sequence at the end."""
    torch.manual_seed(0)
    lengths_q, lengths_k, heads, head_dim = [5, 0, 40, 129], [7, 3, 0, 130], 2, 24
    cu_q = torch.tensor([0, 5, 5, 45, 174], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, 10, 10, 140], dtype=torch.int32)
    q = torch.randn(180, heads, 3 * head_dim).to(dtype)[..., :head_dim]
    k, v = (torch.randn(heads, 150, head_dim).to(dtype).transpose(0, 1) for _ in range(2))
    dout = torch.randn(180, heads, head_dim).to(dtype)
    q[174:], k[140:], v[140:], dout[174:] = NAN, NAN, NAN, NAN
    mask = {"causal": 1, "drop": native.dropout(0.2, SEED)}
    out, lse = native.attention_fwd(q, k, v, cu_q, cu_k, **mask)
    dq, dk, dv = native.attention_bwd(dout, q, k, v, out, lse, cu_q=cu_q, cu_k=cu_k, **mask)
    for i, (len_q, len_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if len_q == 0 or len_k == 0:
            continue
        at_q, at_k = slice(cu_q[i], cu_q[i] + len_q), slice(cu_k[i], cu_k[i] + len_k)
        one = [q[None, at_q], k[None, at_k], v[None, at_k]]
        out_one, lse_one = native.attention_fwd(*one, offset=i, **mask)
        grads = native.attention_bwd(dout[None, at_q], *one, out_one, lse_one, offset=i, **mask)
        assert torch.equal(out[at_q], out_one[0])
        assert torch.equal(lse[:, at_q], lse_one[0])
        for whole, part in zip((dq[at_q], dk[at_k], dv[at_k]), grads, strict=True):
            assert torch.equal(whole, part[0])
    for t in (out[5:45], out[174:], dq[5:45], dq[174:], dk[7:10], dk[140:], dv[7:10], dv[140:]):
        assert torch.equal(t, torch.zeros_like(t))
    assert (lse[:, 174:] == -torch.inf).all()
    assert (lse[:, 5:45] == -torch.inf).all()


def test_threads_do_not_change_a_bit(isa):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 700, 1, 32) for _ in range(4))
    results = []
    for threads in (1, 2, 3):
        out, lse = native.attention_fwd(q, k, v, threads=threads)
        grads = native.attention_bwd(dout, q, k, v, out, lse, threads=threads)
        results.append((out, lse, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_inf_inside_propagate(isa):
    q, k, v = (torch.randn(1, 9, 1, 16) for _ in range(3))
    q[0, 2, 0, 3] = NAN
    out, lse = native.attention_fwd(q, k, v)
    assert out[0, 2].isnan().all()
    assert lse[0, 0, 2].isnan()
    assert out[0, [0, 1, 3, 8]].isfinite().all()


def test_lse_gradient(isa):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 20, 1, 16, dtype=torch.float64) for _ in range(4))
    dlse = torch.randn(1, 1, 20, dtype=torch.float64)
    for t in (q, k, v):
        t.requires_grad_()
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    expected_out = torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)
    expected = torch.autograd.grad((expected_out, s.logsumexp(-1)), (q, k, v), (dout, dlse))
    q, k, v = (t.detach().float() for t in (q, k, v))
    out, lse = native.attention_fwd(q, k, v)
    grads = native.attention_bwd(dout.float(), q, k, v, out, lse, dlse.float())
    for grad, grad64 in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, grad64.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("cu", "message"), [([1, 4], "must be 0"), ([0, 5, 4], "decreases"), ([0, 11], "past the 10")]
)
def test_lengths_that_leave_the_tensors(cu, message):
    q, k, v = (torch.zeros(10, 1, 8) for _ in range(3))
    cu = torch.tensor(cu, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        native.attention_fwd(q, k, v, cu, cu)
