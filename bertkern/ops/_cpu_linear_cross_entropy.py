"""The backend "cpu" of linear_cross_entropy: torch's products and log-softmax, some rows at a time
forward, some classes at a time backward.

Forward, a piece is some rows with all classes, so that one fused log-softmax serves it. Backward, a
piece is some classes with all rows: it finishes dw and db of its classes, which so are never
rounded on the way, while dx is summed over the pieces in float32. Ignored rows are left out at the
start: here that costs no synchronisation.

Equation, legend and arguments are those of `bertkern/reference/linear_cross_entropy.py`; P counts
the kept rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits held at a time, in bytes of float32. From 4 MB to 64 MB measure alike on one core; fewer
# pieces wait less often for other threads.
_BLOCK_BYTES = 16 << 20
_MIN_ROWS = 64  # forward: fewer rows would read the weight too often
_MIN_CLASSES = 256  # backward: fewer classes are no product to speak of


def _pieces(count: int, others: int, fewest: int) -> Iterator[slice]:
    """0..count in pieces: as many at a time as fit, each with `others` logits, but not under
    `fewest`."""
    size = max(_BLOCK_BYTES // (4 * max(others, 1)), fewest)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _kept_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that are not ignored [P], or None for all of them."""
    kept = target != ignore_index
    return None if bool(kept.all()) else kept.nonzero()[:, 0]


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [T], m [T], s [T]) in float32."""
    rows = _kept_rows(target, ignore_index)
    wanted = target
    if rows is not None:
        x, wanted = x.index_select(0, rows), target.index_select(0, rows)
    classes, b = weight.shape[0], None if bias is None else bias.to(x.dtype)
    valid = (wanted >= 0) & (wanted < classes)
    safe = torch.where(valid, wanted, 0)[:, None]
    loss, m, s = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(3))
    for part in _pieces(x.shape[0], classes, _MIN_ROWS):
        z = F.linear(x[part], weight, b)
        log_p = torch.log_softmax(z, 1, dtype=torch.float32)
        loss[part] = -log_p.gather(1, safe[part])[:, 0]
        if label_smoothing > 0:
            loss[part] *= 1 - label_smoothing
            loss[part] -= label_smoothing * log_p.mean(1)
        m[part] = z.amax(1)
        s[part] = log_p.amax(1).neg_().exp_()  # log p = z - m - log s, and z - m = 0 at the largest
    loss, s = torch.where(valid, loss, torch.nan), torch.where(valid, s, torch.nan)
    if rows is None:
        return loss, m, s
    return tuple(  # type: ignore[return-value]
        value.new_zeros(target.shape[0]).index_copy_(0, rows, value) for value in (loss, m, s)
    )


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    m: Tensor,
    s: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dw, db)."""
    tokens = x.shape[0]
    rows = _kept_rows(target, ignore_index)
    if rows is not None:
        x, target, m, s, dloss = (t.index_select(0, rows) for t in (x, target, m, s, dloss))
    classes = weight.shape[0]
    dw = torch.empty(weight.shape, dtype=weight.dtype)
    db = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype)
    dx = torch.zeros(x.shape, dtype=torch.float32)
    index = torch.arange(x.shape[0])
    p_scale = (dloss / s)[:, None]
    share, confidence = dloss[:, None] * (label_smoothing / classes), dloss * (1 - label_smoothing)
    for part in _pieces(classes, x.shape[0], _MIN_CLASSES):
        # forward: loss = lse - (1 - eps) z_target - eps mean(z), so dz = dloss (p - (1 - eps)
        # [target] - eps / V) with p = exp(z - m) / s.
        z = F.linear(x, weight[part], None if bias is None else bias[part].to(x.dtype))
        dz = z.float().sub_(m[:, None]).exp_().mul_(p_scale)
        local = target - part.start
        here = ((local >= 0) & (local < dz.shape[1])).nonzero()[:, 0]
        dz[index[here], local[here]] -= confidence[here]
        if label_smoothing > 0:
            dz -= share
        if db is not None:
            db[part] = dz.sum(0)
        dz = dz.to(x.dtype)
        torch.mm(dz.t(), x, out=dw[part])
        if x.dtype == torch.float32:
            dx.addmm_(dz, weight[part])
        else:
            dx += dz @ weight[part]
    dx = dx.to(x.dtype)
    if rows is not None:
        dx = dx.new_zeros((tokens, dx.shape[1])).index_copy_(0, rows, dx)
    return dx, dw, db
