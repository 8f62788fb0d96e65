"""linear, ffn and dropout against fp64, on every backend: epilogues, gradients, masks."""

import pytest
import torch
from torch.nn import functional as F

import bertkern
from bertkern.ops import dropout
from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ACTIVATIONS = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}
# tokens, in, out, activation, extras: each value of each at least twice, in few and small products,
# because the interpreter is slow.
LINEAR_CASES = [
    (9, 1, 3, None, ""),
    (0, 8, 8, "gelu", "bias residual dropout"),
    (5, 7, 3, "gelu", "bias"),
    (70, 33, 65, "gelu", "bias residual dropout"),
    (64, 64, 64, "gelu", ""),
    (70, 33, 65, "gelu_tanh", "bias"),
    (130, 20, 40, "gelu_tanh", "bias residual dropout"),
    (70, 33, 65, "relu", "bias dropout"),
    (130, 20, 40, "relu", ""),
    (70, 33, 65, None, "bias residual dropout"),
    (64, 64, 64, None, "bias"),
    (33, 100, 17, None, "residual"),
]


# tokens, columns, hidden columns, activation, dropout
FFN_CASES = [
    (37, 20, 70, "gelu", 0.25),
    (64, 32, 128, "gelu", 0.0),
    (37, 20, 70, "gelu_tanh", 0.0),
    (64, 32, 64, "relu", 0.25),
    (0, 8, 16, "gelu", 0.25),
]


def skip_unless_computable(backend: str, dtype: torch.dtype) -> None:
    """The CUDA extension has no products yet; the interpreter multiplies bf16 wrongly."""
    if backend == "cuda":
        pytest.skip("backend cuda has no linear kernel yet")
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the Triton interpreter multiplies bfloat16 wrongly in tl.dot")


def hold_to_rule(ours, plain, inputs, dy):
    results = {}
    for key, function, cast in (
        ("ours", ours, lambda t: t),
        ("exact", plain, lambda t: t.double()),
        ("same", plain, lambda t: t),
    ):
        leaves = [cast(t.detach().clone()).requires_grad_() for t in inputs]
        out = function(*leaves)
        results[key] = out, torch.autograd.grad(out, leaves, dy.to(out.dtype))
    assert_close(*(r[0] for r in results.values()))
    for i, grad in enumerate(results["ours"][1]):
        assert grad.dtype == inputs[i].dtype
        matrices = [r[1][i].reshape(-1, r[1][i].shape[-1]) for r in results.values()]
        assert_close(*matrices, grad=True, name=f"gradient {i}")


@pytest.mark.dtypes_in_turn("linear")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear(backend, device, case, dtype):
    skip_unless_computable(backend, dtype)
    tokens, columns, out, activation, extras = case
    generator = torch.Generator().manual_seed(tokens + columns + out)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    x, w, dy = make(tokens, columns), make(out, columns) / columns**0.5, make(tokens, out)
    named = {"x": x, "w": w}
    named |= {"b": make(out)} if "bias" in extras else {}
    named |= {"residual": make(tokens, out)} if "residual" in extras else {}
    p = 0.25 if "dropout" in extras else 0.0
    seed = torch.tensor([5], device=device)
    mask = hidden_mask(dy, p, seed, None)

    def ours(*tensors):
        arguments = dict(zip(named, tensors, strict=True))
        return bertkern.linear(**arguments, activation=activation, dropout_p=p, dropout_seed=seed)

    def plain(*tensors):
        arguments = dict(zip(named, tensors, strict=True))
        z = F.linear(arguments["x"], arguments["w"], arguments.get("b"))
        y = ACTIVATIONS[activation](z) * mask.to(z.dtype)
        return y + arguments["residual"] if "residual" in arguments else y

    with bertkern.backend(backend):
        hold_to_rule(ours, plain, list(named.values()), dy)


@pytest.mark.dtypes_in_turn("ffn")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", FFN_CASES, ids=str)
def test_ffn(backend, device, case, dtype):
    skip_unless_computable(backend, dtype)
    tokens, columns, hidden, activation, dropout_p = case
    generator = torch.Generator().manual_seed(tokens + columns + hidden)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    x, dy = make(tokens, columns), make(tokens, columns)
    w1, b1 = make(hidden, columns) / columns**0.5, make(hidden)
    w2, b2 = make(columns, hidden) / hidden**0.5, make(columns)
    seed = torch.tensor([9], device=device)
    rows = torch.arange(tokens, device=device) * 2
    mask = hidden_mask(dy, dropout_p, seed, rows)

    def ours(*tensors):
        return bertkern.ffn(*tensors, activation, dropout_p, seed, dropout_rows=rows)

    def plain(x, w1, b1, w2, b2):
        y = F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)
        return y * mask.to(y.dtype) if dropout_p else y

    with bertkern.backend(backend):
        hold_to_rule(ours, plain, (x, w1, b1, w2, b2), dy)


SHAPES_OF_LINEAR = {"x": (37, 20), "w": (33, 20), "b": (33,)}
SHAPES_OF_FFN = {"x": (37, 20), "w1": (50, 20), "b1": (50,), "w2": (20, 50), "b2": (20,)}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("op", ["linear", "ffn"])
def test_preactivation_saved_or_recomputed(backend, device, op, activation):
    """One activation [tokens, hidden] less is kept, and the gradients are the same."""
    skip_unless_computable(backend, torch.float32)
    torch.manual_seed(3)
    shapes = SHAPES_OF_LINEAR if op == "linear" else SHAPES_OF_FFN
    inputs = {name: torch.randn(s, device=device).requires_grad_() for name, s in shapes.items()}
    seed, function = torch.tensor([9], device=device), getattr(bertkern, op)
    results, kept = [], []
    for save_preact in (True, False):
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with (
            bertkern.backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            y = function(
                **inputs,
                activation=activation,
                dropout_p=0.2,
                dropout_seed=seed,
                save_preact=save_preact,
            )
            results.append((y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))))
        kept.append(sum(saved.values()))
    hidden = 33 if op == "linear" else 50
    assert kept[0] - kept[1] == 37 * hidden
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("op", ["linear", "ffn"])
def test_recomputed_preactivation_with_gradients_of_gradients(op):
    torch.manual_seed(4)
    shapes = SHAPES_OF_LINEAR if op == "linear" else SHAPES_OF_FFN
    inputs = [torch.randn([max(1, n // 10) for n in s]).double() for s in shapes.values()]
    function = getattr(bertkern, op)
    call = lambda *t: function(*t, activation="gelu", save_preact=False)  # noqa: E731
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(call, leaves)


def test_nothing_is_saved_without_gradients():
    """Without a backward to come the hidden activation is not written a second time."""
    x, w1, w2 = torch.randn(3, 8), torch.randn(5, 8), torch.randn(8, 5)
    y, z = torch.ops.bertkern.ffn_fwd(x, w1, None, w2, None, "gelu", 0.0, None, None, False)
    assert z.shape == (0,)
    torch.testing.assert_close(y, bertkern.ffn(x, w1, None, w2, None))


def test_gelu_is_the_erf_form(backend, device):
    """The tanh form differs by up to 4.7e-4; far negative values keep their digits."""
    skip_unless_computable(backend, torch.float32)
    x = torch.linspace(-9, 9, 361, device=device)[:, None]
    one = torch.ones(1, 1, device=device)
    with bertkern.backend(backend):
        y = bertkern.linear(x, one, activation="gelu")
    assert_close(y, F.gelu(x.double()), F.gelu(x))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("rows_given", [False, True])
def test_dropout(backend, device, dtype, rows_given):
    if backend == "cuda":
        pytest.skip("backend cuda has no dropout kernel yet")
    x = torch.randn(45, 70, device=device).to(dtype).requires_grad_()
    seed = torch.tensor([1 << 40], device=device)
    rows = torch.arange(45, device=device).flip(0) if rows_given else None
    mask = hidden_mask(x, 0.3, seed, rows)
    with bertkern.backend(backend):
        y = dropout(x, 0.3, seed, dropout_rows=rows)
        y.backward(torch.ones_like(y))
    torch.testing.assert_close(y, (x.float() * mask).to(dtype))
    torch.testing.assert_close(x.grad, mask.to(dtype))


def test_a_token_does_not_feel_its_batch(backend, device):
    """No split of K by the number of rows: a row of a product alone and in a batch is the same
    bits."""
    skip_unless_computable(backend, torch.float32)
    torch.manual_seed(0)
    x = torch.randn(200, 96, device=device)
    w1, b1 = torch.randn(160, 96, device=device), torch.randn(160, device=device)
    w2, b2 = torch.randn(96, 160, device=device), torch.randn(96, device=device)
    with bertkern.backend(backend):
        together = bertkern.ffn(x, w1, b1, w2, b2)
        alone = bertkern.ffn(x[64:128], w1, b1, w2, b2)
    if backend in ("triton", "cuda"):
        assert torch.equal(together[64:128], alone)
    else:  # torch's own CPU and cuBLAS products choose by size (docs/numerics.md)
        torch.testing.assert_close(together[64:128], alone, rtol=1e-4, atol=1e-3)


def test_leading_dimensions_and_transposed_weight(device):
    x = torch.randn(2, 3, 5, device=device)
    w = torch.randn(5, 4, device=device).t()
    torch.testing.assert_close(bertkern.linear(x, w), F.linear(x, w))


def test_wrong_arguments_are_named():
    x, w = torch.zeros(2, 8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="activation='swish'; allowed are None, 'gelu'"):
        bertkern.linear(x, w, activation="swish")
    with pytest.raises(ValueError, match=r"w has shape \[4, 7\]; it must be \[out, 8\]"):
        bertkern.linear(x, torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"b has shape \[3\]; it must be \[4\]"):
        bertkern.linear(x, w, torch.zeros(3))
    with pytest.raises(TypeError, match=r"w has dtype torch\.float16, but x has torch\.float32"):
        bertkern.linear(x, w.half())
    with pytest.raises(ValueError, match=r"w2 has shape \[8, 5\]"):
        bertkern.ffn(x, w, None, torch.zeros(8, 5), None)
    with pytest.raises(ValueError, match=r"dropout_p=-0\.1"):
        bertkern.linear(x, w, dropout_p=-0.1)
