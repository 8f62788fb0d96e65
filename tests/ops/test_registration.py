"""What torch asks of an op: opcheck, compile, autocast, checkpointing, streams of random
numbers."""

import pytest
import torch
from public_ops import OPS
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bertkern
from bertkern.ops import _registration

SEED = torch.tensor([7])
CU = torch.tensor([0, 3, 8], dtype=torch.int32)
IDS = torch.tensor([0, 3, 3, 1, 4])


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def attention_options(causal, p, window=-1, softcap=0.0, heads_first=False):
    return (SEED if p else None, 5, 6, causal, window, window, softcap, p, 0.5, 0, heads_first)


CALLS = {
    "attention_fwd": lambda: (
        *(leaf(2, 5, 2, 8), leaf(2, 6, 2, 8), leaf(2, 6, 2, 8), None, None, None, None, None),
        *attention_options(1, 0.2),
    ),
    "attention_fwd heads first": lambda: (
        *(leaf(2, 4, 5, 8), leaf(2, 2, 6, 8), leaf(2, 2, 6, 8), leaf(1, 4, 5, 6)),
        *(None, None, None, None),
        *attention_options(2, 0.2, heads_first=True),
    ),
    "attention_fwd grouped heads and bias": lambda: (
        *(leaf(2, 5, 4, 8), leaf(2, 6, 2, 8), leaf(2, 6, 2, 8), leaf(1, 4, 5, 6)),
        *(torch.ones(2, 6, dtype=torch.bool), None, None, torch.tensor([3, 6]).int()),
        *attention_options(0, 0.0, window=2, softcap=3.0),
    ),
    "attention_fwd varlen": lambda: (
        *(leaf(8, 2, 8) for _ in range(3)),
        *(None, None, CU, CU, None, None, 5, 5, 0, -1, -1, 0.0, 0.0, 0.5, 0, False),
    ),
    "attention_bwd": lambda: (
        *(torch.randn(2, n, 2, 8) for n in (5, 5, 6, 6, 5)),
        *(torch.randn(2, 2, 5), None, torch.randn(2, 1, 5, 6), None, None, None, None),
        *(*attention_options(0, 0.2), True),
    ),
    "attention_bwd heads first": lambda: (
        *(torch.randn(2, 2, n, 8) for n in (5, 5, 6, 6, 5)),
        *(torch.randn(2, 2, 5), torch.randn(2, 2, 5), None, None, None, None, None),
        *(*attention_options(1, 0.0, heads_first=True), False),
    ),
    "attention_decode": lambda: (
        *(leaf(2, 2, 8), leaf(2, 6, 2, 8), leaf(2, 6, 2, 8), torch.tensor([3, 6]).int()),
        *(None, -1, 0.0, 0.5),
    ),
    "attention_decode grouped heads and options": lambda: (
        *(leaf(2, 4, 8), leaf(2, 6, 2, 8), leaf(2, 6, 2, 8), torch.tensor([0, 6]).int()),
        *(leaf(1, 4, 1, 6), 3, 2.0, 0.5),
    ),
    "layer_norm_fwd": lambda: (leaf(3, 8), leaf(8), leaf(8), 1e-5),
    "layer_norm_bwd": lambda: (
        *(torch.randn(3, 8), torch.randn(3, 8), torch.ones(8), None),
        *(torch.zeros(3), torch.ones(3)),
    ),
    "dropout_add_layer_norm_fwd": lambda: (
        *(leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), 0.2, 1e-12, SEED, None),
    ),
    "dropout_add_layer_norm_bwd": lambda: (
        *(torch.randn(3, 8), None, torch.randn(3, 8), torch.ones(8), torch.ones(8)),
        *(torch.zeros(3), torch.ones(3), 0.2, SEED, None),
    ),
    "dropout": lambda: (leaf(3, 8), 0.2, SEED, None),
    "linear_fwd": lambda: (
        *(leaf(3, 8), leaf(4, 8), leaf(4), leaf(3, 4), "gelu", 0.2, SEED, None, True),
    ),
    "linear_bwd": lambda: (
        *(torch.randn(3, 4), torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)),
        *(torch.randn(3, 4), "gelu", 0.2, SEED, None),
    ),
    "linear_cross_entropy_fwd": lambda: (
        *(leaf(3, 8), leaf(5, 8), leaf(5), torch.tensor([4, -100, 0]), -100, 0.1),
    ),
    "linear_cross_entropy_bwd": lambda: (
        *(torch.randn(3), torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)),
        *(torch.tensor([4, -100, 0]), torch.zeros(3), torch.ones(3), -100, 0.1),
    ),
    "ffn_fwd": lambda: (
        *(leaf(3, 8), leaf(4, 8), leaf(4), leaf(8, 4), None, "gelu", 0.2, SEED, None, True),
    ),
    "ffn_fwd without its pre-activation": lambda: (
        *(leaf(3, 8), leaf(4, 8), leaf(4), leaf(8, 4), None, "gelu", 0.2, SEED, None, False),
    ),
    "embedding_layer_norm_fwd": lambda: (
        *(IDS, IDS, None, leaf(5, 8), leaf(5, 8), leaf(2, 8), leaf(8), leaf(8)),
        *(0, 1e-12, 0.2, SEED, None),
    ),
    "embedding_layer_norm_bwd": lambda: (
        *(torch.randn(5, 8), IDS, IDS, IDS % 2, torch.randn(5, 8), torch.randn(5, 8)),
        *(torch.randn(2, 8), torch.randn(8), None, torch.zeros(5), torch.ones(5), -1),
        *(0.2, SEED, None),
    ),
    "ffn_bwd": lambda: (
        *(torch.randn(3, 8), torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)),
        *(torch.randn(8, 4), None, torch.randn(3, 4), "gelu", 0.2, SEED, None),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    torch.manual_seed(0)
    op = getattr(torch.ops.bertkern, call.split()[0]).default
    opcheck(op, CALLS[call](), raise_exception=True)


def encoder_layer(x, w_qkv, w1, b1, w2, b2, gamma, beta):
    q, k, v = bertkern.linear(x, w_qkv).view(*x.shape[:2], 3, 2, -1).unbind(2)
    out = bertkern.attention(q, k, v, dropout_p=0.1).flatten(2)
    x = bertkern.dropout_add_layer_norm(out, x, gamma, beta, 0.1)
    return bertkern.layer_norm(x + bertkern.ffn(x, w1, b1, w2, b2), gamma, beta)


def layer_arguments(batch, length):
    torch.manual_seed(1)
    x = leaf(batch, length, 16)
    parameters = leaf(48, 16), leaf(32, 16), leaf(32), leaf(16, 32), leaf(16), leaf(16), leaf(16)
    return x, parameters


def test_compile_fullgraph_with_dynamic_shapes():
    compiled = torch.compile(encoder_layer, fullgraph=True, dynamic=True)
    for batch, length in ((2, 7), (3, 12)):
        x, parameters = layer_arguments(batch, length)
        out = compiled(x, *parameters)
        grads = torch.autograd.grad(out.sum(), (x, *parameters))
        assert out.shape == x.shape
        assert all(g.isfinite().all() for g in grads)


def test_compiled_equals_eager_without_dropout():
    def layer(x, w1, b1, w2, b2, gamma, beta):
        y = bertkern.ffn(x, w1, b1, w2, b2)
        return bertkern.dropout_add_layer_norm(y, x, gamma, beta)

    x, (_, *parameters) = layer_arguments(2, 9)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (layer, compiled):
        out = function(x, *parameters)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *parameters))))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, atol=1e-5, rtol=1e-5)


def results(function, inputs):
    """Output and gradients, of a loss in which every output element counts differently."""
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return (out, *torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize("name", OPS)
def test_each_op_compiles_whole_with_dynamic_shapes(name):
    torch.manual_seed(2)
    public = OPS[name]
    compiled = torch.compile(public.function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (7, 11) if public.batched else (None,):
            inputs = public.inputs(n)
            for eager, other in zip(
                results(public.function, inputs), results(compiled, inputs), strict=True
            ):
                torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("name", OPS)
def test_each_op_is_exported(name):
    """The program holds the op itself, with a dynamic first dimension where there is one."""
    torch.manual_seed(3)
    public = OPS[name]

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return public.function(*inputs)

    sizes = (7, 11) if public.batched else (None, None)
    dynamic = tuple(
        {0: torch.export.Dim("n", min=2)} if i < public.batched else None
        for i in range(len(public.shapes))
    )
    program = torch.export.export(
        Module(), tuple(public.inputs(sizes[0])), dynamic_shapes=(dynamic,)
    )
    assert any("bertkern" in str(node.target) for node in program.graph.nodes)
    for n in sizes:
        inputs = public.inputs(n)
        torch.testing.assert_close(program.module()(*inputs), public.function(*inputs))


class Seen(TorchDispatchMode):
    """Collects the names of this package's ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bertkern":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_ops():
    """Selective checkpointing, counters of FLOPs and profilers see an op whichever way it is
    called."""
    x, weight = leaf(3, 8), leaf(8)
    with Seen() as seen:
        out = bertkern.layer_norm(x, weight)
        with torch.no_grad():
            bertkern.layer_norm(x, weight)
        torch.autograd.grad(out.square().sum(), (x, weight))
    assert seen.names == ["layer_norm_fwd", "layer_norm_fwd", "layer_norm_bwd"]


def test_function_modes_see_the_ops():
    called = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Calls():
        bertkern.layer_norm(leaf(3, 8))
    assert "layer_norm_fwd.default" in called


def test_the_profiler_names_the_ops():
    x, weight = leaf(3, 8), leaf(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bertkern.layer_norm(x, weight).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"bertkern::layer_norm_fwd", "bertkern::layer_norm_bwd"} <= names


def test_subclasses_stay_subclasses():
    class Named(torch.Tensor):
        pass

    x = torch.randn(3, 8)
    y = bertkern.layer_norm(x.as_subclass(Named))
    assert type(y) is Named
    assert torch.equal(y.as_subclass(torch.Tensor), bertkern.layer_norm(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_computes_with_the_inputs_of_its_call():
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    traced = torch.jit.trace(lambda x: bertkern.layer_norm(x), (x,))
    assert torch.equal(traced(other), bertkern.layer_norm(other))


@pytest.mark.parametrize("name", OPS)
def test_signs_that_are_only_noted_count(name):
    """The imaginary part of a conjugate is the memory of the number's own with a note: negate."""
    torch.manual_seed(5)
    op = OPS[name]
    inputs = [x.detach() for x in op.inputs()]
    noted = [torch.complex(x, -x).conj().imag for x in inputs]
    assert all(x.is_neg() for x in noted)
    assert torch.equal(op.function(*noted), op.function(*inputs))


def test_a_pullback_serves_after_its_transform_has_ended():
    """What it saved is wrapped, and only the dispatcher unwraps it."""
    x, weight = torch.randn(3, 8), torch.randn(8)
    pullback = torch.func.vjp(bertkern.layer_norm, x, weight)[1]
    own = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(bertkern.layer_norm(*own), own, torch.ones(3, 8))
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            for one, other in zip(pullback(torch.ones(3, 8)), expected, strict=True):
                assert torch.equal(one, other)


def test_the_callable_and_the_op_are_one():
    """The callable of `define` takes a short cut past the dispatcher."""
    torch.manual_seed(4)
    inputs = leaf(3, 8), leaf(8), leaf(8)

    def through_dispatcher(x, weight, bias):
        return torch.ops.bertkern.layer_norm_fwd(x, weight, bias, 1e-5)[0]

    for one, other in zip(
        results(bertkern.layer_norm, inputs), results(through_dispatcher, inputs), strict=True
    ):
        assert torch.equal(one, other)


def test_an_op_without_backward_refuses_gradients():
    op = _registration.define(
        "no_gradient_here(Tensor x) -> Tensor", torch.clone, lambda x: torch.empty_like(x)
    )
    x = leaf(3)
    assert torch.equal(op(x.detach()), x)
    with pytest.raises(NotImplementedError, match=r"no_gradient_here.* has no gradient"):
        op(x).sum().backward()


@pytest.mark.parametrize(
    "schema", ["f(Tensor x, int n=1)", "f(Tensor x, *, int n)", "f(Tensor[] x)"]
)
def test_schemas_that_autograd_would_misread_are_refused(schema):
    with pytest.raises(ValueError, match="no defaults, no keyword-only arguments, no lists"):
        _registration.define(f"{schema} -> Tensor", torch.clone, torch.clone)


def test_arguments_with_gradients_stand_together():
    with pytest.raises(ValueError, match="x, y must stand next to each other"):
        _registration.define(
            "apart(Tensor x, Tensor n, Tensor y) -> Tensor",
            torch.clone,
            torch.clone,
            differentiable=("x", "y"),
        )
    assert not hasattr(torch.ops.bertkern, "apart")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replays_with_fresh_dropout():
    x, parameters = layer_arguments(2, 9)
    x, *parameters = (t.detach().cuda().requires_grad_() for t in (x, *parameters))

    def step():
        out = encoder_layer(x, *parameters)
        return (out, *torch.autograd.grad(out.square().sum(), (x, *parameters)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([t.clone() for t in captured])
    assert all(t.isfinite().all() for replay in replays for t in replay)
    assert not torch.equal(replays[0][0], replays[1][0])


def test_checkpoint_recomputes_the_same_dropout():
    x, parameters = layer_arguments(2, 9)
    results = []
    for run in (
        lambda: encoder_layer(x, *parameters),
        lambda: checkpoint(encoder_layer, x, *parameters, use_reentrant=False),
    ):
        torch.manual_seed(3)
        out = run()
        results.append((out, *torch.autograd.grad(out.sum(), (x, *parameters))))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_autocast(name, compiled):
    """Products come in autocast's dtype, LayerNorm and the loss in that of x, gradients in the
    parameters' dtype."""
    torch.manual_seed(5)
    public = OPS[name]
    torch._dynamo.reset()  # every parameter of this test compiles the same function

    def cast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return public.function(*inputs)

    function = torch.compile(cast, fullgraph=True, backend="aot_eager") if compiled else cast
    inputs = public.inputs()
    out, *grads = results(function, inputs)
    kept = name in ("layer_norm", "dropout", "embedding_layer_norm", "linear_cross_entropy")
    assert out.dtype == (torch.float32 if kept else torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in grads)
    torch.testing.assert_close(out.float(), public.function(*inputs), atol=0.1, rtol=0.1)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 5, 3, 8, device="meta")
    out, lse = bertkern.attention(q, q, q, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 3, 5)


def test_frozen_inputs_get_no_gradient():
    x, w = torch.randn(3, 8), leaf(4, 8)
    (grad,) = torch.autograd.grad(bertkern.linear(x, w).sum(), (w,))
    assert grad.shape == w.shape
    assert x.grad is None
