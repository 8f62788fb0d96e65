"""linear_cross_entropy against fp64 on every backend, and what torch asks of it."""

import math

import pytest
import torch
from torch.nn import functional as F

import bertkern
from bertkern.ops import _cpu_linear_cross_entropy as cpu_backend
from bertkern.reference.tolerance import assert_close

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IGNORED = -100
# T, K, V, reduction, smoothing, bias: odd sizes and whole tiles. At a time, the CPU takes 16 rows
# (forward) or 48 classes (backward) here, the interpreter's kernels 64 or 32 to 128 classes.
CASES = [
    (1, 1, 1, "mean", 0.0, True),
    (0, 8, 8, "sum", 0.1, True),
    (7, 5, 3, "sum", 0.0, True),
    (70, 33, 131, "mean", 0.1, True),
    (64, 64, 128, "none", 0.0, False),
    (45, 20, 50, "none", 0.2, True),
    (33, 17, 97, "sum", 1.0, False),
    (40, 32, 96, "mean", 0.0, False),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """The cpu backend in several blocks of rows and of classes, the last ones shorter."""
    monkeypatch.setattr(cpu_backend, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(cpu_backend, "_MIN_ROWS", 16)
    monkeypatch.setattr(cpu_backend, "_MIN_CLASSES", 48)


def skip_unless_computable(backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda":
        pytest.skip("backend cuda has no linear_cross_entropy kernel yet")
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the Triton interpreter multiplies bfloat16 wrongly in tl.dot")


def random_inputs(device, dtype, rows, columns, classes):
    generator = torch.Generator().manual_seed(rows + columns + classes)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    x, w, b = make(rows, columns), make(classes, columns) * columns**-0.5, make(classes)
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    target[1::3] = IGNORED
    return x, w, b, target


def hold_to_sum(loss, each, target, reduction):
    """A reduced loss is one number, whose error in torch is luck: so the rows are held to the rule,
    and the sum to its own roundings, one for each row."""
    exact = each.double().sum()
    exact = exact / (target != IGNORED).sum() if reduction == "mean" else exact
    bound = (len(target) + 1) * torch.finfo(loss.dtype).eps * exact.abs()
    assert (loss - exact).abs() <= bound


def plain(x, w, b, target, **options):
    """Logits in x's dtype, loss in float32 at least."""
    logits = F.linear(x, w, b)
    logits = logits if x.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, **options)


@pytest.mark.dtypes_in_turn("linear_cross_entropy")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(backend, device, case, dtype):
    skip_unless_computable(backend, dtype)
    rows, columns, classes, reduction, smoothing, bias = case
    *tensors, target = random_inputs(device, dtype, rows, columns, classes)
    tensors = tensors if bias else tensors[:2]
    options = {"label_smoothing": smoothing, "reduction": reduction}
    upstream = torch.randn(target.shape if reduction == "none" else (), device=device)
    results = []
    with bertkern.backend(backend):
        for function, cast in (
            (bertkern.linear_cross_entropy, lambda t: t),
            (plain, torch.Tensor.double),
            (plain, lambda t: t),
        ):
            leaves = [cast(t.detach().clone()).requires_grad_() for t in tensors]
            arguments = (*leaves, *([] if bias else [None]), target)
            loss = function(*arguments, **options)
            grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
            if reduction != "none":
                each = function(*arguments, **{**options, "reduction": "none"}).detach()
                hold_to_sum(loss.detach(), each, target, reduction)
                loss = each
            results.append(
                [loss.reshape(-1, 1), *(g if g.dim() == 2 else g[:, None] for g in grads)]
            )
    assert results[0][0].dtype == torch.float32
    for i, (out, ref64, same) in enumerate(zip(*results, strict=True)):
        if i:
            assert out.dtype == dtype
        assert_close(out, ref64, same, grad=i > 0, name=["loss", "dx", "dw", "db"][i])


@pytest.mark.usefixtures("nan_filled_memory")
def test_ignored_rows_leave_nothing_whatever_stands_there(backend, device):
    skip_unless_computable(backend, torch.float32)
    x, w, b, target = random_inputs(device, torch.float32, 40, 9, 60)
    ignored = target == IGNORED
    results = []
    for filler in (0.0, math.nan, math.inf):
        x[ignored] = filler
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
        with bertkern.backend(backend):
            loss = bertkern.linear_cross_entropy(*leaves, target, reduction="none")
            grads = torch.autograd.grad(loss, leaves, torch.ones(1, device=device).expand(40))
        assert (loss[ignored] == 0).all()
        assert (grads[0][ignored] == 0).all()
        results.append([loss, *grads])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.usefixtures("nan_filled_memory")
def test_all_rows_ignored_or_none_there(backend, device):
    """The mean over no rows is NaN, as torch's is, and the gradients are 0."""
    skip_unless_computable(backend, torch.float32)
    x, w, b, target = random_inputs(device, torch.float32, 5, 9, 60)
    for rows in (5, 0):
        leaves = [t.detach().clone().requires_grad_() for t in (x[:rows], w, b)]
        target = torch.full((rows,), IGNORED, device=device)
        with bertkern.backend(backend):
            for reduction in ("mean", "sum"):
                loss = bertkern.linear_cross_entropy(*leaves, target, reduction=reduction)
                assert loss.isnan() if reduction == "mean" else loss == 0
                grads = torch.autograd.grad(loss, leaves)
                assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("wrong", [-1, 60, 2**32 + 3])
def test_a_target_that_is_no_class_shows(backend, device, wrong):
    skip_unless_computable(backend, torch.float32)
    x, w, b, target = random_inputs(device, torch.float32, 10, 9, 60)
    target[3] = wrong
    leaves = [t.requires_grad_() for t in (x, w, b)]
    others = torch.arange(10, device=device) != 3
    with bertkern.backend(backend):
        loss = bertkern.linear_cross_entropy(*leaves, target, reduction="none")
        dx, dw, _ = torch.autograd.grad(loss.sum(), leaves)
    assert loss[3].isnan()
    assert dx[3].isnan().all()
    assert dw.isnan().all()
    assert loss[others].isfinite().all()
    assert dx[others].isfinite().all()


def test_large_logits_and_classes_ruled_out(backend, device):
    skip_unless_computable(backend, torch.float32)
    x, w, b, target = random_inputs(device, torch.float32, 20, 9, 140)
    w *= 300
    b[:64] = b[100:] = -math.inf
    target[target != IGNORED] = 70
    results = []
    with bertkern.backend(backend):
        for function, dtype in (
            (bertkern.linear_cross_entropy, torch.float32),
            (plain, torch.float64),
            (plain, torch.float32),
        ):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
            loss = function(*leaves, b.to(dtype), target, reduction="sum")
            results.append([loss.reshape(1, 1), *torch.autograd.grad(loss, leaves)])
    for out, ref64, same in zip(*results, strict=True):
        assert_close(out, ref64, same, grad=out.numel() > 1)


def test_a_row_does_not_feel_its_batch(backend, device):
    skip_unless_computable(backend, torch.float32)
    x, w, b, target = random_inputs(device, torch.float32, 100, 24, 150)
    results = []
    with bertkern.backend(backend):
        for part in (slice(0, 100), slice(64, 70)):
            leaf = x[part].detach().clone().requires_grad_()
            loss = bertkern.linear_cross_entropy(leaf, w, b, target[part], reduction="none")
            results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for together, alone in zip(*results, strict=True):
        if backend in ("triton", "cuda"):
            assert torch.equal(together[64:70], alone)
        else:  # torch's own CPU and cuBLAS products choose by size (docs/numerics.md)
            torch.testing.assert_close(together[64:70], alone, rtol=1e-4, atol=1e-5)


def test_the_cpu_backend_bounds_what_it_holds(monkeypatch):
    monkeypatch.undo()
    for count, others, fewest in (
        (4000, 30522, 64),
        (30522, 4000, 256),
        (30522, 0, 256),
        (0, 9, 64),
    ):
        parts = list(cpu_backend._pieces(count, others, fewest))
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
        assert all(len(range(count)[p]) * others * 4 <= 16 << 20 for p in parts)
    assert all(p.stop - p.start >= 64 for p in cpu_backend._pieces(640, 10**7, 64))


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_leading_dimensions_transposed_weight_and_strided_target(device, shape):
    x = torch.randn(*shape, 5, device=device)
    w = torch.randn(5, 8, device=device).t()
    target = torch.randint(8, (*shape[::-1],), device=device).movedim(-1, 0) if shape else None
    target = torch.tensor(3, device=device) if target is None else target
    loss = bertkern.linear_cross_entropy(x, w, None, target, reduction="none")
    assert loss.shape == shape
    theirs = plain(x.reshape(-1, 5), w, None, target.reshape(-1), reduction="none")
    torch.testing.assert_close(loss, theirs.reshape(shape))


def test_autocast_computes_as_linear_does_and_the_loss_is_float32():
    x, w, b, target = random_inputs("cpu", torch.float32, 20, 16, 60)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bertkern.linear_cross_entropy(*leaves, target)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in grads)
    lowered = [t.detach().bfloat16() for t in leaves]
    assert torch.equal(loss, bertkern.linear_cross_entropy(*lowered, target))


def test_compile_fullgraph_with_dynamic_shapes():
    def function(x, w, b, target):
        return bertkern.linear_cross_entropy(x, w, b, target, label_smoothing=0.1)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 20):
        x, w, b, target = random_inputs("cpu", torch.float32, rows, 8, 50)
        leaves = [t.requires_grad_() for t in (x, w, b)]
        results = []
        for call in (function, compiled):
            loss = call(*leaves, target)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other)


def test_frozen_parameters_and_meta_tensors():
    x, w, _, target = random_inputs("cpu", torch.float32, 6, 8, 50)
    loss = bertkern.linear_cross_entropy(x.requires_grad_(), w, None, target)
    assert torch.autograd.grad(loss, x)[0].shape == x.shape
    meta = [t.to("meta") for t in (x, w)]
    loss = bertkern.linear_cross_entropy(*meta, None, target.to("meta"), reduction="none")
    assert loss.shape == (6,)


def test_wrong_arguments_are_named():
    x, w, target = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64)
    call = bertkern.linear_cross_entropy
    with pytest.raises(ValueError, match=r"weight has shape \[4, 7\]; it must be \[out, 8\]"):
        call(x, torch.zeros(4, 7), None, target)
    with pytest.raises(ValueError, match=r"weight has shape \[0, 8\]; there must be a class"):
        call(x, torch.zeros(0, 8), None, target)
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; it must be \[4\]"):
        call(x, w, torch.zeros(3), target)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float16, but x has"):
        call(x, w.half(), None, target)
    with pytest.raises(TypeError, match=r"target has dtype torch\.int32; it must be torch\.int64"):
        call(x, w, None, target.int())
    with pytest.raises(ValueError, match=r"target has shape \[2, 1\]; it must be \[2\]"):
        call(x, w, None, target[:, None])
    with pytest.raises(TypeError, match="ignore_index must be an int, not NoneType"):
        call(x, w, None, target, None)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5; it must be between 0 and 1"):
        call(x, w, None, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction='max'; allowed are 'mean', 'sum', 'none'"):
        call(x, w, None, target, reduction="max")


def test_vmap_over_the_batch(device):
    x, w, b, target = random_inputs(device, torch.float32, 24, 8, 50)
    x, target = x.view(3, 8, 8), target.view(3, 8)

    def one(x, target):
        return bertkern.linear_cross_entropy(x, w, b, target, reduction="none")

    torch.testing.assert_close(torch.func.vmap(one)(x, target), one(x, target))
    grads = torch.func.vmap(torch.func.grad(lambda x, t: one(x, t).sum()))(x, target)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grads, torch.autograd.grad(one(leaf, target).sum(), leaf)[0])
