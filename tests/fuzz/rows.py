"""Cases of the ops on rows: layer_norm, dropout_add_layer_norm, dropout.

Legend: rows [tokens, columns]; y = (x - mean) / sqrt(var + eps) * weight + bias; z = residual +
dropout(x). Rows wider than 256 columns are read in pieces by the interpreter's tiles.
"""

import math
import os
from collections.abc import Callable

import torch
from torch.nn import functional as F

import bertkern
from bertkern import ops
from bertkern.reference.dropout import HIDDEN_HEAD, random_bits

from .case import Case, Tensors, repeats, rows_of, same_bits
from .draw import FP16, FP32, Draw

EVERY = slice(None)
PLAIN = 1.0 if os.environ.get("TMP_PLAIN") else 0.7


def hidden_keep(seed: torch.Tensor, p: float, names: torch.Tensor, columns: int) -> torch.Tensor:
    """The factor 0 or 1 / (share really kept) of each element [rows, columns], fp64."""
    dropped = round(p * 65536)
    zero = torch.zeros((), dtype=torch.int64)
    bits = random_bits(
        seed.cpu(), zero, zero + HIDDEN_HEAD, names.cpu()[:, None], torch.arange(columns)[None]
    )
    factor = 65536 / (65536 - dropped) if dropped < 65536 else 0.0
    return (bits >= dropped).double() * factor


class RowNames:
    """What hidden dropout calls each row: its index, or dropout_rows, in any order and stride."""

    def __init__(self, draw: Draw, rows: int) -> None:
        self.given = draw.chance(0.5)
        self.names = torch.arange(rows)
        if self.given:
            self.names = torch.randperm(4 * rows + 5, generator=draw.generator)[:rows]
            if draw.chance(0.2):
                self.names = self.names + 2**33  # only the low 32 bits count
            if draw.chance(0.3):
                self.names = torch.stack((self.names, torch.full_like(self.names, -1)), 1)[:, 0]
        self.names = self.names.to(draw.device)

    def of(self, part: slice) -> torch.Tensor | None:
        """dropout_rows of a call on a part of the rows; None: the rows are counted."""
        return self.names[part] if self.given or part != EVERY else None

    def __str__(self) -> str:
        return "rows given" if self.given else "rows counted"


def lead(draw: Draw, rows: int) -> tuple[int, ...]:
    """`rows` as one leading dimension or two or three."""
    if rows and draw.chance(0.3):
        first = draw.random.choice([d for d in range(1, rows + 1) if rows % d == 0])
        return draw.pick((first, rows // first), (first, 1, rows // first))
    return (rows,)


def normalise(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """By the formula in fp64; by torch's own function in other dtypes."""
    if x.dtype != torch.float64:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def _values(draw: Draw, rows: int, columns: int) -> torch.Tensor:
    """Rows of different size and mean, none past what fp16 holds."""
    deviation = draw.pick(1.0, 1.0, 0.01, 5.0)
    mean = draw.pick(0.0, 0.0, 3.0, 100.0)
    x = draw.normal(rows, columns) * deviation + mean * deviation
    if rows and draw.chance(0.3):
        x[draw.between(0, rows - 1)] *= 10
    if rows and draw.chance(0.1):
        x[draw.between(0, rows - 1)] = mean * deviation  # a row of one value
    return x


def _parameters(draw: Draw, columns: int, dtype: torch.dtype) -> Tensors:
    parameters = {}
    for name in ("weight", "bias"):
        if draw.chance(0.8):
            parameters[name] = draw.tensor(columns, dtype=draw.pick(dtype, FP32), plain=PLAIN)
    return parameters


def _sizes(draw: Draw, most: int) -> tuple[int, int]:
    """(rows, columns): many narrow rows, or few that are read in pieces."""
    if draw.chance(0.75):
        return draw.size(most), draw.size(120, 1)
    return draw.size(20), draw.between(121, 700)


def _eps(draw: Draw, dtype: torch.dtype, columns: int) -> float:
    """Where few columns may be equal, 1 / sqrt(1e-12) is no fp16, and plain torch gives NaN."""
    eps = draw.pick(1e-12, 1e-5)
    return 1e-5 if dtype == FP16 and columns < 4 else eps


def wanted_leaves(draw: Draw, leaves: Tensors) -> set[str]:
    """Mostly every leaf; else some, at least one."""
    names = sorted(leaves)
    if draw.chance(0.7):
        return set(names)
    return set(draw.random.sample(names, draw.between(1, len(names))))


def _part(tensors: Tensors, names: set[str], rows: slice) -> Tensors:
    """Those tensors that have rows, cut to some of them (as one leading dimension)."""
    return {n: rows_of(t)[rows] if n in names else t for n, t in tensors.items()}


def row_properties(
    draw: Draw,
    case: Case,
    call_rows: Callable[[Tensors, slice], Tensors],
    rows: int,
    inputs: set[str],
    first_multiple: int = 1,
) -> None:
    """Properties of an op whose rows are independent.

    Args:
        call_rows: (leaves, part) -> outputs; the op's call on a part of the rows, to which the
            leaves are already cut.
        inputs: the leaves and outputs that have rows.
        first_multiple: the part begins at a multiple of this row. (The interpreter's matrix product
            is numpy's, in which a row's bits depend on its place in the tile; a GPU's do not.)
    """
    repeats(draw, case)
    leaves_with_rows = inputs & case.leaves.keys()
    results = [*case.cotangents, *(f"d {n}" for n in case.wanted & inputs)]
    if rows and draw.chance(0.4):
        first = draw.between(0, (rows - 1) // first_multiple) * first_multiple
        part = slice(first, draw.between(first + 1, rows))

        def alone(got: Tensors) -> None:
            few = case.run_op(
                leaves=_part(case.leaves, leaves_with_rows, part),
                call=lambda leaves: call_rows(leaves, part),
                cotangents=_part(case.cotangents, inputs, part),
            )
            same_bits(few, _part(got, set(results), part), *results)

        case.properties[f"rows {part.start}:{part.stop} alone"] = alone
    if rows > 1 and leaves_with_rows and draw.chance(0.4):
        bad = draw.between(0, rows - 1)
        others = torch.arange(rows) != bad

        def poisoned(got: Tensors) -> None:
            leaves = {n: t.detach().clone() for n, t in case.leaves.items()}
            for name in leaves_with_rows:
                dirty = rows_of(leaves[name]).clone()
                dirty[bad] = math.nan
                leaves[name] = dirty.reshape(case.leaves[name].shape)
            dirty = case.run_op(leaves=leaves)
            same_bits(
                {n: rows_of(dirty[n])[others] for n in results},
                {n: rows_of(got[n])[others] for n in results},
            )

        case.properties[f"NaN in row {bad} stays there"] = poisoned


def layer_norm(draw: Draw) -> Case:
    rows, columns = _sizes(draw, 90)
    dtype = draw.pick(FP32, FP16)
    eps = _eps(draw, dtype, columns)
    shape = (*lead(draw, rows), columns)
    x = draw.place(_values(draw, rows, columns).reshape(shape), dtype)
    leaves = {"x": x, **_parameters(draw, columns, dtype)}

    def call(t: Tensors) -> Tensors:
        return {"y": bertkern.layer_norm(t["x"], t.get("weight"), t.get("bias"), eps)}

    def plain(t: Tensors) -> Tensors:
        return {"y": normalise(t["x"], t.get("weight"), t.get("bias"), eps)}

    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        call,
        plain,
        {"y": draw.tensor(*shape, dtype=dtype)},
        dtype,
        f"layer_norm {list(shape)} {dtype} eps {eps} strides {x.stride()} with {sorted(leaves)}",
    )
    row_properties(draw, case, lambda t, _: call(t), rows, {"x", "y"})
    return case


def dropout_add_layer_norm(draw: Draw) -> Case:
    rows, columns = _sizes(draw, 70)
    dtype = draw.pick(FP32, FP16)
    eps = _eps(draw, dtype, columns)
    p = draw.pick(0.0, draw.dropout_p(), draw.dropout_p())
    seed, names = draw.seed(), RowNames(draw, rows)
    prenorm = draw.chance(0.6)
    shape = (*lead(draw, rows), columns)
    leaves = {
        "x": draw.place(_values(draw, rows, columns).reshape(shape), dtype),
        "residual": draw.place(_values(draw, rows, columns).reshape(shape), dtype),
        **_parameters(draw, columns, dtype),
    }
    keep = hidden_keep(seed, p, names.names, columns).reshape(shape)

    def call_rows(t: Tensors, part: slice) -> Tensors:
        result = bertkern.dropout_add_layer_norm(
            t["x"],
            t["residual"],
            t.get("weight"),
            t.get("bias"),
            p,
            eps,
            prenorm,
            seed,
            dropout_rows=names.of(part),
        )
        return dict(zip("yz", result, strict=True)) if prenorm else {"y": result}

    def plain(t: Tensors) -> Tensors:
        z = t["residual"] + (t["x"] * keep.to(t["x"].dtype) if p else t["x"])
        y = normalise(z, t.get("weight"), t.get("bias"), eps)
        return {"y": y, "z": z} if prenorm else {"y": y}

    outputs = ["y", "z"] if prenorm else ["y"]
    used = outputs if draw.chance(0.7) else [draw.random.choice(outputs)]
    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        lambda t: call_rows(t, EVERY),
        plain,
        {name: draw.tensor(*shape, dtype=dtype) for name in used},
        dtype,
        f"dropout_add_layer_norm {list(shape)} {dtype} eps {eps} p {p} seed {int(seed)} {names} "
        f"gradients of {used} with {sorted(leaves)}",
    )
    row_properties(draw, case, call_rows, rows, {"x", "residual", *outputs})
    return case


def _ids(draw: Draw, most: int, *shape: int) -> torch.Tensor:
    """Ids below `most` as int64 or int32, of any stride."""
    ids = torch.randint(most, shape, generator=draw.generator)
    ids = ids.to(draw.pick(torch.int64, torch.int32)).to(draw.device)
    if draw.chance(0.3):
        ids = torch.stack((ids, torch.full_like(ids, -(2**30))), -1)[..., 0]
    return ids


def embedding_layer_norm(draw: Draw) -> Case:
    (rows, columns), dtype = _sizes(draw, 70), draw.pick(FP32, FP16)
    eps = _eps(draw, dtype, columns)
    shape = lead(draw, rows)
    sizes = {"word": draw.between(1, 60), "position": draw.between(1, 90)}
    sizes["type"] = draw.pick(1, 2, 3)
    ids = {name: _ids(draw, n, *shape) for name, n in sizes.items()}
    if draw.chance(0.5):  # [B, S] tokens, [S] positions
        ids["position"] = _ids(draw, sizes["position"], *shape[1:], *([1] * (len(shape) == 1)))
    type_given = draw.chance(0.7)
    padding = draw.pick(None, None, draw.between(-sizes["word"], sizes["word"] - 1))
    p = draw.pick(0.0, draw.dropout_p())
    seed, names = draw.seed(), RowNames(draw, rows)
    at = {name: i.expand(shape).reshape(-1).long().cpu() for name, i in ids.items()}
    if not type_given:
        at["type"] = torch.zeros_like(at["type"])
    leaves = {}
    for name, n in sizes.items():  # rows that nobody reads hold anything
        read = torch.zeros(n, dtype=torch.bool).index_fill(0, at[name], True)
        table = draw.normal(n, columns)
        table[~read] = draw.pick(math.nan, 0.0)
        leaves[name] = draw.place(table, dtype)
    leaves |= _parameters(draw, columns, dtype)
    keep = hidden_keep(seed, p, names.names, columns)

    def call_rows(t: Tensors, part: slice) -> Tensors:
        some = ids
        if part != EVERY:
            some = {name: i.expand(shape).reshape(-1)[part] for name, i in ids.items()}
        y = bertkern.embedding_layer_norm(
            some["word"],
            some["position"],
            some["type"] if type_given else None,
            *(t[name] for name in sizes),
            t.get("weight"),
            t.get("bias"),
            eps,
            p,
            seed,
            dropout_rows=names.of(part),
            padding_idx=padding,
        )
        return {"y": y}

    def plain(t: Tensors) -> Tensors:
        word = t["word"][at["word"]]
        if padding is not None:
            frozen = at["word"] == padding % sizes["word"]
            word = torch.where(frozen[:, None], word.detach(), word)
        z = word + t["position"][at["position"]] + t["type"][at["type"]]
        y = normalise(z, t.get("weight"), t.get("bias"), eps)
        y = y * keep.to(y.dtype) if p else y
        return {"y": y.reshape(*shape, columns)}

    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        lambda t: call_rows(t, EVERY),
        plain,
        {"y": draw.tensor(*shape, columns, dtype=dtype)},
        dtype,
        f"embedding_layer_norm {list(shape)} x {columns} {dtype} eps {eps} p {p} seed {int(seed)} "
        f"{names} tables of {sizes} padding {padding} types {type_given} with {sorted(leaves)}",
    )
    row_properties(draw, case, call_rows, rows, {"y"})
    return case


def dropout(draw: Draw) -> Case:
    rows, columns = draw.size(90), draw.size(150)
    dtype, p, seed = draw.pick(FP32, FP16), draw.dropout_p(), draw.seed()
    names = RowNames(draw, rows)
    shape = (*lead(draw, rows), columns)
    keep = hidden_keep(seed, p, names.names, columns).reshape(shape)

    def call_rows(t: Tensors, part: slice) -> Tensors:
        return {"y": ops.dropout(t["x"], p, seed, dropout_rows=names.of(part))}

    leaves = {"x": draw.tensor(*shape, dtype=dtype)}
    case = Case(
        leaves,
        {"x"},
        lambda t: call_rows(t, EVERY),
        lambda t: {"y": t["x"] * keep.to(t["x"].dtype)},
        {"y": draw.tensor(*shape, dtype=dtype)},
        dtype,
        f"dropout {list(shape)} {dtype} p {p} seed {int(seed)} {names}",
    )
    row_properties(draw, case, call_rows, rows, {"x", "y"})
    return case
