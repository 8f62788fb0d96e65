"""Cases of the LayerNorm family: rows of a warp and of a block, of one vector and of many, on 16
bytes and not, more rows than the backward has blocks."""

import math
from collections.abc import Callable

import torch
from fuzz.rows import hidden_keep, normalise

import bertkern
from bertkern.ops import _cuda_embedding_layer_norm
from bertkern.reference.dropout import HIDDEN_HEAD, random_bits

from .cases import HALF, Case, Dice, Tensors

FP32 = torch.float32


def _edge_of_dropout(names: torch.Tensor, cols: int) -> tuple[torch.Tensor, float]:
    """(seed, p) such that the bits of an element equal the threshold, which must keep them."""
    seed = torch.tensor([77])
    p = next(
        n / 65536
        for n in range(9000, 60000)
        if (hidden_keep(seed, n / 65536, names, cols) > 0).sum()
        > (hidden_keep(seed, (n + 1) / 65536, names, cols) > 0).sum()
    )
    return seed, p


def _closest_miss(names: torch.Tensor, cols: int) -> tuple[torch.Tensor, float]:
    """(seed, p) such that an element is dropped by the least that is possible: 32 bits are compared
    whose upper half is its own, one below the threshold, and whose lower half, all ones, is that of
    the column 8 before it."""
    zero = torch.zeros((), dtype=torch.int64)
    columns = torch.arange(cols)
    for number in range(1000):
        seed = torch.tensor([number])
        bits = random_bits(seed, zero, zero + HIDDEN_HEAD, names[:, None], columns[None]).long()
        low, high = (bits[:, (columns & 8) == eight] for eight in (0, 8))
        found = (low[:, : high.shape[1]] == 0xFFFF) & (high > 9000) & (high < 40000)
        if found.any():
            return seed, (int(high[found][0]) + 1) / 65536
    raise AssertionError("no seed has such an element")


def _parameters(dice: Dice, cols: int, dtype: torch.dtype) -> Tensors:
    """weight and bias between NaN."""
    found = {}
    for name in ("weight", "bias"):
        memory = torch.full((cols + 16,), math.nan, dtype=dtype)
        found[name] = memory[8:-8]
        found[name].copy_(dice.normal(cols))
    return found


def norm(
    name: str,
    seed: int,
    rows: int,
    cols: int,
    *,
    dtype: torch.dtype = HALF,
    weight_dtype: torch.dtype | None = None,
    residual: bool = False,
    prenorm: bool = False,
    dropout: bool = False,
    closest: bool = False,
    named: bool = False,
    chunk: int = 8,
    mean: float = 0.0,
    frozen: bool = False,
) -> Case:
    """Case of layer_norm or, with a residual, of dropout_add_layer_norm.

    Args:
        weight_dtype: None: neither weight nor bias.
        closest: an element is dropped by the least that is possible.
        named: dropout_rows are given.
        chunk: NaN between the rows, in elements.
        mean: of a row.
        frozen: the bias alone is given, which no gradient of weight goes with.
    """
    dice = Dice(seed)
    leaves = {"x": dice.rows(rows, cols, dtype=dtype, chunk=chunk)}
    leaves["x"] += mean
    if residual:
        leaves["residual"] = dice.rows(rows, cols, dtype=dtype, chunk=chunk)
    if weight_dtype is not None:
        leaves |= _parameters(dice, cols, weight_dtype)
        if frozen:
            del leaves["weight"]
    names = torch.randperm(5 * rows, generator=dice.generator)[:rows] if named else None
    told = torch.arange(rows) if names is None else names
    dropout_seed, p = _edge_of_dropout(told, cols) if dropout else (torch.tensor([1]), 0.0)
    if closest:
        dropout_seed, p = _closest_miss(told, cols)
    outputs = ["y", "z"] if prenorm else ["y"]
    eps = 1e-5

    def call(t: Tensors) -> Tensors:
        parameters = (t.get("weight"), t.get("bias"))
        if not residual:
            return {"y": bertkern.layer_norm(t["x"], *parameters, eps)}
        result = bertkern.dropout_add_layer_norm(
            t["x"],
            t["residual"],
            *parameters,
            p,
            eps,
            prenorm,
            dropout_seed,
            dropout_rows=names,
        )
        return dict(zip(outputs, result if prenorm else [result], strict=True))

    def plain(t: Tensors) -> Tensors:
        z = t["x"]
        if residual:
            z = t["residual"] + z * hidden_keep(dropout_seed, p, told, cols).to(z.dtype)
        weight, bias = (t[n].to(z.dtype) if n in t else None for n in ("weight", "bias"))
        return {"y": normalise(z, weight, bias, eps), "z": z}

    cotangents = {n: dice.rows(rows, cols, dtype=dtype, chunk=chunk) for n in outputs}
    views = {n: lambda v: v[None] for n in ("weight", "bias")}
    return Case(name, leaves, call, lambda t: {n: plain(t)[n] for n in outputs}, cotangents, dtype,
                matrices=views)  # fmt: skip


def embedding(
    name: str,
    seed: int,
    tokens: int,
    cols: int,
    sizes: tuple[int, int, int] = (50, 20, 2),
    *,
    dtype: torch.dtype = HALF,
    weight_dtype: torch.dtype | None = HALF,
    padding: int | None = None,
    dropout: bool = False,
    types: bool = True,
    ids_dtype: torch.dtype = torch.int64,
    often: float = 0.0,
    chunk: int = 8,
) -> Case:
    """Case of embedding_layer_norm.

    Args:
        types: type_ids are given.
        often: how many of the words are word 3.
    """
    dice = Dice(seed)
    names = ("word", "position", "type")
    leaves = {
        n: dice.rows(size, cols, dtype=dtype, chunk=chunk)
        for n, size in zip(names, sizes, strict=True)
    }
    if weight_dtype is not None:
        leaves |= _parameters(dice, cols, weight_dtype)
    ids = [
        torch.randint(0, size, (tokens,), generator=dice.generator).to(ids_dtype) for size in sizes
    ]
    ids[0][torch.rand(tokens, generator=dice.generator) < often] = 3
    if not types:
        ids[2] = None
    given = ids
    told = torch.arange(tokens)
    dropout_seed, p = _edge_of_dropout(told, cols) if dropout else (torch.tensor([1]), 0.0)
    eps = 1e-5

    def call(t: Tensors) -> Tensors:
        y = bertkern.embedding_layer_norm(
            *given,
            *(t[n] for n in names),
            t.get("weight"),
            t.get("bias"),
            eps,
            p,
            dropout_seed,
            padding_idx=padding,
        )
        return {"y": y}

    def plain(t: Tensors) -> Tensors:
        word = t["word"]
        if padding is not None:
            still = torch.arange(sizes[0])[:, None] == padding
            word = torch.where(still, word.detach(), word)
        kind = torch.zeros_like(ids[0]) if ids[2] is None else ids[2]
        z = word[ids[0].long()] + t["position"][ids[1].long()] + t["type"][kind.long()]
        weight, bias = (t[n].to(z.dtype) if n in t else None for n in ("weight", "bias"))
        y = normalise(z, weight, bias, eps)
        return {"y": y * hidden_keep(dropout_seed, p, told, cols).to(y.dtype)}

    cotangents = {"y": dice.rows(tokens, cols, dtype=dtype, chunk=chunk)}
    views = {n: lambda v: v[None] for n in ("weight", "bias")}
    return Case(name, leaves, call, plain, cotangents, dtype, matrices=views)


class WrongIds:
    """Ids that a table does not have, which the public op refuses on the CPU: y is NaN in these
    tokens alone; their gradients, NaN, go to the nearest rows."""

    name = "ids that no table has"

    def prepare(self) -> None:
        dice = Dice(31)
        self.tables = [dice.rows(size, 40) for size in (9, 7, 2)]
        self.dy = dice.rows(6, 40)
        ids = [[0, -1, 4, 9, 8, 2], [3, 1, 7, 2, 6, 1], [0, 1, 1, 0, -5, 0]]
        self.ids = [torch.tensor(of_table) for of_table in ids]
        self.wrong = torch.tensor([False, True, True, True, True, False])
        nearest = [ids.clamp(0, len(t) - 1) for ids, t in zip(self.ids, self.tables, strict=True)]
        self.touched = [
            torch.isin(torch.arange(len(t)), ids[self.wrong])
            for ids, t in zip(nearest, self.tables, strict=True)
        ]

    def check(self) -> None:
        module = _cuda_embedding_layer_norm
        options = (0.0, None, None)
        y, mean, rstd = module.embedding_layer_norm_fwd(
            *self.ids, *self.tables, None, None, 1e-5, *options
        )
        assert torch.equal(y.isnan().any(1), self.wrong), "NaN in other tokens"
        assert y[self.wrong].isnan().all(), "y is not NaN"
        assert mean[self.wrong].isnan().all(), "mean is not NaN"
        grads = module.embedding_layer_norm_bwd(
            self.dy, *self.ids, *self.tables, None, None, mean, rstd, -1, *options
        )
        for grad, touched in zip(grads, self.touched, strict=False):
            assert torch.equal(grad.isnan().any(1), touched), "NaN in other rows of a gradient"


class RowsOfOneValue:
    """y is 0 in them, but for what is left of rounding: no mean, and no variance below 0."""

    name = "rows of one value"

    def prepare(self) -> None:
        values = Dice(12).normal(60, 1) * 1e6
        self.x = [values.expand(60, cols).contiguous() for cols in (300, 476, 600)]

    def check(self) -> None:
        for x in self.x:
            y = bertkern.layer_norm(x, None, None, 1e-12)
            assert (y.abs() < 0.1).all(), "not 0"


LAYER_NORM: tuple[Callable[[], Case | RowsOfOneValue], ...] = (
    lambda: norm("333 columns", 1, 11, 333, residual=True, dropout=True, named=True, chunk=3,
                 weight_dtype=FP32, prenorm=True),
    lambda: norm("a block to a row, aligned", 2, 3, 1032, residual=True, dropout=True,
                 weight_dtype=HALF),
    lambda: norm("more rows than blocks", 3, 1700, 24, weight_dtype=HALF),
    lambda: norm("a block to a row, many rows, fp32", 4, 400, 520, dtype=FP32, weight_dtype=FP32),
    lambda: norm("fp32, large mean", 5, 9, 264, dtype=FP32, residual=True, prenorm=True,
                 dropout=True, mean=200.0),
    lambda: norm("a block to a row, odd", 6, 5, 1031, chunk=3, weight_dtype=FP32, mean=30.0),
    lambda: norm("no parameters", 7, 5, 512),
    lambda: norm("dropped by one bit", 11, 40, 512, residual=True, closest=True),
    lambda: RowsOfOneValue(),
    lambda: norm("bias alone, one column more", 8, 6, 257, chunk=1, weight_dtype=HALF,
                 frozen=True, residual=True),
    lambda: norm("a block to a row, many rows", 9, 800, 520, weight_dtype=HALF),
    lambda: norm("one column", 10, 5, 1, chunk=1, weight_dtype=HALF, residual=True, prenorm=True),
)  # fmt: skip

EMBEDDING: tuple[Callable[[], Case | WrongIds], ...] = (
    lambda: embedding("333 columns", 21, 150, 333, chunk=3, padding=7, dropout=True, often=0.5),
    lambda: embedding("a block to a row", 22, 90, 520, types=False, ids_dtype=torch.int32,
                      weight_dtype=FP32, often=0.2),
    lambda: embedding("fp32", 23, 260, 40, (30, 90, 3), dtype=FP32, weight_dtype=None,
                      dropout=True, padding=3, often=0.9),
    lambda: WrongIds(),
    lambda: embedding("more tokens than blocks", 24, 1700, 24, (300, 512, 2)),
    lambda: embedding("17 columns", 29, 120, 17, chunk=3, often=0.8),
    # 129 keys, one more than two chunks.
    lambda: embedding("one key in the last chunk", 28, 43, 24, (9, 5, 2), weight_dtype=FP32),
    lambda: embedding("many rows", 25, 64, 256, (700, 64, 1)),
    lambda: embedding("one token", 26, 1, 264, (3, 2, 1), padding=0),
    lambda: embedding("fp32, a block to a row", 27, 70, 520, dtype=FP32, weight_dtype=FP32,
                      dropout=True),
)  # fmt: skip
