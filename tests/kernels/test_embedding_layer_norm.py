"""embedding_layer_norm's Triton kernels: pieces, partial sums, poisoned tables, missing rows.

The values of whole rows are held to fp64 in tests/ops/test_embedding_layer_norm.py. Rows beyond 256
columns are read in pieces by the interpreter's tiles.
"""

import math

import pytest
import torch
from bertkern.kernels import embedding_layer_norm as kernels
from bertkern.kernels import tuning
from torch.nn import functional as F

from bertkern.reference.dropout import hidden_mask
from bertkern.reference.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

fp32, fp16 = torch.float32, torch.float16
SEED = 11


def inputs(device, tokens, cols, rows, dtype=fp32, types=True):
    torch.manual_seed(cols)
    tables = [torch.randn(n, cols).to(device, dtype) for n in rows]
    indices = [torch.randint(n, (tokens,), device=device) for n in rows]
    weight, bias = torch.randn(2, cols, device=device)
    dy = torch.randn(tokens, cols).to(device, dtype)
    return (*indices[:2], indices[2] if types else None), tables, (weight, bias), dy


def run(indices, tables, affine, dy, p=0.0, padding_idx=-1, rows=None):
    """(y, dword, dposition, dtype, dweight, dbias)."""
    seed = torch.tensor([SEED], device=dy.device) if p else None
    dropout = (p, seed, rows)
    y, mean, rstd = kernels.embedding_layer_norm_fwd(*indices, *tables, *affine, 1e-12, *dropout)
    grads = kernels.embedding_layer_norm_bwd(
        dy, *indices, *tables, *affine, mean, rstd, padding_idx, *dropout
    )
    return y, *grads


def formula(indices, tables, affine, dy, dtype, p=0.0, padding_idx=-1, rows=None):
    """The same in torch's own ops, on the host."""
    ids, position_ids, type_ids = (None if i is None else i.cpu() for i in indices)
    leaves = [t.cpu().to(dtype).requires_grad_() for t in (*tables, *affine)]
    z = F.embedding(ids, leaves[0], None if padding_idx < 0 else padding_idx)
    z = z + F.embedding(position_ids, leaves[1])
    z = z + (leaves[2][0] if type_ids is None else F.embedding(type_ids, leaves[2]))
    y = F.layer_norm(z, z.shape[1:], *leaves[3:], 1e-12)
    if p:
        rows = None if rows is None else rows.cpu()
        y = y * hidden_mask(y, p, torch.tensor([SEED]), rows).to(dtype)
    return y, *torch.autograd.grad(y, leaves, dy.cpu().to(dtype))


def hold_to_rule(case, dtype, **options):
    results = run(*case, **options), formula(*case, torch.float64, **options)
    results = *results, formula(*case, dtype, **options)
    names = ("y", "dword", "dposition", "dtype", "dweight", "dbias")
    for i, (name, *triple) in enumerate(zip(names, *results, strict=True)):
        triple = [t.detach().cpu().reshape(-1, t.shape[-1]) for t in triple]
        assert_close(*triple, grad=i > 0, name=name)


# tokens, columns (two pieces with a tail; three), rows of the tables, type_ids, dropout
@pytest.mark.parametrize(
    ("tokens", "cols", "rows", "dtype", "types", "p"),
    [
        (19, 300, (7, 19, 2), fp32, True, 0.3),
        (19, 700, (7, 19, 2), fp16, False, 0.3),
        (19, 30, (7, 19, 2), fp16, False, 0.3),
        (5, 513, (3, 5, 4), fp32, True, 0.0),
        (37, 500, (7, 9, 1), fp16, True, 0.1),
        (37, 64, (7, 9, 2), fp32, True, 0.1),
    ],
)
def test_pieces_and_more_tokens_than_partial_sums(
    device, monkeypatch, tokens, cols, rows, dtype, types, p
):
    monkeypatch.setattr(tuning, "LAYER_NORM_PARTIALS", 2)
    case = inputs(device, tokens, cols, rows, dtype, types)
    hold_to_rule(case, dtype, p=p, padding_idx=1, rows=torch.arange(tokens, device=device) * 7)


def test_65536_columns_and_a_large_mean(device, monkeypatch):
    """At the GPU's widest pieces, which the interpreter's small ones would make slow."""
    indices, tables, affine, dy = inputs(device, 2, 65536, (4, 3, 2))
    if device == "cpu":
        tile = tuning.RowTile(1, tuning.LAYER_NORM_MAX_BLOCK, 4)
        monkeypatch.setattr(tuning, "layer_norm", lambda *key: tile)
    tables[0] += 1000
    hold_to_rule((indices, tables, affine, dy), fp32)


@pytest.mark.parametrize("cols", [33, 300])
def test_only_rows_that_are_named_are_read(device, cols):
    """Other rows of the tables, and what lies between rows, are NaN; no row is written past."""
    indices, tables, affine, dy = inputs(device, 20, cols, (7, 9, 2))
    same = run(indices, tables, affine, dy)
    poisoned = []
    for table, ids in zip(tables, indices, strict=True):
        wide = torch.full((table.shape[0] + 2, cols + 5), math.nan, device=device)
        wide[ids, :cols] = table[ids]
        poisoned.append(wide[: table.shape[0], :cols])
    wide_dy = torch.full((20, cols + 3), math.nan, device=device)
    wide_dy[:, :cols] = dy
    results = run(indices, poisoned, affine, wide_dy[:, :cols])
    assert all(map(torch.equal, results, same))


@pytest.mark.parametrize("cols", [33, 300])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_missing_row_is_nan_alone(device, cols, which):
    indices, tables, affine, dy = inputs(device, 20, cols, (7, 9, 2))
    same = run(indices, tables, affine, dy)
    indices[which][3], indices[which][17] = -1, 2**40
    y, *grads = run(indices, tables, affine, dy)
    kept = torch.ones(20, dtype=torch.bool, device=device)
    kept[[3, 17]] = False
    assert y[~kept].isnan().all()
    assert torch.equal(y[kept], same[0][kept])
    for index, table, grad in zip(indices, tables, grads, strict=False):
        near = index[~kept].clamp(0, table.shape[0] - 1)
        others = torch.ones(table.shape[0], dtype=torch.bool, device=device)
        others[near] = False
        assert grad[others].isfinite().all()


@pytest.mark.parametrize("types", [True, False])
def test_types_are_summed_in_float32(device, types):
    """2500 like gradients: one addition after the other in float16 would stop growing."""
    indices, tables, affine, dy = inputs(device, 2500, 8, (3, 4, 2), fp16, types)
    dy = dy[:1].expand_as(dy)
    dtype = run(indices, tables, affine, dy)[3].cpu()
    exact = formula(indices, tables, affine, dy, torch.float64)[3]
    assert (dtype - exact).abs().max() < 2e-3 * exact.abs().max()


def test_no_tokens(device):
    indices, tables, affine, dy = inputs(device, 0, 16, (3, 4, 2))
    y, *grads = run(indices, tables, affine, dy, p=0.1)
    assert y.shape == (0, 16)
    for grad, like in zip(grads, (*tables, *affine), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))
