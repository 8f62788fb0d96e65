"""torch.func on the ops: vmap against a Python loop, gradients through it and of it, and what is
refused."""

import functools
import importlib

import pytest
import torch
from public_ops import OPS, SEED
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

import bertkern
from bertkern import ops

SAMPLES = 3


@pytest.fixture(params=OPS)
def public(request):
    torch.manual_seed(0)
    return OPS[request.param]


def stacked(public, only_batched):
    """(inputs with a first dimension of samples, in_dims): all inputs, or those that a batch
    has."""
    count = max(public.batched, 1) if only_batched else len(public.shapes)
    inputs = [
        torch.randn(SAMPLES, *shape) if i < count else torch.randn(shape)
        for i, shape in enumerate(public.shapes)
    ]
    return inputs, tuple(0 if i < count else None for i in range(len(inputs)))


def loop(function, inputs, in_dims):
    """What vmap means."""
    results = [
        function(
            *[t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True)]
        )
        for i in range(SAMPLES)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(one) for one in zip(*results, strict=True))
    return (torch.stack(results),)


def assert_equal(found, wanted):
    found = found if isinstance(found, tuple) else (found,)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def loss_of(public):
    def loss(*inputs):
        out = public.function(*inputs)
        return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).square().sum()

    return loss


@pytest.mark.parametrize("only_batched", [False, True])
def test_vmap_is_a_loop(public, only_batched):
    inputs, in_dims = stacked(public, only_batched)
    found = vmap(public.function, in_dims)(*inputs)
    assert_equal(found, loop(public.function, inputs, in_dims))


def test_vmap_over_another_dimension(public):
    inputs, in_dims = stacked(public, True)
    moved = [t if d is None else t.movedim(0, 1) for t, d in zip(inputs, in_dims, strict=True)]
    found = vmap(public.function, tuple(None if d is None else 1 for d in in_dims))(*moved)
    assert_equal(found, loop(public.function, inputs, in_dims))


@pytest.mark.parametrize("only_batched", [False, True])
def test_gradient_of_each_sample(public, only_batched):
    inputs, in_dims = stacked(public, only_batched)
    of_one = grad(loss_of(public), argnums=tuple(range(len(inputs))))
    found = vmap(of_one, in_dims)(*inputs)

    def plain(*sample):
        leaves = [t.clone().requires_grad_() for t in sample]
        return torch.autograd.grad(loss_of(public)(*leaves), leaves)

    assert_equal(found, loop(plain, inputs, in_dims))


def test_gradient_through_vmap(public):
    inputs, in_dims = stacked(public, True)
    leaves = [t.requires_grad_() for t in inputs]
    found = torch.autograd.grad(vmap(loss_of(public), in_dims)(*leaves).sum(), leaves)
    losses = loop(loss_of(public), leaves, in_dims)[0]
    assert_equal(found, torch.autograd.grad(losses.sum(), leaves))


def test_second_derivatives(public):
    """By grad of grad, by vjp after its transform has ended, and by vmapped vjp: all are the double
    backward of plain autograd."""
    inputs = [t.double() for t in stacked(public, True)[0]]
    inputs = [t[0] if t.dim() > len(s) else t for t, s in zip(inputs, public.shapes, strict=True)]
    first, *others = inputs
    direction = torch.randn_like(first)

    def gradient(x):
        return grad(loss_of(public))(x, *others)

    x = first.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(public)(x, *others), x, create_graph=True)
    (wanted,) = torch.autograd.grad((slope * direction).sum(), x)
    assert wanted.abs().max() > 0.0
    assert_equal(grad(lambda x: (gradient(x) * direction).sum())(first), (wanted,))
    assert_equal(vjp(gradient, first)[1](direction)[0], (wanted,))
    rows = jacrev(gradient)(first).flatten(first.dim()).flatten(0, -2)
    assert_equal((direction.flatten() @ rows).view_as(first), (wanted,))


def test_vmap_of_vmap_and_of_no_sample():
    torch.manual_seed(1)
    x, weight = torch.randn(2, 3, 5, 8), torch.randn(2, 8)
    found = vmap(vmap(bertkern.layer_norm, (0, None)), (0, 0))(x, weight)
    wanted = torch.stack([bertkern.layer_norm(x[i], weight[i]) for i in range(2)])
    torch.testing.assert_close(found, wanted)
    assert vmap(bertkern.layer_norm)(x[0, :0]).shape == (0, 5, 8)
    assert vmap(bertkern.layer_norm)(x[0, :0], weight[:0]).shape == (0, 5, 8)


def test_randomness_is_vmaps():
    """ "same" drops the same elements of every sample, "different" others, and "error" refuses."""
    x = torch.ones(2, 64, 64)

    def dropped(randomness):
        return vmap(lambda x: ops.dropout(x, 0.5), randomness=randomness)(x)

    same, different = dropped("same"), dropped("different")
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        dropped("error")


def test_each_sample_keeps_its_rows_in_the_mask():
    x, rows = torch.ones(2, 40, 16), torch.arange(100, 140)
    for numbers in (None, rows):
        drop = functools.partial(
            ops.dropout, dropout_p=0.5, dropout_seed=SEED, dropout_rows=numbers
        )
        one, both = drop(x[0]), vmap(drop)(x)
        assert torch.equal(both, torch.stack([one, one]))
    of_rows = vmap(lambda x, rows: ops.dropout(x, 0.5, SEED, dropout_rows=rows))
    found = of_rows(x, torch.stack([rows, rows + 40]))
    assert torch.equal(found[0], ops.dropout(x[0], 0.5, SEED, dropout_rows=rows))
    assert torch.equal(found[1], ops.dropout(x[1], 0.5, SEED, dropout_rows=rows + 40))


def test_rows_and_sequences_are_folded_into_one_call(monkeypatch):
    """The samples of a batch are one launch, not one each."""
    counted = []
    real = ops._backend.implementation

    def counting(*arguments, **options):
        counted.append(arguments[0])
        return real(*arguments, **options)

    for module in ("layer_norm", "linear", "ffn", "attention"):
        op_file = importlib.import_module(f"bertkern.ops.{module}")
        monkeypatch.setattr(op_file, "implementation", counting)
    q, x, w = torch.randn(SAMPLES, 2, 5, 2, 8), torch.randn(SAMPLES, 5, 8), torch.randn(8, 8)
    vmap(bertkern.attention)(q, q, q)
    vmap(bertkern.layer_norm)(x)
    vmap(bertkern.linear, (0, None))(x, w)
    vmap(lambda x: bertkern.ffn(x, w, None, w, None))(x)
    assert counted == ["attention", "layer_norm", "linear", "ffn"]


@pytest.mark.parametrize("transform", [vmap, grad, lambda f: vmap(grad(f), (0, None, None))])
def test_compiled_transforms(transform):
    torch.manual_seed(2)
    x, weight = torch.randn(4, 4, 8), torch.randn(8)

    def loss(x, weight, bias):
        return bertkern.layer_norm(x, weight, bias).square().sum()

    inputs = (x, *[t.expand(4, 8) if transform is vmap else t for t in (weight, weight)])
    compiled = torch.compile(transform(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), transform(loss)(*inputs))


def test_forward_mode_is_refused(public):
    """A tangent must not be dropped on the way."""
    inputs = [t.detach() for t in public.inputs()]
    with pytest.raises(NotImplementedError, match="forward mode"):
        jvp(public.function, tuple(inputs), tuple(inputs))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t) for t in inputs]
        with pytest.raises(NotImplementedError, match="forward mode"):
            public.function(*duals)
        public.function(*inputs)  # without a tangent there is nothing to drop
