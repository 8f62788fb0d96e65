"""Cases of the matrix products with epilogues: linear, ffn and linear_cross_entropy.

Legend: x [tokens, K], w [N, K] (ffn: w1 [F, K], w2 [N, F]); y = residual + dropout(act(x wᵀ + b)).
Tiles of the interpreter are 32 by 16 by 32.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

import bertkern

from .case import BACKEND, Case, Tensors, repeats, same_bits
from .draw import FP16, FP32, Draw
from .rows import EVERY, PLAIN, RowNames, hidden_keep, lead, row_properties, wanted_leaves

FIRST_ROW = 32  # the first rows of the interpreter's tiles


def _phi(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(z / 2**0.5))


def _activate(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """By the formula in fp64 (Hendrycks & Gimpel 2016); by torch's own function in other dtypes."""
    if activation is None:
        return z
    if activation == "relu":
        return z.clamp(min=0)
    if z.dtype != torch.float64:
        return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "gelu":
        return z * _phi(z)
    return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


def _product_properties(
    draw: Draw, case: Case, call_rows: Callable, rows: int, inputs: set[str]
) -> None:
    if BACKEND in ("cpu", "reference"):  # torch's products choose their order by the number of rows
        repeats(draw, case)
    else:
        row_properties(draw, case, call_rows, rows, inputs, FIRST_ROW)


def _weight(draw: Draw, outs: int, ins: int, dtype: torch.dtype) -> torch.Tensor:
    """Of a size that keeps the activations' arguments around 1, or larger."""
    size = max(ins, 1) ** -0.5 * draw.pick(1.0, 1.0, 3.0)
    return draw.place(draw.normal(outs, ins) * size, dtype)


def linear(draw: Draw) -> Case:
    dtype = draw.pick(FP32, FP16)
    tokens, outs, ins = draw.size(90), draw.size(90), draw.size(120)
    activation = draw.pick(None, "gelu", "gelu_tanh", "relu")
    p = draw.pick(0.0, draw.dropout_p())
    seed, names = draw.seed(), RowNames(draw, tokens)
    shape = lead(draw, tokens)
    leaves = {
        "x": draw.tensor(*shape, ins, dtype=dtype),
        "w": _weight(draw, outs, ins, dtype),
    }
    if draw.chance(0.7):
        leaves["b"] = draw.tensor(outs, dtype=draw.pick(dtype, FP32), plain=PLAIN)
    if draw.chance(0.5):
        leaves["residual"] = draw.tensor(*shape, outs, dtype=dtype)
    keep = hidden_keep(seed, p, names.names, outs).reshape(*shape, outs)

    def call_rows(t: Tensors, part: slice) -> Tensors:
        y = bertkern.linear(
            t["x"],
            t["w"],
            t.get("b"),
            activation=activation,
            residual=t.get("residual"),
            dropout_p=p,
            dropout_seed=seed,
            dropout_rows=names.of(part),
        )
        return {"y": y}

    def plain(t: Tensors) -> Tensors:
        y = _activate(F.linear(t["x"], t["w"], t.get("b")), activation)
        y = y * keep.to(y.dtype) if p else y
        return {"y": y + t["residual"] if "residual" in t else y}

    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        lambda t: call_rows(t, EVERY),
        plain,
        {"y": draw.tensor(*shape, outs, dtype=dtype)},
        dtype,
        f"linear x {list(shape)} x {ins}, w {outs} x {ins} strides {leaves['w'].stride()} {dtype} "
        f"{activation} p {p} seed {int(seed)} {names} with {sorted(leaves)}",
    )
    _product_properties(draw, case, call_rows, tokens, {"x", "residual", "y"})
    return case


def ffn(draw: Draw) -> Case:
    dtype = draw.pick(FP32, FP16)
    tokens, outs, ins, hidden = draw.size(70), draw.size(60), draw.size(60), draw.size(90)
    activation = draw.pick("gelu", "gelu_tanh", "relu")
    p = draw.pick(0.0, draw.dropout_p())
    seed, names = draw.seed(), RowNames(draw, tokens)
    shape = lead(draw, tokens)
    leaves = {
        "x": draw.tensor(*shape, ins, dtype=dtype),
        "w1": _weight(draw, hidden, ins, dtype),
        "w2": _weight(draw, outs, hidden, dtype),
    }
    for name, size in (("b1", hidden), ("b2", outs)):
        if draw.chance(0.7):
            leaves[name] = draw.tensor(size, dtype=draw.pick(dtype, FP32), plain=PLAIN)
    keep = hidden_keep(seed, p, names.names, outs).reshape(*shape, outs)

    def call_rows(t: Tensors, part: slice) -> Tensors:
        y = bertkern.ffn(
            t["x"],
            t["w1"],
            t.get("b1"),
            t["w2"],
            t.get("b2"),
            activation,
            p,
            seed,
            dropout_rows=names.of(part),
        )
        return {"y": y}

    def plain(t: Tensors) -> Tensors:
        h = _activate(F.linear(t["x"], t["w1"], t.get("b1")), activation)
        y = F.linear(h, t["w2"], t.get("b2"))
        return {"y": y * keep.to(y.dtype) if p else y}

    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        lambda t: call_rows(t, EVERY),
        plain,
        {"y": draw.tensor(*shape, outs, dtype=dtype)},
        dtype,
        f"ffn x {list(shape)} x {ins}, hidden {hidden}, out {outs} {dtype} {activation} p {p} "
        f"seed {int(seed)} {names} with {sorted(leaves)}",
    )
    _product_properties(draw, case, call_rows, tokens, {"x", "y"})
    return case


def _cross_entropy(z: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Loss of each row of logits [rows, classes]: by the formula in fp64, else by torch's, in
    fp32."""
    if z.dtype != torch.float64:
        return F.cross_entropy(z.float(), target, label_smoothing=smoothing, reduction="none")
    lse = torch.logsumexp(z, -1)
    picked = z[torch.arange(len(target)), target]
    return (1 - smoothing) * (lse - picked) + smoothing * (lse - z.mean(-1))


def linear_cross_entropy(draw: Draw) -> Case:
    dtype = draw.pick(FP32, FP16)
    tokens, classes, ins = draw.size(70), draw.size(200, 1), draw.size(70)
    ignored = draw.pick(-100, -100, draw.between(0, classes))
    # The only class has gradient 0, with smoothing 1 - (1 - eps) - eps: rounding, but not in torch.
    smoothing = draw.pick(0.0, 0.0, 0.1, draw.random.random(), 1.0) if classes > 1 else 0.0
    shape = lead(draw, tokens)
    target = torch.randint(classes, (tokens,), generator=draw.generator)
    target[draw.normal(tokens) > draw.pick(0.5, 5.0)] = ignored
    counted = (target != ignored).nonzero()[:, 0]
    reduction = draw.pick("none", "mean", "sum") if len(counted) else draw.pick("none", "sum")
    given = target.reshape(shape).to(draw.device)
    if draw.chance(0.3):
        given = torch.stack((given, torch.full_like(given, 2**40)), -1)[..., 0]
    leaves = {
        "x": draw.tensor(*shape, ins, dtype=dtype),
        "weight": _weight(draw, classes, ins, dtype),
    }
    if draw.chance(0.7):
        leaves["bias"] = draw.tensor(classes, dtype=draw.pick(dtype, FP32), plain=PLAIN)
    out_of_account = (target == ignored).reshape(shape).to(draw.device)
    leaves["x"][out_of_account] = draw.pick(torch.nan, 0.0)

    def call_rows(t: Tensors, part: slice) -> Tensors:
        targets = given if part == EVERY else given.reshape(-1)[part]
        loss = bertkern.linear_cross_entropy(
            t["x"], t["weight"], t.get("bias"), targets, ignored, smoothing, reduction
        )
        return {"loss": loss}

    def plain(t: Tensors) -> Tensors:
        x = t["x"].reshape(tokens, ins)[counted]
        losses = _cross_entropy(F.linear(x, t["weight"], t.get("bias")), target[counted], smoothing)
        if reduction == "none":
            return {"loss": losses.new_zeros(tokens).index_put((counted,), losses).reshape(shape)}
        return {"loss": losses.mean() if reduction == "mean" else losses.sum()}

    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        lambda t: call_rows(t, EVERY),
        plain,
        {"loss": draw.tensor(*(shape if reduction == "none" else ()), dtype=FP32)},
        dtype,
        f"linear_cross_entropy x {list(shape)} x {ins}, {classes} classes {dtype} {reduction} "
        f"smoothing {smoothing} ignored {ignored} in {tokens - len(counted)} with {sorted(leaves)}",
    )
    repeats(draw, case)
    if reduction == "none" and tokens > FIRST_ROW and BACKEND not in ("cpu", "reference"):
        first = draw.between(0, (tokens - 1) // FIRST_ROW) * FIRST_ROW
        part = slice(first, draw.between(first + 1, tokens))

        def alone(got: Tensors) -> None:
            few = case.run_op(
                leaves={**leaves, "x": leaves["x"].reshape(tokens, ins)[part]},
                call=lambda t: call_rows(t, part),
                cotangents={"loss": case.cotangents["loss"].reshape(-1)[part]},
            )
            results = {"loss": got["loss"].reshape(-1)[part]}
            if "x" in case.wanted:
                results["d x"] = got["d x"].reshape(tokens, ins)[part]
            same_bits(few, results)

        case.properties[f"rows {part.start}:{part.stop} alone"] = alone
    return case
