"""When nothing is usual whatever the tensors are: under modes, transforms, compilers and profilers
that want to see the op, and where the compiled matcher cannot be had."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from usual_calls import CALLS

import bertkern
from bertkern.ops import _registration
from bertkern.ops._registration import UNUSUAL, USUAL, USUAL_GRADIENT

pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no exchange interface"
)


class SeenByFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeenByDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


# Contexts in which nothing is usual.
MODES = {
    "a function mode": SeenByFunctions,
    "a default device": lambda: torch.device("cpu"),
    "a dispatch mode": SeenByDispatch,
    "fake tensors": lambda: torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
    "forward mode": forward_ad.dual_level,
    "the old profiler": torch.autograd.profiler.profile,
    "the profiler": lambda: torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ),
}


def tensors_of(call, grad=False):
    return [
        t.requires_grad_(grad and t.is_floating_point()) if t is not None else None
        for t in call.tensors().values()
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_usual_under(name, mode):
    call = CALLS[name]
    for grad, expected in ((False, USUAL), (True, USUAL_GRADIENT)):
        tensors = tensors_of(call, grad)
        assert call.answer(*tensors) == expected
        with MODES[mode]():
            assert call.answer(*tensors) == UNUSUAL
        assert call.answer(*tensors) == expected


TRANSFORMS = {
    "grad": lambda see, x: torch.func.grad(lambda x: see(x).sum())(x),
    "vjp": lambda see, x: torch.func.vjp(see, x),
    "jvp": lambda see, x: torch.func.jvp(see, (x,), (x,)),
    "vmap": lambda see, x: torch.func.vmap(see)(torch.stack((x, x))),
    "functionalize": lambda see, x: torch.func.functionalize(see)(x),
    "trace": lambda see, x: torch.jit.trace(see, (x,), check_trace=False),
    "make_fx": lambda see, x: make_fx(see)(x),
    "make_fx of fake tensors": lambda see, x: make_fx(see, tracing_mode="fake")(x),
    "make_fx of symbols": lambda see, x: make_fx(see, tracing_mode="symbolic")(x),
    "make_fx before dispatch": lambda see, x: make_fx(see, pre_dispatch=True)(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_usual_in(name, transform):
    """Neither the transform's own tensor nor those that it does not know."""
    call = CALLS[name]
    tensors = tensors_of(call)
    said = []
    at = next(i for i, t in enumerate(tensors) if t is not None and t.is_floating_point())

    def see(x):
        said.append(call.answer(*tensors[:at], x, *tensors[at + 1 :]))
        said.append(call.answer(*tensors))
        return x * 1

    TRANSFORMS[transform](see, tensors[at])
    assert said
    assert set(said) == {UNUSUAL}
    assert call.answer(*tensors) == USUAL


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_usual_while_dynamo_traces(name):
    call = CALLS[name]
    tensors = tensors_of(call)
    torch._dynamo.reset()

    answer = getattr(call.module, call.matcher)

    def traced(*tensors):
        return torch.zeros(()) + answer(*tensors)

    assert traced(*tensors) == USUAL
    assert torch.compile(traced, fullgraph=True, backend="eager")(*tensors) == UNUSUAL
    compiled = torch.compile(call.function, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    expected = call.function(*tensors)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(*tensors), expected, rtol=0, atol=0)


def without_extension(patch):
    patch.setattr(_registration, "native", lambda: (None, "why"))


def without_exchange(patch):
    patch.delattr(Tensor, "__dlpack_c_exchange_api__")


def with_an_exchange_that_is_not_known(patch):
    class Extension:
        @staticmethod
        def usual_call(*arguments):
            return None

    patch.setattr(_registration, "native", lambda: (Extension, None))


@pytest.mark.parametrize(
    "change", [without_extension, without_exchange, with_an_exchange_that_is_not_known]
)
def test_without_what_it_needs_nothing_is_usual(monkeypatch, change):
    x, weight = torch.randn(2, 3, 4), torch.randn(4)
    expected = bertkern.layer_norm(x, weight)
    usual = _registration.usual_call("x[... n], float?[n], float?[n]")
    assert usual(x, weight, None) == USUAL
    change(monkeypatch)
    usual = _registration.usual_call("x[... n], float?[n], float?[n]")
    assert usual(x, weight, None) == usual(x, weight, None) == UNUSUAL
    assert usual(x) == usual(None, None, None) == UNUSUAL
    monkeypatch.setattr(CALLS["layer_norm"].module, "_usual", usual)
    assert torch.equal(bertkern.layer_norm(x, weight), expected)
    with pytest.raises(ValueError, match="layer_norm: weight has shape"):
        bertkern.layer_norm(x, weight[:3])


def test_a_wrong_pattern_shows_at_the_first_call():
    usual = _registration.usual_call("z[n]")
    with pytest.raises(ValueError, match="pattern: "):
        usual(torch.zeros(3))
