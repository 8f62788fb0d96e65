"""With the shortcut (`usual_call`) and without it every op does the same: the same error, or the
same bits, strides, dtypes and gradients, whatever one of its tensors is instead of what it usually
is.

A call that the shortcut takes skips all checks, so a wrong answer reads memory that is not there.
"""

import warnings

import pytest
import torch
from torch import Tensor
from usual_calls import CALLS

from bertkern.ops._registration import UNUSUAL, USUAL, USUAL_GRADIENT

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),  # what nobody wrote is the same
    pytest.mark.skipif(
        not hasattr(Tensor, "__dlpack_c_exchange_api__"),
        reason="this torch has no exchange interface",
    ),
]


class Loud(Tensor):
    """A subclass with torch's own __torch_function__."""


class Quiet(Tensor):
    """A subclass without one."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def dims(change):
    """The change of one dimension, for each that there is."""
    return lambda t: [change(t, i) for i in range(t.dim())]


def transposed(t):
    """Those of its dimensions, two by two, swapped in memory alone."""
    pairs = [(i, j) for i in range(t.dim()) for j in range(i)]
    return [t.transpose(i, j).contiguous().transpose(i, j) for i, j in pairs]


def step_two(t, i):
    """Every other element of a memory of twice the size, which holds other numbers between."""
    return torch.stack((t, t + 1 if t.dtype != torch.bool else ~t), i + 1).select(i + 1, 0)


def of_inference(t):
    with torch.inference_mode():
        return t.detach().clone()


def floats_only(change):
    return lambda t: change(t) if t.is_floating_point() else []


def asking(t):
    return t.detach().requires_grad_()


# Each gives one tensor's replacements, those of other tensors' kinds none.
DISTURBANCES = {
    "of other dtypes": lambda t: [
        t.to(dtype)
        for dtype in (
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
            *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
        )
    ],
    "transposed": transposed,
    "of step two": dims(step_two),
    "expanded": dims(lambda t, i: t.narrow(i, 0, 1).expand(t.shape)),
    "of another offset": lambda t: [torch.cat((t[:1], t))[1:]],
    "of one dimension less": dims(lambda t, i: t.select(i, 0)),
    "of one dimension more": lambda t: [t.unsqueeze(i) for i in range(t.dim() + 1)],
    "without dimensions": lambda t: [t.flatten()[0]],
    "flat": lambda t: [t.flatten()],
    "one shorter": dims(lambda t, i: t.narrow(i, 0, t.shape[i] - 1)),
    "one longer": dims(lambda t, i: torch.cat((t, t.narrow(i, 0, 1)), i)),
    "twice as long": dims(lambda t, i: torch.cat((t, t), i)),
    "empty": dims(lambda t, i: t.narrow(i, 0, 0)),
    "of size one": dims(lambda t, i: t.narrow(i, 0, 1)),
    "of size one and odd strides": lambda t: [
        t.as_strided([1, *t.shape[1:]], [3, *t.stride()[1:]]),
        t.as_strided([*t.shape[:-1], 1], [*t.stride()[:-1], 3]),
    ],
    "frozen": lambda t: [t.detach()],
    "asking for a gradient": floats_only(lambda t: [asking(t)]),
    "an output of a node": floats_only(lambda t: [asking(t) * 1]),
    "a Parameter": floats_only(
        lambda t: [torch.nn.Parameter(t.detach(), grad) for grad in (False, True)]
    ),
    "a Buffer": lambda t: [torch.nn.Buffer(t.detach())],
    "of inference mode": lambda t: [of_inference(t)],
    "copied when written": lambda t: [torch._lazy_clone(t.detach())],
    "absent": lambda t: [None],
}

# What is not a tensor, or not plain memory: never usual, whatever it does to the call.
NEVER_USUAL = {
    "on the meta device": lambda t: [t.to("meta")],
    "a subclass": lambda t: [t.detach().as_subclass(Loud)],
    "a quiet subclass": lambda t: [t.detach().as_subclass(Quiet)],
    "sparse": lambda t: [t.detach().to_sparse()],
    "sparse by rows": lambda t: [t.detach().to_sparse_csr()] if t.dim() == 2 else [],
    "opaque": floats_only(lambda t: [t.detach().to_mkldnn()] if t.dim() else []),
    "nested": lambda t: [torch.nested.nested_tensor([t.detach()] * 2)],
    "jagged": lambda t: [torch.nested.nested_tensor([t.detach()] * 2, layout=torch.jagged)],
    "of a sign only noted": lambda t: [] if t.dtype == torch.bool else [torch._neg_view(-t)],
    "of a sign only noted, bool": lambda t: [torch._neg_view(t)] if t.dtype == torch.bool else [],
    "a functional wrapper": lambda t: [torch._to_functional_tensor(t.detach())],
    "a list": lambda t: [t.tolist()],
    "an array": lambda t: [t.detach().float().numpy()],
    "numbers": lambda t: [0, 1.0, True, "q", (), object],
    "a type": lambda t: [Tensor],
}


def seed(number):
    """torch.manual_seed, which looks for every kind of device and takes far longer than an op."""
    torch.default_generator.manual_seed(number)


def facts(value):
    """All that can be told from a result, as something that == compares."""
    if isinstance(value, (tuple, list)):
        return [facts(one) for one in value]
    if not isinstance(value, Tensor):
        return value
    kind = (type(value), value.dtype, value.device, value.shape, value.requires_grad)
    if type(value) is not Tensor or value.layout != torch.strided or value.is_meta:
        return kind  # jagged tensors' and subclasses' shapes and dtypes tell enough
    bits = value.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return (*kind, value.stride(), value.is_neg(), bits.numpy().tobytes())


def outcome(call, tensors, leaves):
    """What the call gives: outputs and gradients, or its error."""
    seed(11)
    try:
        out = call.function(*tensors)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        wanted = {id(t): t for t in (*leaves, *tensors) if isinstance(t, Tensor)}
        wanted = [t for t in wanted.values() if t.requires_grad]
        seed(12)
        grads = [torch.randn_like(o) for o in outputs]
        if outputs and wanted:
            grads = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    except Exception as error:
        return type(error), str(error)
    return facts((out, [o._is_view() for o in outputs], list(grads)))


def functional(value):
    """Without the shortcut, too, a wrapper's result is one: nothing that facts could compare."""
    return isinstance(value, Tensor) and torch._is_functional_tensor(value)


def assert_alike(monkeypatch, call, tensors, leaves, name):
    """Returns what the shortcut said."""
    said = []
    usual = getattr(call.module, call.matcher)

    def heard(*tensors):
        said.append(usual(*tensors))
        return said[-1]

    with monkeypatch.context() as patch:
        patch.setattr(call.module, call.matcher, heard)
        fast = outcome(call, tensors, leaves)
        patch.setattr(call.module, call.matcher, lambda *tensors: UNUSUAL)
        slow = outcome(call, tensors, leaves)
    assert fast == slow, name
    return said[-1] if said else UNUSUAL


def fresh(call, grad):
    """Fresh tensors by name; of the floats leaves that ask for a gradient."""
    return {
        name: t.requires_grad_(grad and t.is_floating_point()) if t is not None else None
        for name, t in call.tensors().items()
    }


def disturbed(call, change, grad):
    """(what was changed, the tensors with one changed, the leaves)."""
    seed(10)
    tensors = fresh(call, grad)
    for i, (name, tensor) in enumerate(tensors.items()):
        if tensor is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replacements = change(tensor)
        values = list(tensors.values())
        for j, replacement in enumerate(replacements):
            yield (
                f"{name}, {j}",
                [*values[:i], replacement, *values[i + 1 :]],
                [t for t in values if t is not None],
            )


@pytest.mark.parametrize("name", CALLS)
def test_the_table_is_usual(name):
    """Else the tests below would compare the slow path with itself."""
    call = CALLS[name]
    assert call.answer(*fresh(call, False).values()) == USUAL
    assert call.answer(*fresh(call, True).values()) == USUAL_GRADIENT


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_undisturbed(monkeypatch, name, grad):
    call = CALLS[name]
    tensors = list(fresh(call, grad).values())
    leaves = [t for t in tensors if t is not None]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            said = assert_alike(monkeypatch, call, tensors, leaves, mode.__name__)
        assert said == (USUAL_GRADIENT if grad else USUAL)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_under_autocast(monkeypatch, name, grad):
    """What is asked for are the tensors that autocast makes of those that were given."""
    call = CALLS[name]
    tensors = list(fresh(call, grad).values())
    leaves = [t for t in tensors if t is not None]
    with torch.autocast("cpu", torch.bfloat16):
        said = assert_alike(monkeypatch, call, tensors, leaves, "autocast")
    assert said == (USUAL_GRADIENT if grad else USUAL)


@pytest.mark.parametrize("change", DISTURBANCES)
@pytest.mark.parametrize("name", CALLS)
def test_one_tensor_is(monkeypatch, name, change):
    call = CALLS[name]
    for grad in (False, True):
        for what, tensors, leaves in disturbed(call, DISTURBANCES[change], grad):
            assert_alike(monkeypatch, call, tensors, leaves, f"{what}, {grad=}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", NEVER_USUAL)
@pytest.mark.parametrize("name", CALLS)
def test_one_tensor_is_never_usual_if(monkeypatch, name, change):
    call = CALLS[name]
    for grad in (False, True):
        for what, tensors, leaves in disturbed(call, NEVER_USUAL[change], grad):
            assert call.answer(*tensors) == UNUSUAL, what  # first: a call might end the process
            if not any(functional(t) for t in tensors):
                assert_alike(monkeypatch, call, tensors, leaves, f"{what}, {grad=}")


def all_in(dtype):
    return lambda t: t.to(dtype) if t.is_floating_point() else t


ALL = {
    **{f"in {dtype}": all_in(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
    "without elements": lambda t: t[:0],
    "with one of the first dimension": lambda t: t[:1],
    "twice as long": lambda t: torch.cat((t, t)),
    "Parameters": lambda t: torch.nn.Parameter(t.detach(), t.requires_grad),
    "on the meta device": lambda t: t.to("meta"),
    "of step two": lambda t: step_two(t, t.dim() - 1),
    "of a sign only noted": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", ALL)
@pytest.mark.parametrize("name", CALLS)
def test_all_tensors_are(monkeypatch, name, change, grad):
    call = CALLS[name]
    leaves = [t for t in fresh(call, grad).values() if t is not None]
    tensors = [t if t is None else ALL[change](t) for t in fresh(call, grad).values()]
    assert_alike(monkeypatch, call, tensors, leaves, change)


@pytest.mark.parametrize("name", CALLS)
def test_any_floats_are_of_another_dtype(monkeypatch, name):
    """Every subset of them."""
    call = CALLS[name]
    seed(10)
    tensors = list(fresh(call, False).values())
    floats = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]
    for subset in range(2 ** len(floats)):
        chosen = [i for bit, i in enumerate(floats) if subset >> bit & 1]
        changed = [t.bfloat16() if i in chosen else t for i, t in enumerate(tensors)]
        assert_alike(monkeypatch, call, changed, [], str(chosen))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
@pytest.mark.parametrize("name", CALLS)
def test_a_wrapper_that_outlived_its_transform_is_unusual(name, transform):
    call = CALLS[name]
    tensors = list(fresh(call, False).values())
    for i, tensor in enumerate(tensors):
        if tensor is not None and tensor.is_floating_point():
            kept = []
            samples = tensor[None] if transform is torch.func.vmap else tensor
            transform(lambda x, kept=kept: (kept.append(x), x.sum())[1])(samples)
            assert type(kept[0]) is Tensor
            assert call.answer(*tensors[:i], kept[0], *tensors[i + 1 :]) == UNUSUAL
