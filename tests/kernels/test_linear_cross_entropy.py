"""linear_cross_entropy's Triton kernels against the formula in fp64. Here a tile is 32 rows by 16
classes, a split 64 classes and a chunk of the backward 32 to 128."""

import math

import pytest
import torch
from bertkern.kernels.linear_cross_entropy import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bertkern.reference.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

fp32, fp16 = torch.float32, torch.float16
IGNORED = -100


def random_inputs(device, dtype, rows, columns, classes, bias=fp32):
    torch.manual_seed(rows + columns + classes)
    x = torch.randn(rows, columns).to(device, dtype)
    w = (torch.randn(classes, columns) * max(columns, 1) ** -0.5).to(device, dtype)
    b = None if bias is None else torch.randn(classes).to(device, bias)
    target = torch.randint(classes, (rows,), device=device)
    dloss = torch.randn(rows, device=device)
    return x, w, b, target, dloss


def formula(x, w, b, target, dloss, ignore_index, smoothing, dtype):
    """[loss, dx, dw, db] in torch's ops, the logits in `dtype` and the loss in float32 or more."""
    inputs = [None if t is None else t.cpu().to(dtype).requires_grad_() for t in (x, w, b)]
    logits = F.linear(*inputs)
    logits = logits if dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(
        logits,
        target.cpu(),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction="none",
    )
    present = [t for t in inputs if t is not None]
    return [loss, *torch.autograd.grad(loss, present, dloss.cpu().to(loss.dtype))]


def kernels(x, w, b, target, dloss, ignore_index, smoothing):
    """[loss, dx, dw, db] of the kernels; no db without b."""
    loss, m, s = linear_cross_entropy_fwd(x, w, b, target, ignore_index, smoothing)
    dx, dw, db = linear_cross_entropy_bwd(dloss, x, w, b, target, m, s, ignore_index, smoothing)
    assert loss.dtype == fp32
    assert [dx.dtype, dw.dtype] == [x.dtype, w.dtype]
    assert (db is None) == (b is None)
    return [loss, dx, dw] if db is None else [loss, dx, dw, db]


def hold_to_rule(got, call):
    exact, plain = formula(*call, torch.float64), formula(*call, call[0].dtype)
    for name, out, ref64, same in zip(["loss", "dx", "dw", "db"], got, exact, plain, strict=False):
        rows = (t.detach().cpu().reshape(t.shape[0], -1) for t in (out, ref64, same))
        assert_close(*rows, grad=name != "loss", name=name)


# (T, K, V): one element; all below a tile; one past a tile, a split and a chunk; tails everywhere;
# whole tiles, splits and chunks (K = 64: no masks).
@pytest.mark.parametrize(
    ("shape", "dtype", "smoothing", "bias"),
    [
        ((1, 1, 1), fp32, 0.2, fp32),
        ((5, 7, 9), fp32, 0.0, fp32),
        ((33, 33, 129), fp32, 0.1, None),
        ((37, 20, 150), fp16, 0.1, fp16),
        ((70, 50, 131), fp32, 0.3, fp32),
        ((64, 64, 128), fp16, 0.0, fp32),
        ((40, 64, 70), fp16, 1.0, None),
    ],
    ids=str,
)
def test_loss_and_gradients(device, shape, dtype, smoothing, bias):
    x, w, b, target, dloss = random_inputs(device, dtype, *shape, bias)
    target[1::3] = IGNORED
    call = (x, w, b, target, dloss, IGNORED, smoothing)
    hold_to_rule(kernels(*call), call)


def test_a_class_may_be_the_ignored_one(device):
    x, w, b, target, dloss = random_inputs(device, fp32, 20, 9, 40)
    target[::2] = 7
    call = (x, w, b, target, dloss, 7, 0.1)
    got = kernels(*call)
    assert (got[0][::2] == 0).all()
    hold_to_rule(got, call)


def test_large_logits(device):
    """exp(z) is beyond fp32, of both signs, and the largest comes last."""
    x, w, b, target, dloss = random_inputs(device, fp32, 20, 9, 140)
    w *= 300
    b += torch.arange(140, device=device) * 3.0
    call = (x, w, b, target, dloss, IGNORED, 0.0)
    hold_to_rule(kernels(*call), call)


def test_classes_ruled_out_by_a_bias_of_minus_infinity(device):
    """All of the first split and parts of the others."""
    x, w, b, target, dloss = random_inputs(device, fp32, 20, 9, 140)
    b[:64] = b[100:140:2] = -math.inf
    target[:] = torch.randint(64, 100, (20,), device=device)
    call = (x, w, b, target, dloss, IGNORED, 0.0)
    got = kernels(*call)
    hold_to_rule(got, call)
    assert (got[2][:64] == 0).all()


def test_ignored_rows_leave_nothing_whatever_stands_there(device):
    """Single rows, and a whole block of rows that no program computes."""
    x, w, b, target, dloss = random_inputs(device, fp32, 70, 20, 90)
    ignored = torch.zeros(70, dtype=torch.bool, device=device)
    ignored[[0, 5, 69]] = ignored[32:64] = True
    target[ignored], x[ignored], dloss[ignored] = IGNORED, 0.0, 1.0
    clean = kernels(x, w, b, target, dloss, IGNORED, 0.1)
    x[ignored], dloss[ignored] = math.nan, math.inf
    x[5] = math.inf
    got = kernels(x, w, b, target, dloss, IGNORED, 0.1)
    assert (got[0][ignored] == 0).all()
    assert (got[1][ignored] == 0).all()
    assert all(map(torch.equal, got, clean))


def test_all_rows_ignored(device):
    x, w, b, target, dloss = random_inputs(device, fp32, 40, 20, 90)
    got = kernels(x * math.nan, w, b, torch.full_like(target, IGNORED), dloss, IGNORED, 0.1)
    assert all((t == 0).all() for t in got)


@pytest.mark.parametrize("wrong", [-1, 90, 95, 2**32 + 3, -(2**63)])
def test_a_target_that_is_no_class_gives_nan_in_its_row_and_in_dw(device, wrong):
    x, w, b, target, dloss = random_inputs(device, fp32, 20, 20, 90)
    call = (w, b, target, dloss, IGNORED, 0.0)
    right = kernels(x, *call)
    target[7] = wrong
    loss, dx, dw, db = kernels(x, *call)
    others = torch.arange(20, device=device) != 7
    assert loss[7].isnan()
    assert dx[7].isnan().all()
    assert dw.isnan().all()
    assert db.isnan().all()
    assert torch.equal(loss[others], right[0][others])
    assert torch.equal(dx[others], right[1][others])


def test_nan_stays_in_its_row(device):
    x, w, b, target, dloss = random_inputs(device, fp32, 20, 20, 90)
    x[3, 2] = math.nan
    loss, dx, _, _ = kernels(x, w, b, target, dloss, IGNORED, 0.1)
    others = torch.arange(20, device=device) != 3
    assert loss[3].isnan()
    assert dx[3].isnan().all()
    assert loss[others].isfinite().all()
    assert dx[others].isfinite().all()


def test_strides_and_poisoned_neighbours(device):
    """Operands inside wider tensors whose other elements are NaN (of the target: no class)."""
    x, w, b, target, dloss = random_inputs(device, fp32, 37, 33, 90)
    call = (IGNORED, 0.1)
    wanted = kernels(x, w, b, target, dloss, *call)

    def inside(t):
        wide = torch.full([2 * size + 3 for size in t.shape], -9, device=device).to(t.dtype)
        if t.is_floating_point():
            wide.fill_(math.nan)
        place = (slice(0, 2 * t.shape[0], 2), *(slice(0, size) for size in t.shape[1:]))
        wide[place] = t
        return wide[place]

    got = kernels(*(inside(t) for t in (x, w, b, target, dloss)), *call)
    assert all(map(torch.equal, got, wanted))


def test_expanded_gradient(device):
    x, w, b, target, _ = random_inputs(device, fp32, 20, 9, 40)
    one = torch.full((1,), 0.25, device=device).expand(20)
    call = (x, w, b, target, one, IGNORED, 0.0)
    assert all(map(torch.equal, kernels(*call), kernels(*call[:4], one.contiguous(), *call[5:])))


def test_batch_invariance_and_determinism(device):
    """The backward's chunk is 32 classes for 70 rows and 128 for 6: no row feels it."""
    x, w, b, target, dloss = random_inputs(device, fp32, 70, 40, 150)
    together = kernels(x, w, b, target, dloss, IGNORED, 0.1)
    assert all(map(torch.equal, together, kernels(x, w, b, target, dloss, IGNORED, 0.1)))
    # From a tile's first row on: in the interpreter's matrix product (numpy) a row's bits depend on
    # its place in the tile. On a GPU they do not.
    part = slice(32, 38)
    alone = kernels(x[part], w, b, target[part], dloss[part], IGNORED, 0.1)
    assert torch.equal(alone[0], together[0][part])
    assert torch.equal(alone[1], together[1][part])


@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7)])
def test_empty_sizes(device, sizes):
    rows, columns, _ = sizes
    x, w, b, target, dloss = random_inputs(device, fp32, *sizes)
    loss, dx, dw, db = kernels(x, w, b, target, dloss, IGNORED, 0.0)
    assert [t.shape for t in (loss, dx, dw, db)] == [(rows,), x.shape, w.shape, b.shape]
    if columns == 0:
        torch.testing.assert_close(loss, torch.logsumexp(b, 0) - b[target])
        expected = dloss.sum() * torch.softmax(b, 0) - torch.zeros(7, device=device).index_add(
            0, target, dloss
        )
        torch.testing.assert_close(db, expected)
    else:
        assert (dw == 0).all()
        assert (db == 0).all()


class Recorded(TorchDispatchMode):
    """Names of the torch ops that ran, and the elements of the largest tensor that they made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


def test_the_logits_are_never_held_and_nothing_waits_for_the_device(device):
    x, w, b, target, dloss = random_inputs(device, fp32, 70, 4, 300)
    with Recorded() as recorded:
        kernels(x, w, b, target, dloss, IGNORED, 0.1)
    assert 0 < recorded.largest <= 70 * 128 < 70 * 300 / 2
    assert not recorded.names & {"_local_scalar_dense", "nonzero", "masked_select", "index"}
