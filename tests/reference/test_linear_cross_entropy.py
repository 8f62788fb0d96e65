"""The formula of linear_cross_entropy: torch's own values, exact derivatives to second order."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import bertkern
from bertkern.reference.linear_cross_entropy import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
)

IGNORED = -100


def inputs(rows=7, columns=5, classes=9, bias=True):
    torch.manual_seed(rows)
    x, w = torch.randn(rows, columns).double(), torch.randn(classes, columns).double()
    b = torch.randn(classes).double() if bias else None
    target = torch.randint(classes, (rows,))
    target[2] = IGNORED
    return [None if t is None else t.requires_grad_() for t in (x, w, b)], target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs(reduction, smoothing, bias):
    tensors, target = inputs(bias=bias)
    loss = bertkern.linear_cross_entropy(
        *tensors, target, label_smoothing=smoothing, reduction=reduction
    )
    theirs = F.cross_entropy(
        F.linear(*tensors), target, label_smoothing=smoothing, reduction=reduction
    )
    torch.testing.assert_close(loss, theirs)
    leaves = [t for t in tensors if t is not None]
    upstream = torch.randn_like(loss)
    grads = torch.autograd.grad(loss, leaves, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs, leaves, upstream))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_and_second_derivatives(smoothing, reduction):
    tensors, target = inputs(4, 3, 5)

    def function(*tensors):
        return bertkern.linear_cross_entropy(
            *tensors, target, label_smoothing=smoothing, reduction=reduction
        )

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def test_the_backward_formula_is_the_forwards_derivative():
    (x, w, b), target = inputs()
    target[4] = 3
    loss, m, s = linear_cross_entropy_fwd(x, w, b, target, 3, 0.2)
    dloss = torch.randn_like(loss)
    formula = linear_cross_entropy_bwd(dloss, x, w, b, target, m, s, 3, 0.2)
    valid = target != IGNORED  # here a target that is no class: its loss is NaN
    target = target.clone()
    target[~valid] = 3
    loss, _, _ = linear_cross_entropy_fwd(x, w, b, target, 3, 0.2)
    torch.testing.assert_close(formula[0][valid], torch.autograd.grad(loss, x, dloss)[0][valid])
    assert formula[0][~valid].isnan().all()


def test_ignored_rows_leave_nothing():
    (x, w, b), target = inputs()
    with torch.no_grad():
        x[2] = math.nan
    loss = bertkern.linear_cross_entropy(x, w, b, target, reduction="none")
    assert loss[2] == 0
    grads = torch.autograd.grad(loss.sum(), (x, w, b))
    assert (grads[0][2] == 0).all()
    assert all(g.isfinite().all() for g in grads)
