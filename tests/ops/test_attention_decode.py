"""attention_decode on every backend: against fp64, against `attention`, and as an op of torch."""

import math

import pytest
import torch
from plain_attention_decode import CASES, Case, Inputs, check, plain

import bertkern
from bertkern.reference.tolerance import assert_close, hold_in_most_draws

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def skip_unless_computable(backend, dtype, case):
    if backend == "cuda":
        pytest.skip("backend cuda has no attention_decode kernel")
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the Triton interpreter multiplies bfloat16 wrongly in tl.dot")


def run(inputs, **changes):
    """(out, lse); `changes` replace the arguments of a case."""
    arguments = dict(q=inputs.q, k_cache=inputs.k, v_cache=inputs.v, cache_lengths=inputs.lengths)
    return bertkern.attention_decode(**(arguments | inputs.options | changes), return_lse=True)


def check_draw(inputs):
    check(inputs, *run(inputs))


@pytest.mark.dtypes_in_turn("attention_decode")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_every_backend_is_as_exact_as_torch(backend, device, case, dtype):
    skip_unless_computable(backend, dtype, case)
    with bertkern.backend(backend):
        hold_in_most_draws(lambda draw: check_draw(Inputs(case, dtype, device, seed=1 + draw)))


@pytest.mark.parametrize("case", CASES[-4:], ids=lambda case: case.why)
def test_the_default_backend_computes_every_option(device, case):
    hold_in_most_draws(lambda draw: check_draw(Inputs(case, torch.float32, device, seed=2 + draw)))


@pytest.mark.parametrize("case", [
    Case("plain", (37, 5), room=4),
    Case("window, softcap, groups", (37, 5), room=4, window=(9, 0), softcap=2.0, group=2),
], ids=lambda case: case.why)  # fmt: skip
def test_is_the_last_row_of_attention(backend, device, case):
    """Token by token, the rows of causal attention over the sequence."""
    skip_unless_computable(backend, torch.float32, case)
    inputs = Inputs(case, torch.float32, device)
    length = case.lengths[0]
    k, v = (t[:1, :length] for t in inputs.kv)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, length, *inputs.q.shape[1:], generator=generator).to(device)
    options = dict(window=case.window, softcap=case.softcap)
    with bertkern.backend(backend):
        rows, lse = bertkern.attention(q, k, v, causal=True, return_lse=True, **options)
        for n in (1, 2, 9, 10, 11, 32, 33, length):
            lengths = torch.tensor([n], dtype=torch.int32, device=device)
            one, one_lse = bertkern.attention_decode(
                q[:, n - 1], inputs.k[:1], inputs.v[:1], lengths, return_lse=True, **options
            )
            torch.testing.assert_close(one, rows[:, n - 1], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(one_lse, lse[..., n - 1], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("group", [1, 2])
def test_a_sequence_does_not_feel_its_batch(backend, device, group):
    """The same bits alone, in a batch, and in a cache with more or less room."""
    case = Case("", (33, 0, 90, 12), room=40, group=group)
    skip_unless_computable(backend, torch.float32, case)
    if backend == "reference":
        pytest.skip("torch's own sums depend on shapes")
    inputs = Inputs(case, torch.float32, device)
    with bertkern.backend(backend):
        out, lse = run(inputs)
        for b, length in enumerate(case.lengths):
            only = slice(b, b + 1)
            one, one_lse = run(
                inputs, q=inputs.q[only], k_cache=inputs.k[only, :length],
                v_cache=inputs.v[only, :length], cache_lengths=inputs.lengths[only],
            )  # fmt: skip
            assert torch.equal(out[only], one)
            assert torch.equal(lse[only], one_lse)


def test_lengths_out_of_range_count_as_the_nearest(backend, device):
    case = Case("", (20, 20, 20))
    skip_unless_computable(backend, torch.float32, case)
    inputs = Inputs(case, torch.float32, device)
    lengths = torch.tensor([-3, 1000, 20], dtype=torch.int32, device=device)
    with bertkern.backend(backend):
        out, lse = run(inputs, cache_lengths=lengths)
        full, _ = run(inputs)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert torch.equal(out[1:], full[1:])


@pytest.mark.parametrize("sizes", [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8), (2, 5, 0, 1, 8)])
def test_sizes_of_zero(backend, device, sizes):
    batch, room, key_heads, group, dim = sizes
    skip_unless_computable(backend, torch.float32, Case("", ()))
    q = torch.randn(batch, key_heads * group, dim, device=device)
    k = torch.randn(batch, room, key_heads, dim, device=device)
    lengths = torch.full((batch,), room, dtype=torch.int32, device=device)
    with bertkern.backend(backend):
        out, lse = bertkern.attention_decode(q, k, k, lengths, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("case", [
    Case("plain", (40, 0, 7), room=3),
    Case("options", (40, 0, 7), room=3, group=2, softcap=1.5, window=(20, 0), bias="hs"),
], ids=lambda case: case.why)  # fmt: skip
def test_gradients(backend, device, case):
    """Through the formula on every backend; nothing from behind the lengths."""
    skip_unless_computable(backend, torch.float32, case)
    inputs = Inputs(case, torch.float32, device)
    tensors = [t for t in (inputs.q, inputs.k, inputs.v, inputs.bias) if t is not None]
    leaves = [t.clone().requires_grad_() for t in tensors]
    names = ("q", "k_cache", "v_cache", "bias")
    weight = torch.linspace(-1, 1, inputs.q.numel(), device=device).view(inputs.q.shape)
    with bertkern.backend(backend):
        out, lse = run(inputs, **dict(zip(names, leaves, strict=False)))
        loss = (out * weight).sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        grads = torch.autograd.grad(loss, leaves)

    def expected(dtype):
        copy = Inputs(case, torch.float32, device)
        others = [t.to(dtype).requires_grad_() for t in tensors]
        copy.q, copy.k, copy.v = others[:3]
        copy.bias = others[3] if case.bias else None
        out, lse = plain(copy, dtype)
        seen = torch.tensor(case.lengths, device=device) > 0
        loss = (out * weight.to(dtype))[seen].sum() + lse[seen].sum()
        return torch.autograd.grad(loss, others)

    exact, same = expected(torch.float64), expected(torch.float32)
    for name, grad, want, plain_grad in zip(names, grads, exact, same, strict=False):
        heads_first = (lambda t: t.transpose(1, 2)) if "cache" in name else (lambda t: t)
        assert_close(*map(heads_first, (grad, want, plain_grad)), grad=True, name=name)


def test_compiles_whole_and_keeps_lengths_on_the_device():
    """Generation: the cache stays, only lengths change, and nothing is recompiled for them."""
    inputs = Inputs(Case("", (37, 5, 18, 30, 9), room=9), torch.float32, "cpu")

    def step(q, k, v, lengths):
        return bertkern.attention_decode(q * 2, k, v, lengths + 1, window=(20, 0)) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            whole = inputs.q, inputs.k, inputs.v, inputs.lengths - 1
            tensors = [t[:batch].clone() for t in whole]
            for _ in range(2):
                torch.testing.assert_close(compiled(*tensors), step(*tensors))
                tensors[3] = tensors[3] - 2


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 6, 8, device="meta")
    k = torch.empty(2, 5, 3, 8, device="meta")
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    out, lse = bertkern.attention_decode(q, k, k, lengths, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 6)


def test_autocast_casts_it_as_a_product():
    inputs = Inputs(Case("", (9, 4), bias="hs"), torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        out, lse = run(inputs)
    assert out.dtype == torch.float16
    assert lse.dtype == torch.float32


Q, CACHE = (2, 6, 8), (2, 5, 3, 8)
N = torch.ones(2, dtype=torch.int32)
BAD_CALLS = [
    ({"q": (2, 1, 6, 8)}, {}, ValueError, r"q has shape \[2, 1, 6, 8\].*3 dimensions"),
    ({"k_cache": (2, 5, 8)}, {}, ValueError, r"k_cache has shape \[2, 5, 8\].*\[2, S, Hk, 8\]"),
    ({"k_cache": (3, 5, 3, 8)}, {}, ValueError, r"k_cache has shape \[3, 5, 3, 8\]"),
    ({"k_cache": (2, 5, 3, 7)}, {}, ValueError, r"k_cache has shape \[2, 5, 3, 7\]"),
    ({"v_cache": (2, 4, 3, 8)}, {}, ValueError, r"v_cache has shape .* k_cache's, \[2, 5, 3, 8\]"),
    ({"k_cache": (2, 5, 4, 8), "v_cache": (2, 5, 4, 8)}, {}, ValueError, "4 heads and q has 6"),
    ({"q": (2, 6, 300), "k_cache": (2, 5, 3, 300), "v_cache": (2, 5, 3, 300)}, {}, ValueError,
     "head dim is 300; allowed are 1 to 256"),
    ({}, {"cache_lengths": [1, 2]}, TypeError, "cache_lengths must be a torch.Tensor, not list"),
    ({}, {"cache_lengths": N.long()}, TypeError, r"torch\.int64; it must be torch\.int32"),
    ({}, {"cache_lengths": N[:1]}, ValueError, r"cache_lengths has shape \[1\]; it must be \[2\]"),
    ({}, {"window": 4}, TypeError, "window=4"),
    ({}, {"window": (-2, 0)}, ValueError, r"window=\(-2, 0\)"),
    ({}, {"softcap": -1.0}, ValueError, r"softcap=-1\.0"),
    ({}, {"softcap": math.inf}, ValueError, "softcap=inf"),
    ({}, {"bias": torch.zeros(2, 6, 5)}, ValueError, r"bias has shape \[2, 6, 5\]"),
    ({}, {"bias": torch.zeros(5).long()}, TypeError, r"bias has dtype torch\.int64"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "options", "error", "message"), BAD_CALLS)
def test_wrong_arguments_are_named(shapes, options, error, message):
    given = {"q": Q, "k_cache": CACHE, "v_cache": CACHE} | shapes
    tensors = {name: torch.zeros(shape) for name, shape in given.items()}
    with pytest.raises(error, match=message):
        bertkern.attention_decode(**(tensors | {"cache_lengths": N} | options))


def test_wrong_dtypes_are_named():
    q, k = torch.zeros(Q), torch.zeros(CACHE)
    with pytest.raises(TypeError, match=r"v_cache has dtype torch\.float16, but q has"):
        bertkern.attention_decode(q, k, k.half(), N)
    with pytest.raises(TypeError, match="int64"):
        bertkern.attention_decode(q.long(), k, k, N)
