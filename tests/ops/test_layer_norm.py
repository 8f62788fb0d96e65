"""layer_norm and dropout_add_layer_norm against fp64, on every backend."""

import pytest
import torch
from torch.nn import functional as F

import bertkern
from bertkern.ops import _backend
from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(1, 1), (3, 7), (67, 128), (5, 33), (33, 384), (9, 768), (2, 1000), (4, 1025), (0, 16)]
# More rows than the CUDA backward has warps, or for wide rows blocks: some take a second row.
MANY_ROWS = [(1700, 20), (500, 1030)]


def random(shape, dtype, device, generator, mean=0.0):
    return (torch.randn(shape, generator=generator) + mean).to(device, dtype)


def hold_to_rule(run, inputs, names, cotangents):
    """run(inputs) -> outputs; the same in fp64 and in plain torch decides what is right."""
    functions = {"ours": run[0], "plain": run[1]}
    results = {}
    for key, function, cast in (
        ("ours", "ours", lambda t: t),
        ("exact", "plain", lambda t: t.double()),
        ("same", "plain", lambda t: t),
    ):
        leaves = [cast(t.detach().clone()).requires_grad_() for t in inputs]
        outputs = functions[function](*leaves)
        grads = torch.autograd.grad(
            outputs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
        )
        results[key] = (outputs, grads)
    for i, out in enumerate(results["ours"][0]):
        assert_close(out, results["exact"][0][i], results["same"][0][i], name=f"output {i}")
    for i, grad in enumerate(results["ours"][1]):
        assert grad.dtype == inputs[i].dtype
        two_dim = [r[1][i].reshape(-1, r[1][i].shape[-1]) for r in results.values()]
        assert_close(
            grad.reshape(two_dim[0].shape), *two_dim[1:], grad=True, name=f"gradient of {names[i]}"
        )


@pytest.mark.dtypes_in_turn("layer_norm")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layer_norm(backend, device, shape, dtype, mean):
    generator = torch.Generator().manual_seed(shape[1])
    x = random(shape, dtype, device, generator, mean)
    weight = random(shape[1:], torch.float32, device, generator)
    bias = random(shape[1:], torch.float32, device, generator)
    dy = random(shape, dtype, device, generator)

    def plain(x, weight, bias):
        y = F.layer_norm(x, shape[1:], weight.to(x.dtype), bias.to(x.dtype), 1e-5)
        return (y,)

    with bertkern.backend(backend):
        hold_to_rule(
            (lambda *t: (bertkern.layer_norm(*t, 1e-5),), plain),
            (x, weight, bias),
            ("x", "weight", "bias"),
            (dy,),
        )


@pytest.mark.dtypes_in_turn("dropout_add_layer_norm")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    ("shape", "dropout_p", "rows_given"),
    [
        ((3, 7), 0.3, False),
        ((67, 128), 0.0, False),
        ((5, 33), 0.3, True),
        ((130, 96), 0.3, False),
        ((9, 768), 0.3, True),
        ((4, 1025), 0.0, False),
        ((0, 16), 0.3, True),
    ],
)
def test_dropout_add_layer_norm(backend, device, shape, dtype, dropout_p, rows_given):
    generator = torch.Generator().manual_seed(shape[1])
    x, residual, dy, dz = (random(shape, dtype, device, generator) for _ in range(4))
    weight, bias = (random(shape[1:], dtype, device, generator) for _ in range(2))
    seed = torch.tensor([17], device=device)
    rows = torch.arange(shape[0], device=device) * 3 + 5 if rows_given else None
    mask = hidden_mask(x, dropout_p, seed, rows)

    def ours(*tensors):
        return bertkern.dropout_add_layer_norm(
            *tensors, dropout_p, 1e-12, True, seed, dropout_rows=rows
        )

    def plain(x, residual, weight, bias):
        z = residual + x * mask.to(x.dtype)
        return F.layer_norm(z, shape[1:], weight, bias, 1e-12), z

    with bertkern.backend(backend):
        hold_to_rule(
            (ours, plain),
            (x, residual, weight, bias),
            ("x", "residual", "weight", "bias"),
            (dy, dz),
        )


@pytest.mark.dtypes_in_turn("dropout_add_layer_norm")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", MANY_ROWS, ids=str)
def test_many_rows(backend, device, shape, dtype):
    if backend == "triton" and device == "cpu":
        pytest.skip("it takes the interpreter half a minute; tests/kernels has few partial sums")
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dz = (random(shape, dtype, device, generator) for _ in range(4))
    weight, bias = (random(shape[1:], dtype, device, generator) for _ in range(2))
    seed = torch.tensor([3], device=device)
    mask = hidden_mask(x, 0.2, seed, None)

    def ours(*tensors):
        return bertkern.dropout_add_layer_norm(*tensors, 0.2, 1e-5, True, seed)

    def plain(x, residual, weight, bias):
        z = residual + x * mask.to(x.dtype)
        return F.layer_norm(z, shape[1:], weight, bias, 1e-5), z

    with bertkern.backend(backend):
        hold_to_rule(
            (ours, plain),
            (x, residual, weight, bias),
            ("x", "residual", "weight", "bias"),
            (dy, dz),
        )


def elsewhere(t):
    """The same values from an odd address on, with an odd stride between rows and NaN around."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan"), dtype=t.dtype)
    view = wide.to(t.device)[..., 1 : t.shape[-1] + 1]
    return view.copy_(t)


@pytest.mark.dtypes_in_turn("dropout_add_layer_norm")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("columns", [24, 33, 1032])
def test_where_rows_lie_changes_nothing(backend, device, columns, dtype):
    """Not a bit, though rows on 16 bytes are read another way than others."""
    torch.manual_seed(columns)
    shapes = ((6, columns), (6, columns), (columns,), (columns,))
    inputs = [torch.randn(shape).to(device, dtype) for shape in shapes]
    dy, dz = (torch.randn(6, columns).to(device, dtype) for _ in range(2))
    seed = torch.tensor([11], device=device)
    results = []
    for put in (lambda t: t, elsewhere):
        leaves = [put(t).requires_grad_() for t in inputs]
        with bertkern.backend(backend):
            y, z = bertkern.dropout_add_layer_norm(*leaves, 0.3, 1e-5, True, seed)
            grads = torch.autograd.grad((y, z), leaves, (put(dy), put(dz)))
        results.append((y, z, *grads))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("weight_dtype", "bias_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float64, torch.bfloat16),
        (torch.float16, None),
        (None, torch.float32),
    ],
    ids=str,
)
def test_parameters_of_any_dtype(backend, device, weight_dtype, bias_dtype):
    """Their gradients come back in their own dtypes."""
    torch.manual_seed(0)
    x, dy = (torch.randn(9, 40).to(device, torch.float16) for _ in range(2))
    parameters = [
        None if dtype is None else torch.randn(40).to(device, dtype).requires_grad_()
        for dtype in (weight_dtype, bias_dtype)
    ]
    given = [p for p in parameters if p is not None]
    with bertkern.backend(backend):
        y = bertkern.layer_norm(x, *parameters)
        grads = torch.autograd.grad(y, given, dy)
    wide = [None if p is None else p.detach().double().requires_grad_() for p in parameters]
    exact = F.layer_norm(x.double(), (40,), *wide)
    exact_grads = torch.autograd.grad(exact, [w for w in wide if w is not None], dy.double())
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)
    for parameter, grad, want in zip(given, grads, exact_grads, strict=True):
        assert grad.dtype == parameter.dtype
        torch.testing.assert_close(grad.double(), want, rtol=1e-2, atol=1e-2)


def test_no_parameters_and_strided_rows(backend, device):
    torch.manual_seed(0)
    x = torch.randn(40, 96, device=device)[::2, :64].requires_grad_()
    with bertkern.backend(backend):
        y = bertkern.layer_norm(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, F.layer_norm(x, (64,)))
    assert x.grad is not None


def test_large_mean_keeps_the_variance(backend, device):
    """Σx² − mean² in fp32 would lose everything here; a centred sum does not."""
    torch.manual_seed(0)
    x = torch.randn(16, 256, device=device) + 10_000
    exact = F.layer_norm(x.double(), (256,))
    with bertkern.backend(backend):
        y = bertkern.layer_norm(x)
    assert_close(y, exact, F.layer_norm(x, (256,)))


@pytest.mark.parametrize("columns", [40, 1100])
def test_deviations_as_small_as_the_rounding_of_the_mean(backend, device, columns):
    """x − mean is exact here but for the mean's own rounding, which statistics must not contain."""
    torch.manual_seed(1)
    x = 10_000 + torch.randint(4, (5, columns), device=device) * 2.0**-10
    with bertkern.backend(backend):
        y = bertkern.layer_norm(x, eps=1e-12)
    exact = F.layer_norm(x.double(), (columns,), eps=1e-12)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_row(backend, device):
    x = torch.randn(5, 64, device=device)
    x[2, 3] = float("nan")
    with bertkern.backend(backend):
        y = bertkern.layer_norm(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [(131, 80), (15, 1030)])
def test_a_row_does_not_feel_its_batch(backend, device, rows, columns):
    torch.manual_seed(0)
    x, dy = torch.randn(2, rows, columns, device=device)
    x.requires_grad_()
    with bertkern.backend(backend):
        y = bertkern.layer_norm(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        for row in range(0, rows, rows // 5):
            alone = bertkern.layer_norm(x[row : row + 1])
            assert torch.equal(y[row : row + 1], alone)
            (dx_alone,) = torch.autograd.grad(alone, x, dy[row : row + 1])
            assert torch.equal(dx[row], dx_alone[row])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_rows_too_wide_for_triton(device, dtype):
    """65,537 columns: another backend computes them; triton, when forced, says why it cannot."""
    columns = 65_537
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dz = (random((2, columns), dtype, device, generator) for _ in range(4))
    weight, bias = (random((columns,), dtype, device, generator) for _ in range(2))
    seed = torch.tensor([2], device=device)
    mask = hidden_mask(x, 0.1, seed, None).to(dtype)

    def norm(x, weight, bias):
        return (F.layer_norm(x, (columns,), weight, bias, 1e-5),)

    def add_norm(x, residual, weight, bias):
        z = residual + x * mask.to(x.dtype)
        return F.layer_norm(z, (columns,), weight, bias, 1e-5), z

    def ours(*tensors):
        return bertkern.dropout_add_layer_norm(*tensors, 0.1, 1e-5, True, seed)

    hold_to_rule(
        (lambda *t: (bertkern.layer_norm(*t, 1e-5),), norm),
        (x, weight, bias),
        ("x", "weight", "bias"),
        (dy,),
    )
    hold_to_rule(
        (ours, add_norm),
        (x, residual, weight, bias),
        ("x", "residual", "weight", "bias"),
        (dy, dz),
    )
    if _backend.unusable("triton", device) is None:
        reason = "at most 65536 columns, not 65537"
        with bertkern.backend("triton"):
            with pytest.raises(NotImplementedError, match=f"layer_norm on .*{reason}"):
                bertkern.layer_norm(x, weight, bias)
            with pytest.raises(NotImplementedError, match=f"dropout_add_layer_norm on .*{reason}"):
                ours(x, residual, weight, bias)


def test_widest_rows_of_triton(device):
    """65,536 columns are not refused."""
    if (reason := _backend.unusable("triton", device)) is not None:
        pytest.skip(f"backend triton: {reason}")
    x = torch.randn(1, 65_536, device=device, requires_grad=True)
    with bertkern.backend("triton"):
        y = bertkern.layer_norm(x)
        y.square().sum().backward()
    assert_close(y.detach(), F.layer_norm(x.double(), (65_536,)), F.layer_norm(x, (65_536,)))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_widest_rows_of_cuda(backend, device, dtype):
    """8192 columns are held in registers; wider rows it refuses, so that another backend has
    them."""
    if backend != "cuda":
        pytest.skip("of the CUDA kernels")
    x, dy = (torch.randn(3, 8192).to(device, dtype) for _ in range(2))
    inputs = (x, *torch.randn(2, 8192, device=device))

    def plain(x, weight, bias):
        return (F.layer_norm(x, (8192,), weight.to(x.dtype), bias.to(x.dtype)),)

    with bertkern.backend("cuda"):
        hold_to_rule(
            (lambda *t: (bertkern.layer_norm(*t),), plain), inputs, ("x", "weight", "bias"), (dy,)
        )
        wider = torch.zeros(1, 8193, device=device, dtype=dtype)
        with pytest.raises(NotImplementedError, match="at most 8192 columns, not 8193"):
            bertkern.layer_norm(wider)
        id = torch.zeros(1, dtype=torch.int64, device=device)
        with pytest.raises(NotImplementedError, match="at most 8192 columns, not 8193"):
            bertkern.embedding_layer_norm(id, id, id, wider, wider, wider, None, None)


@pytest.mark.parametrize("columns", [50, 1030])
@pytest.mark.parametrize("p", [0.4, 1e-7, 1.0])
def test_backends_drop_the_same_elements(backend, device, p, columns):
    """Forward and backward, bit for bit; some p are 0 or 1 in units of 1/65536."""
    rows = torch.tensor([0, 9, 1 << 33, 70], device=device)
    seed = torch.tensor([-3], device=device)
    x = torch.ones(4, columns, device=device, requires_grad=True)
    with bertkern.backend(backend):
        _, z = bertkern.dropout_add_layer_norm(
            x, torch.zeros_like(x), None, None, p, 1e-5, True, seed, dropout_rows=rows
        )
        (dx,) = torch.autograd.grad(z.sum(), x)
    mask = hidden_mask(x, p, seed, rows)
    torch.testing.assert_close(z.detach(), mask, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, mask, rtol=1e-6, atol=0)


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \[7\]; it must be \[8\]"):
        bertkern.layer_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match="eps=-1"):
        bertkern.layer_norm(x, eps=-1)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, not list"):
        bertkern.layer_norm([1.0])
    with pytest.raises(ValueError, match=r"residual has shape \[3, 8\]"):
        bertkern.dropout_add_layer_norm(x, torch.zeros(3, 8), None, None)
    with pytest.raises(ValueError, match="dropout_rows has shape"):
        bertkern.dropout_add_layer_norm(x, x, None, None, 0.1, dropout_rows=torch.zeros(3).long())
    with pytest.raises(TypeError, match=r"dropout_rows has dtype torch\.int32"):
        bertkern.dropout_add_layer_norm(x, x, None, None, 0.1, dropout_rows=torch.zeros(2).int())
