"""What the compiled matcher of `usual_call` says of tensors: the language of its patterns, and that
it leaves no trace. When nobody asks it is in test_usual_call_modes.py, that ops do the same with it
and without it in test_usual_call_alike.py."""

import ctypes
import gc
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from bertkern import _C
from bertkern.ops._registration import UNUSUAL, USUAL, USUAL_GRADIENT

EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
TYPES = (Tensor, torch.nn.Parameter)
pytestmark = pytest.mark.skipif(EXCHANGE is None, reason="this torch has no exchange interface")


def matcher(pattern):
    return _C.usual_call(pattern, EXCHANGE, TYPES, Tensor.is_neg)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


HALF, BRAIN, SINGLE, DOUBLE = FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
OTHERS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
    *(torch.uint32, torch.uint64, torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
DTYPES = (*FLOATS, *OTHERS)

# The dtypes of the second tensor that are usual when the first, of type x, has the given one.
TAKEN = {
    "x": lambda x: {x},
    "x|float32": lambda x: {x, SINGLE},
    "float": lambda x: set(FLOATS),
    "mask": lambda x: {torch.bool, x, SINGLE},
    "bool": lambda x: {torch.bool},
    "int32": lambda x: {torch.int32},
    "int64": lambda x: {torch.int64},
    "id": lambda x: {torch.int32, torch.int64},
}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("kind", TAKEN)
def test_types(kind):
    match, alone = matcher(f"x[n], {kind}[n]"), matcher(f"{kind}[n]")
    for dtype in DTYPES:
        for x in FLOATS:
            expected = USUAL if dtype in TAKEN[kind](x) else UNUSUAL
            assert match(zeros(3, dtype=x), zeros(3, dtype=dtype)) == expected, (x, dtype)
        if dtype not in FLOATS:
            assert match(zeros(3, dtype=dtype), zeros(3, dtype=dtype)) == UNUSUAL
        without_x = set(FLOATS) if kind == "x" else TAKEN[kind](SINGLE)
        assert alone(zeros(3, dtype=dtype)) == (USUAL if dtype in without_x else UNUSUAL), dtype


@pytest.mark.parametrize("kind", ["x", "x|float32", "float"])
def test_floats_have_a_last_stride_of_one(kind):
    match = matcher(f"{kind}[m n]")
    assert match(zeros(4, 6)[:, :3]) == USUAL
    assert match(zeros(1, 3).expand(4, 3)) == USUAL
    assert match(zeros(4, 2)[:, 1:]) == USUAL
    assert match(zeros(3, 4).t()[:, :1]) == USUAL  # one column of stride 4
    assert match(zeros(3, 4).t()) == UNUSUAL
    assert match(zeros(4, 6)[:, ::2]) == UNUSUAL
    assert match(zeros(4, 1).expand(4, 3)) == UNUSUAL


@pytest.mark.parametrize("kind", ["int32", "int64", "id"])
def test_ints_are_contiguous(kind):
    match = matcher(f"{kind}[m n]")
    t = zeros(4, 6, dtype=torch.int64 if kind == "int64" else torch.int32)
    assert match(t) == match(t[1:3]) == match(t[:1].view(1, 6)) == USUAL
    assert match(t[:1, :3]) == match(t[:, :1][:1]) == USUAL  # a dimension of size 1 has any stride
    for other in (t.t(), t[:, :3], t[::2], t[:, :1], t[:1].expand(4, 6), t[:, ::2]):
        assert match(other) == UNUSUAL


@pytest.mark.parametrize("kind", ["mask", "bool"])
def test_masks_have_any_strides(kind):
    match = matcher(f"{kind}[m n]")
    t = zeros(4, 6, dtype=torch.bool)
    for other in (t, t.t(), t[:, ::2], t[:1].expand(4, 6)):
        assert match(other) == USUAL


SIZES = {
    "x[]": ([], [(), (1,), (0,)]),  # a float has a last stride, and so a dimension
    "bool[]": ([()], [(1,), (0,)]),
    "x[n]": ([(3,), (1,), (0,)], [(), (3, 3)]),
    "x[n n]": ([(3, 3), (0, 0)], [(3, 2), (1, 3), (3,), (3, 3, 3)]),
    "x[n m]": ([(3, 3), (3, 2)], [(3,)]),
    "x[n+]": ([(1,), (3,)], [(0,)]),
    "x[n+ n]": ([(3, 3)], [(0, 0), (3, 2)]),
    "x[n n|1]": ([(3, 3), (3, 1), (1, 1), (0, 0), (0, 1)], [(3, 2), (1, 3), (3, 0)]),
    "x[n|1 n]": ([(3, 3), (1, 3)], [(2, 3), (0, 3)]),
    "int64[*]": ([(), (1,), (1, 1, 1)], [(0,), (2,), (1, 0), (1, 2)]),
    "int64[...]": ([(), (3,), (2, 3), (0,), (1, 2, 3, 4, 5, 6, 7)], []),
    "x[... n]": ([(3,), (2, 3), (1, 2, 3, 4, 5, 6, 7)], [()]),
    "x[... n n]": ([(3, 3), (2, 3, 3)], [(3,), (2, 3)]),
}


@pytest.mark.parametrize("pattern", SIZES)
def test_sizes(pattern):
    match = matcher(pattern)
    dtype = {"bool": torch.bool, "int64": torch.int64}.get(pattern.split("[")[0], torch.float32)
    for shapes, expected in zip(SIZES[pattern], (USUAL, UNUSUAL), strict=True):
        for shape in shapes:
            assert match(zeros(*shape, dtype=dtype)) == expected, shape


def test_a_name_is_one_size_in_all_tensors():
    match = matcher("x[a b], x[b c], x?[c a|1]")
    assert match(zeros(2, 3), zeros(3, 4), zeros(4, 2)) == USUAL
    assert match(zeros(2, 3), zeros(3, 4), zeros(4, 1)) == USUAL
    for shapes in (
        ((2, 3), (2, 4), (4, 2)),
        ((2, 3), (3, 4), (3, 2)),
        ((2, 3), (3, 4), (4, 3)),
    ):
        assert match(*(zeros(*shape) for shape in shapes)) == UNUSUAL


def test_a_call_does_not_remember_the_one_before():
    match = matcher("x[... n], x[... n], int64?[rows]")
    for shape in ((2, 3), (5, 4, 3), (7,), (2, 3)):
        x = zeros(*shape, dtype=FLOATS[len(shape)])
        rows = zeros(x[..., 0].numel(), dtype=torch.int64)
        assert match(x, x, rows) == USUAL
        assert match(x, x, None) == USUAL
        assert match(x, x[None], rows) == UNUSUAL


def test_leading_sizes_and_rows():
    match = matcher("x[... n], x?[... m], int64?[rows]")
    rows = zeros(6, dtype=torch.int64)
    assert match(zeros(2, 3, 4), zeros(2, 3, 5), rows) == USUAL
    assert match(zeros(6, 4), zeros(6, 5), rows) == USUAL
    assert match(zeros(0, 4), None, rows[:0]) == USUAL
    assert match(zeros(4), None, rows[:1]) == USUAL  # no leading dimension: one row
    for second in (zeros(3, 2, 5), zeros(6, 5), zeros(2, 3), zeros(1, 2, 3, 5), zeros(2, 3, 1, 5)):
        assert match(zeros(2, 3, 4), second, rows) == UNUSUAL
    for third in (rows[:5], zeros(7, dtype=torch.int64), rows[:1], rows.view(2, 3), rows[:0]):
        assert match(zeros(2, 3, 4), None, third) == UNUSUAL


def test_absent_tensors():
    match = matcher("x[n], x?[n], bool[n]")
    x, mask = zeros(3), zeros(3, dtype=torch.bool)
    assert match(x, None, mask) == match(x, x, mask) == USUAL
    assert match(None, x, mask) == match(x, x, None) == match(None, None, None) == UNUSUAL


def test_as_many_tensors_as_the_pattern_names():
    match = matcher("x[n], x?[n]")
    x = zeros(3)
    assert match() == match(x) == match(x, None, None) == match(*[x] * 99) == UNUSUAL
    with pytest.raises(TypeError):
        match(x, other=x)


def test_only_a_plain_tensor_is_one():
    class Loud(Tensor):
        pass

    class Quiet(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    class OwnParameter(torch.nn.Parameter):
        pass

    match, x = matcher("x[n]"), zeros(3)
    assert match(x) == match(torch.nn.Parameter(x, False)) == match(torch.nn.Buffer(x)) == USUAL
    for other in (
        *(1, 1.0, True, "x", b"x", [0.0] * 3, (0.0,) * 3, {}, object(), Tensor, Ellipsis),
        *(np.zeros(3, np.float32), x.numpy(), x.untyped_storage(), x.shape, torch.float32),
        *(x.as_subclass(Loud), x.as_subclass(Quiet), OwnParameter(x)),
        *(x.to("meta"), torch.nn.Parameter(x.to("meta")), x.to_sparse()),
        *(torch.nn.UninitializedParameter(), x.to_mkldnn()),
    ):
        assert match(other) == UNUSUAL, type(other)


def test_a_sign_only_noted_is_unusual():
    x = torch.tensor([1.0, 2.0])
    assert matcher("x[n]")(torch._neg_view(x)) == UNUSUAL
    assert matcher("mask[n]")(torch._neg_view(x)) == UNUSUAL
    assert matcher("x[n]")(torch.complex(x, x).conj().imag) == UNUSUAL


@pytest.mark.parametrize("kind", ["int32", "int64", "id", "bool", "mask"])
def test_a_sign_only_noted_of_what_is_not_a_float_is_unusual(kind):
    """`_plain` of the third layer sends it to the dispatcher, too."""
    dtype = {"int64": torch.int64, "bool": torch.bool, "mask": torch.bool}.get(kind, torch.int32)
    assert matcher(f"{kind}[n]")(torch._neg_view(torch.ones(2, dtype=dtype))) == UNUSUAL


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch._efficientzerotensor((2, 3)),
        lambda: torch._to_functional_tensor(torch.ones(2, 3)),
    ],
    ids=["zero tensor", "functional wrapper"],
)
def test_elements_without_memory_are_unusual(make):
    """Their address is 0."""
    assert matcher("x[m n]")(make()) == UNUSUAL


def test_a_gradient_asked_for():
    match = matcher("x[n], x?[n], int64?[n]")
    x, asks, ints = zeros(3), zeros(3).requires_grad_(), zeros(3, dtype=torch.int64)
    assert match(x, x, ints) == USUAL
    assert match(asks, x, ints) == match(x, asks, None) == match(asks, None, None) == USUAL_GRADIENT
    assert match(x, asks * 2, ints) == match(torch.nn.Parameter(x), None, ints) == USUAL_GRADIENT
    assert match(x, asks.detach(), None) == USUAL
    assert match(asks, zeros(2), None) == UNUSUAL
    with torch.no_grad():  # what a tensor says, not whether anybody listens
        assert match(asks, None, None) == USUAL_GRADIENT
        assert match(asks * 2, None, None) == USUAL


@pytest.mark.parametrize(
    "pattern",
    [
        *("x", "x[", "x]", "x[n", "[n]", "?[n]", " [n]", "x[n],,x[n]", "x[n], ", ",x[n]"),
        *("y[n]", "float16[n]", "X[n]", "x ?[n]", "x??[n]", "x]n[", "int[n]", "int8[n]", "||[n]"),
    ],
)
def test_wrong_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern: "):
        matcher(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["x[n] y[m]", "x[n]rest", "x[n ...]", "x[... ...]", "x[* n]", "x[... *]", "x[+]", "x[|1]"],
)
def test_patterns_that_would_be_misread_are_refused(pattern):
    """A comma forgotten, a size that nobody would look at."""
    with pytest.raises(ValueError, match="pattern: "):
        matcher(pattern)


KEPT = []  # a capsule does not own what it points to


def capsule(name, major, describe):
    """An exchange interface of our own."""
    table = (ctypes.c_uint64 * 8)(major, 0, 0, 0, 0, describe, 0, 0)
    KEPT.append((table, name))
    ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
    ctypes.pythonapi.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return ctypes.pythonapi.PyCapsule_New(table, name, None)


def test_other_exchange_interfaces():
    wrong = capsule(b"another", 1, 1)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        _C.usual_call("x[n]", wrong, TYPES, Tensor.is_neg)
    for major, describe in ((2, 1), (0, 1), (1, 0)):
        other = capsule(b"dlpack_exchange_api", major, describe)
        assert _C.usual_call("x[n]", other, TYPES, Tensor.is_neg) is None
    with pytest.raises(TypeError):
        _C.usual_call("x[n]", None, TYPES, Tensor.is_neg)


class Description(ctypes.Structure):
    """dlpack::Tensor of csrc/dlpack.h, here of a vector."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("dims", ctypes.c_int32),
        ("code_and_bits", ctypes.c_uint8 * 2),
        ("lanes", ctypes.c_uint16),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Described:
    """A float32 vector of one element, wherever and whatever it says."""

    requires_grad = is_meta = False

    def __init__(self, device=(1, 0), lanes=1, data=64, failed=0):
        self.one = ctypes.c_int64(1)
        at = ctypes.pointer(self.one)
        self.description = Description(data, device, 1, (2, 32), lanes, at, at, 0)
        self.failed = failed


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Description))
def describe(described, out):
    out[0] = described.description
    return described.failed


def described_matcher(pattern):
    exchange = capsule(b"dlpack_exchange_api", 1, ctypes.cast(describe, ctypes.c_void_p).value)
    return _C.usual_call(pattern, exchange, (Described, Forgetful), lambda described: False)


class Forgetful(Described):
    @property
    def requires_grad(self):
        raise RuntimeError("not to be seen")


def test_who_cannot_say_whether_a_gradient_is_asked_for_is_unusual():
    """Not "no gradient": it would be lost."""
    match = described_matcher("x[n]")
    assert match(Described()) == USUAL
    assert match(Forgetful()) == UNUSUAL


def test_all_are_on_one_device():
    match = described_matcher("x[n], x?[n], float?[n]")
    cpu, first, second, managed = ((1, 0), (2, 0), (2, 1), (13, 0))
    for device in (cpu, first, second, managed):
        for other in (cpu, first, second, managed):
            expected = USUAL if other == device else UNUSUAL
            assert match(Described(device), Described(other), None) == expected
            assert match(Described(device), Described(device), Described(other)) == expected
            assert match(Described(device), None, Described(other)) == expected
    assert match(Described(lanes=2), None, None) == UNUSUAL
    assert match(Described(failed=-1), None, None) == UNUSUAL
    assert match(zeros(1), None, None) == UNUSUAL


def test_errors_of_what_it_asks_are_unusual_and_forgotten():
    def fails(tensor):
        raise RuntimeError("not to be seen")

    match = _C.usual_call("x[n]", EXCHANGE, TYPES, fails)
    assert match(zeros(3)) == UNUSUAL
    for other in (lambda tensor: True, lambda tensor: None, lambda tensor: 0):
        assert _C.usual_call("x[n]", EXCHANGE, TYPES, other)(zeros(3)) == UNUSUAL
    try:
        raise KeyError("handled")
    except KeyError:
        assert match(zeros(3)) == match(zeros(3).to("meta")) == UNUSUAL
        assert isinstance(sys.exc_info()[1], KeyError)


def test_no_reference_is_lost_or_kept():
    match = matcher("x[... n], float?[n], int64?[rows]")
    x, weight, rows = zeros(2, 3, 4), torch.nn.Parameter(zeros(4)), zeros(6, dtype=torch.int64)
    calls = [
        ((x, weight, rows), USUAL_GRADIENT),
        ((x, None, rows), USUAL),
        ((x, weight, rows[:5]), UNUSUAL),
        ((x.to("meta"), weight, rows), UNUSUAL),
        ((x.to_sparse(), weight, rows), UNUSUAL),
        ((torch._neg_view(x), weight, rows), UNUSUAL),
        ((x, "weight", rows), UNUSUAL),
        ((x, weight), UNUSUAL),
    ]
    counted = [*{id(t): t for tensors, _ in calls for t in tensors}.values()]
    counted += [match, TYPES, *TYPES, Tensor.is_neg, EXCHANGE, None, False, True]
    gc.collect()
    before = [sys.getrefcount(t) for t in counted]
    blocks = sys.getallocatedblocks()
    for _ in range(200):
        for tensors, expected in calls:
            assert match(*tensors) == expected
    after = [sys.getrefcount(t) for t in counted]
    for counts in zip(counted, after, before, strict=True):
        # The types and constants are everybody's.
        assert abs(counts[1] - counts[2]) < (1 if isinstance(counts[0], Tensor) else 100), counts
    assert sys.getallocatedblocks() - blocks < 150


def test_the_function_outlives_its_maker_and_frees_what_it_held():
    types, is_neg = (Tensor, str), lambda tensor: False
    gc.collect()
    before = [sys.getrefcount(held) for held in (types, is_neg, EXCHANGE)]
    functions = [_C.usual_call("".join(["x", "[n]"]), EXCHANGE, types, is_neg) for _ in range(100)]
    gc.collect()
    assert all(match(zeros(3)) == USUAL for match in functions)
    for bad in ("x[n], y[n]", "x"):
        with pytest.raises(ValueError, match="pattern"):
            _C.usual_call(bad, EXCHANGE, types, is_neg)
    own = _C.usual_call("x[n]", EXCHANGE, tuple([Tensor]), lambda tensor: False)
    gc.collect()
    assert own(zeros(3)) == USUAL
    del functions, own
    gc.collect()
    after = [sys.getrefcount(held) for held in (types, is_neg, EXCHANGE)]
    assert all(abs(a - b) <= 1 for a, b in zip(after, before, strict=True))
