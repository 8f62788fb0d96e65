"""embedding_layer_norm against fp64, on every backend: five gradients, padding, masks, errors."""

import math

import pytest
import torch
from torch.nn import functional as F

import bertkern
from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# shape of ids, columns, rows of word, position and type, type_ids given, dropout
CASES = [
    ((1,), 1, (1, 1, 1), True, 0.0),
    ((6, 11), 7, (11, 11, 2), True, 0.3),
    ((130,), 33, (9, 64, 2), True, 0.0),
    ((3, 20), 96, (200, 20, 2), False, 0.3),
    ((70,), 128, (50, 70, 3), True, 0.3),
    ((9,), 768, (5, 9, 1), False, 0.0),
    ((4,), 1025, (7, 4, 2), True, 0.3),
    ((3, 3), 1000, (30, 9, 2), True, 0.3),
    ((0,), 16, (3, 3, 2), True, 0.3),
    ((0, 4), 16, (3, 3, 2), False, 0.0),
]


def skip_unless_computable(backend, dtype=torch.float32):
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the Triton interpreter rounds to bfloat16 towards zero")


def plain(tables, weight, bias, indices, mask, padding_idx):
    """BERT's embeddings in torch's own ops, in the tables' dtype."""
    ids, position_ids, type_ids = indices
    z = F.embedding(ids, tables[0], padding_idx) + F.embedding(position_ids, tables[1])
    z = z + (tables[2][0] if type_ids is None else F.embedding(type_ids, tables[2]))
    dtype = z.dtype
    y = F.layer_norm(z, z.shape[-1:], weight.to(dtype), bias.to(dtype), 1e-12)
    return y if mask is None else y * mask.to(dtype).view_as(y)


@pytest.mark.dtypes_in_turn("embedding_layer_norm")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_embedding_layer_norm(backend, device, case, dtype, index_dtype):
    skip_unless_computable(backend, dtype)
    shape, columns, table_rows, types_given, dropout_p = case
    torch.manual_seed(columns + len(shape))
    tables = [torch.randn(rows, columns).to(device, dtype) for rows in table_rows]
    weight, bias = torch.randn(2, columns, device=device)
    dy = torch.randn(*shape, columns).to(device, dtype)
    # Every other token is word 0, so that ids repeat and the padding row is met.
    draw = lambda rows: torch.randint(rows, shape, device=device)  # noqa: E731
    odd = torch.arange(math.prod(shape), device=device).view(shape) % 2
    words = draw(table_rows[0]) * odd
    indices = (words, draw(table_rows[1]), draw(table_rows[2]) if types_given else None)
    indices = tuple(None if i is None else i.to(index_dtype) for i in indices)
    seed = torch.tensor([5], device=device)
    rows = torch.arange(words.numel(), device=device) * 3 + 1
    mask = hidden_mask(dy.reshape(-1, columns), dropout_p, seed, rows) if dropout_p else None

    def ours(*leaves):
        return bertkern.embedding_layer_norm(
            *indices, *leaves, 1e-12, dropout_p, seed, dropout_rows=rows, padding_idx=0
        )

    results = []
    for function, cast in (
        (ours, lambda t: t),
        (lambda *t: plain(t[:3], *t[3:], indices, mask, 0), lambda t: t.double()),
        (lambda *t: plain(t[:3], *t[3:], indices, mask, 0), lambda t: t),
    ):
        leaves = [cast(t.clone()).requires_grad_() for t in (*tables, weight, bias)]
        with bertkern.backend(backend):
            y = function(*leaves)
            results.append((y, torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    assert_close(*(y.reshape(-1, columns) for y, _ in results))
    for i, name in enumerate(("word", "position", "type", "weight", "bias")):
        grads = [g[i].reshape(-1, columns) for _, g in results]
        assert results[0][1][i].dtype == (tables[i].dtype if i < 3 else torch.float32)
        assert_close(*grads, grad=True, name=f"gradient of {name}")
    assert (results[0][1][0][0] == 0).all()


def small(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    tables = [torch.randn(rows, 24, device=device, dtype=dtype) for rows in (6, 4, 2)]
    return *tables, torch.randn(24, device=device), torch.randn(24, device=device)


def test_position_ids_and_types_broadcast(backend, device):
    skip_unless_computable(backend)
    parameters = small(device)
    ids = torch.randint(6, (3, 4), device=device)
    positions, types = torch.arange(4, device=device), torch.ones(3, 1, device=device).long()
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(ids, positions, types, *parameters)
        each = bertkern.embedding_layer_norm(
            ids, positions.expand(3, 4), types.expand(3, 4), *parameters
        )
    assert torch.equal(y, each)


def test_same_mask_on_every_backend_padded_or_not(backend, device):
    """A token's mask is that of its row in the padded layout."""
    skip_unless_computable(backend)
    word, position, table, weight, _ = small(device)
    seed = torch.tensor([-9], device=device)
    ids = torch.randint(6, (3, 4), device=device)
    rows = torch.tensor([0, 1, 4, 8, 9, 10], device=device)
    tables = (word, position, table, weight.abs() + 0.1, torch.full_like(weight, 50.0))
    with bertkern.backend(backend):
        padded = bertkern.embedding_layer_norm(ids, ids % 4, None, *tables, 1e-12, 0.4, seed)
        packed = bertkern.embedding_layer_norm(
            *(ids.view(-1)[rows], (ids % 4).view(-1)[rows], None),
            *(*tables, 1e-12, 0.4, seed),
            dropout_rows=rows,
        )
    padded = padded.view(12, 24)
    assert torch.equal(padded != 0, hidden_mask(padded, 0.4, seed, None) != 0)
    assert torch.equal(packed, padded[rows])


def test_large_mean_and_constant_rows(backend, device):
    """A mean of 10 000 costs no digits, and a row of one value is normalised to nothing."""
    skip_unless_computable(backend)
    word, position, table, weight, bias = small(device)
    word = word + 10_000
    position[3], table[1], word[5] = 0.0, 0.0, 12_345.0
    ids, ones = torch.tensor([0, 1, 2, 5], device=device), torch.ones(4, device=device).long()
    indices = (ids, ones * 3, ones)
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(*indices, word, position, table, weight, bias)
    exact = plain(
        (word.double(), position.double(), table.double()), weight, bias, indices, None, None
    )
    same = plain((word, position, table), weight, bias, indices, None, None)
    assert_close(y[:3], exact[:3], same[:3])
    torch.testing.assert_close(y[3], bias, rtol=0, atol=1e-3)


def test_ids_outside_the_table(backend, device):
    """On the CPU an error. The kernels of a GPU, which cannot, give NaN, and pass it on to the
    nearest row that exists."""
    skip_unless_computable(backend)
    parameters = small(device)
    zero = torch.zeros(5, dtype=torch.int64, device=device)
    bad = torch.tensor([0, 6, 1, -1, 2], device=device)
    if backend in ("reference", "cpu"):
        if device != "cpu":
            pytest.skip("torch's own gather stops the device")
        for name, indices in (
            ("ids", (bad, zero, None)),
            ("position_ids", (zero, bad, None)),
            ("type_ids", (zero, zero, bad)),
        ):
            with bertkern.backend(backend), pytest.raises(IndexError, match=f"{name} holds -1"):
                bertkern.embedding_layer_norm(*indices, *parameters)
        return
    kept = torch.tensor([True, False, True, False, True])
    leaves = [t.requires_grad_() for t in parameters]
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(bad, zero, None, *leaves)
        grads = torch.autograd.grad(y[kept].sum(), leaves[3:], retain_graph=True)
        dword, dposition, _ = torch.autograd.grad(y.sum(), leaves[:3])
        for indices in ((zero, bad * 2**31, zero), (zero, zero, (bad * 2**20).int())):
            beyond = indices[1] + indices[2]
            y_beyond = bertkern.embedding_layer_norm(*indices, *parameters)
            assert torch.equal(y_beyond.isnan().all(1), beyond != 0)
            assert torch.equal(y_beyond.isnan().any(1), beyond != 0)
    assert y[~kept].isnan().all()
    assert y[kept].isfinite().all()
    assert grads[1].isfinite().all()
    assert dword.shape == (6, 24)
    assert dword[5].isnan().all()
    assert dword[1:5].isfinite().all()
    assert dposition[1:].isfinite().all()


def sums_of_runs(backend, device, runs, columns, padding_idx=None, dtype=torch.float32):
    """Gradients of the tables where word i is read runs[i] times in a text that mixes the words,
    and what they should be: (ours, exact)."""
    torch.manual_seed(len(runs))
    ids = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))
    ids = ids[torch.randperm(len(ids))].to(device)
    sizes = (len(runs) + 3, 5, 2)
    leaves = [torch.randn(rows, columns).to(device, dtype).requires_grad_() for rows in sizes]
    dy = torch.randn(len(ids), columns).to(device, dtype)
    indices = (ids, ids % 5, ids % 2)
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(
            *indices, *leaves, None, None, 1e-5, padding_idx=padding_idx
        )
        grads = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    z = F.embedding(ids, wide[0], padding_idx) + F.embedding(indices[1], wide[1])
    exact = F.layer_norm(z + F.embedding(indices[2], wide[2]), (columns,), eps=1e-5)
    return grads, torch.autograd.grad(exact, wide, dy.double())


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("columns", [24, 264])
@pytest.mark.parametrize(
    "runs",
    [
        [1] * 64,
        [64, 64, 64],
        [63, 1, 65, 2, 126, 64],
        [0, 300, 0, 1, 0],
        [1, 511],
        [31, 1, 33, 0, 0, 700, 3],
    ],
    ids=str,
)
def test_words_that_repeat(backend, device, runs, columns):
    """Sums that end at, cross and fill the chunks of 64 that the CUDA kernels add, one warp for
    every 256 columns."""
    skip_unless_computable(backend)
    if backend == "triton" and device == "cpu" and columns > 24:
        pytest.skip("it takes the interpreter ten seconds, and the sums are torch's own")
    for grad, exact in zip(*sums_of_runs(backend, device, runs, columns), strict=True):
        error = (grad.double() - exact).abs().max()
        assert error <= 1e-5 * exact.abs().max()
        assert torch.equal(grad == 0, exact == 0)  # rows that no token reads


@pytest.mark.usefixtures("nan_filled_memory")
def test_padding_that_repeats(backend, device):
    skip_unless_computable(backend)
    for padding_idx in range(3):
        grads, exact = sums_of_runs(backend, device, [130, 70, 64], 24, padding_idx)
        assert (grads[0][padding_idx] == 0).all()
        for grad, want in zip(grads, exact, strict=True):
            assert (grad.double() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("columns", [24, 33])
def test_a_large_vocabulary_of_which_little_is_read(backend, device, columns):
    """Every other row has a gradient of exactly 0."""
    skip_unless_computable(backend)
    tables = [torch.randn(rows, columns, device=device) for rows in (1000, 70, 3)]
    leaves = [t.half().requires_grad_() for t in tables]
    ids = torch.tensor([999, 0, 500, 999, 31, 32], device=device)
    indices = (ids, ids % 70, ids % 2)
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(*indices, *leaves, None, None)
        grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    for grad, index in zip(grads, indices, strict=True):
        read = torch.zeros(len(grad), dtype=torch.bool, device=device)
        read[index] = True
        assert (grad[~read] == 0).all()
        assert (grad[read] != 0).any(1).all()


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize(
    ("tokens", "columns", "dtype"),
    [(3300, 20, torch.float32), (3300, 20, torch.bfloat16), (900, 1030, torch.float16)],
    ids=str,
)
def test_many_tokens(backend, device, tokens, columns, dtype):
    """More than twice as many as the CUDA backward has warps, or blocks for wide rows: some take
    three, each of which it reads ahead of the last."""
    skip_unless_computable(backend, dtype)
    if backend == "triton" and device == "cpu":
        pytest.skip("it takes the interpreter half a minute; tests/kernels has few partial sums")
    sizes = (40, 60, 2)
    tables = [torch.randn(rows, columns).to(device, dtype) for rows in sizes]
    weight, bias = torch.randn(2, columns, device=device)
    indices = [torch.randint(rows, (tokens,), device=device) for rows in sizes]
    dy = torch.randn(tokens, columns).to(device, dtype)
    seed = torch.tensor([8], device=device)
    mask = hidden_mask(dy, 0.2, seed, None)
    results = []
    for function, cast in (
        (None, lambda t: t),
        (plain, lambda t: t.double()),
        (plain, lambda t: t),
    ):
        leaves = [cast(t.clone()).requires_grad_() for t in (*tables, weight, bias)]
        if function is None:
            with bertkern.backend(backend):
                y = bertkern.embedding_layer_norm(*indices, *leaves, 1e-12, 0.2, seed)
        else:
            y = function(leaves[:3], *leaves[3:], indices, mask, None)
        with bertkern.backend(backend):
            results.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    names = ("y", "word", "position", "type", "weight", "bias")
    for name, *triple in zip(names, *results, strict=True):
        triple = [t.reshape(-1, columns) for t in triple]
        assert_close(*triple, grad=name != "y", name=name)


@pytest.mark.dtypes_in_turn("embedding_layer_norm")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("columns", [24, 33, 1032])
def test_where_rows_lie_changes_nothing(backend, device, columns, dtype):
    """Not a bit, though rows on 16 bytes are read another way; nor do the ids' types."""
    skip_unless_computable(backend, dtype)
    torch.manual_seed(columns)
    ids = torch.randint(4, (9,), device=device)
    inputs = [torch.randn(4, columns).to(device, dtype) for _ in range(3)]
    inputs += [torch.randn(columns).to(device, dtype) for _ in range(2)]
    dy = torch.randn(9, columns).to(device, dtype)
    seed = torch.tensor([11], device=device)

    def elsewhere(t):
        wide = torch.full((*t.shape[:-1], columns + 5), math.nan, dtype=dtype, device=device)
        return wide[..., 1 : columns + 1].copy_(t)

    results = []
    for put, indices in (
        (lambda t: t, (ids, ids, ids)),
        (elsewhere, (ids.int(), ids, ids.int())),
    ):
        leaves = [put(t).requires_grad_() for t in inputs]
        with bertkern.backend(backend):
            y = bertkern.embedding_layer_norm(*indices, *leaves, 1e-5, 0.3, seed)
            results.append((y, *torch.autograd.grad(y, leaves, put(dy))))
    assert all(map(torch.equal, *results))


def test_gradients_are_the_same_bits_from_run_to_run(backend, device):
    skip_unless_computable(backend)
    leaves = [t.requires_grad_() for t in small(device)]
    ids = torch.randint(6, (500,), device=device)
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(ids, ids % 4, ids % 2, *leaves, 1e-12, 0.1)
        first, again = (
            torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for _ in range(2)
        )
    assert all(map(torch.equal, first, again))


def test_a_token_does_not_feel_its_batch(backend, device):
    skip_unless_computable(backend)
    parameters = small(device)
    ids = torch.randint(6, (50,), device=device)
    with bertkern.backend(backend):
        together = bertkern.embedding_layer_norm(ids, ids % 4, ids % 2, *parameters)
        alone = bertkern.embedding_layer_norm(ids[7:8], ids[7:8] % 4, ids[7:8] % 2, *parameters)
    assert torch.equal(together[7:8], alone)


def test_no_weight_no_bias_and_strided_tables(backend, device):
    skip_unless_computable(backend)
    wide = [t.repeat(1, 2)[:, :24] for t in small(device)[:3]]
    leaves = [t.detach().requires_grad_() for t in wide]
    ids = torch.randint(6, (9,), device=device)
    indices = (ids, ids % 4, ids % 2)
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(*indices, *leaves, None, None)
        grads = torch.autograd.grad(y.square().sum(), leaves)
    one = torch.ones(24, device=device)
    same = plain(leaves, one, one * 0, indices, None, None)
    torch.testing.assert_close(y, same)
    for grad, want in zip(grads, torch.autograd.grad(same.square().sum(), leaves), strict=True):
        torch.testing.assert_close(grad, want, atol=1e-4, rtol=1e-4)


def test_half_precision_sums_in_float32(backend, device):
    """4000 times the same word: a sum in float16 would stop growing."""
    skip_unless_computable(backend)
    leaves = [t.half().requires_grad_() for t in small(device)]
    ids = torch.ones(4000, dtype=torch.int64, device=device)
    dy = torch.randn(24, device=device).half().expand(4000, 24)
    with bertkern.backend(backend):
        y = bertkern.embedding_layer_norm(ids, ids, ids, *leaves)
        grads = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(
        plain(wide[:3], *wide[3:], (ids,) * 3, None, None), wide, dy.double()
    )
    names = ("word", "position", "type", "weight", "bias")
    for name, grad, want in zip(names, grads, exact, strict=True):
        if backend == "triton" and device == "cpu" and name in ("word", "position"):
            continue  # aten's own sum, which on a CPU is one addition after the other in float16
        error = (grad.double() - want).abs().max() / want.abs().max()
        assert error < 2e-3, name


def test_wrong_arguments_are_named():
    word, position, table, weight, bias = small()
    ids = torch.zeros(2, 3, dtype=torch.int64)

    def call(ids=ids, position_ids=ids, type_ids=None, **changed):
        tables = dict(word=word, position=position, type=table, weight=weight, bias=bias) | changed
        return bertkern.embedding_layer_norm(ids, position_ids, type_ids, **tables)

    with pytest.raises(TypeError, match=r"ids has dtype torch\.float32; allowed are int64 and"):
        call(ids=ids.float())
    with pytest.raises(TypeError, match=r"type_ids must be a torch\.Tensor, not list"):
        call(type_ids=[0])
    with pytest.raises(ValueError, match=r"position_ids has shape \[4\], which does not broadcast"):
        call(position_ids=torch.zeros(4).long())
    with pytest.raises(TypeError, match=r"position has dtype torch\.float16, but word has"):
        call(position=position.half())
    with pytest.raises(ValueError, match=r"type has 23 columns, but word has 24"):
        call(type=table[:, :23])
    with pytest.raises(ValueError, match=r"word has shape \[0, 24\]; it must be \[rows, columns\]"):
        call(word=word[:0])
    with pytest.raises(ValueError, match=r"weight has shape \[23\]; it must be \[24\]"):
        call(weight=weight[:23])
    with pytest.raises(ValueError, match=r"padding_idx=6; it must be None or from -6 to 5"):
        call(padding_idx=6)
    with pytest.raises(ValueError, match="dropout_rows has shape"):
        call(dropout_p=0.1, dropout_rows=torch.zeros(5).long())
    with pytest.raises(ValueError, match="eps=-1"):
        call(eps=-1.0)


def test_negative_padding_idx_counts_from_the_end():
    leaves = [t.requires_grad_() for t in small()]
    ids = torch.tensor([5, 5, 0])
    y = bertkern.embedding_layer_norm(ids, ids % 4, None, *leaves, padding_idx=-1)
    (dword,) = torch.autograd.grad(y.square().sum(), leaves[:1])
    assert (dword[5] == 0).all()
    assert (dword[0] != 0).any()
