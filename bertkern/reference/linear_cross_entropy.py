"""Cross-entropy of a linear layer's logits against class indices, one loss for each row.

    z = x wᵀ + b                                            x [T, K], w [V, K], b [V], z [T, V]
    m_t = max_v z_tv,  s_t = Σ_v exp(z_tv − m_t),  lse_t = m_t + log s_t
    loss_t = (1 − ε)(lse_t − z_t,target) + ε (lse_t − mean_v z_tv)                ε label smoothing
    (Szegedy et al. 2016)

Backward, with p = exp(z − m)/s:  dz_tv = dloss_t (p_tv − (1 − ε)[v = target_t] − ε/V),
dx = dz w,  dw = dzᵀ x,  db = Σ_t dz.

A row whose target is ignore_index has loss 0 and gradients 0, whatever stands in x there; its m and
s are any values. A row whose target is no class has loss and s NaN, and so NaN gradients.

Legend: T rows (tokens), V classes (vocabulary), K input features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .layer_norm import statistics_dtype


def _rows(
    x: Tensor, target: Tensor, ignore_index: int, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(x with 0 in ignored rows, as 0 * NaN would be NaN in dw; which rows count [T]; which of
    these ask for what is no class [T])."""
    kept = target != ignore_index
    wrong = kept & ((target < 0) | (target >= classes))
    return torch.where(kept[:, None], x, 0.0), kept, wrong


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return z.to(statistics_dtype(x))


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [T], m [T], s [T]) in float32, or float64 for float64 inputs."""
    x, kept, wrong = _rows(x, target, ignore_index, weight.shape[0])
    z = _logits(x, weight, bias)
    log_p = torch.log_softmax(z, -1)
    loss = -log_p.gather(1, torch.where(kept & ~wrong, target, 0)[:, None])[:, 0]
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    m = z.detach().amax(-1)
    s = (z.detach() - m[:, None]).exp().sum(-1)
    loss, s = torch.where(wrong, torch.nan, loss), torch.where(wrong, torch.nan, s)
    return torch.where(kept, loss, 0.0), m, s


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
    """(dx, dw, db). m and s are recomputed, so that this formula can be differentiated again."""
    classes = weight.shape[0]
    x, kept, wrong = _rows(x, target, ignore_index, classes)
    z = _logits(x, weight, bias)
    wanted = target[:, None] == torch.arange(classes, device=target.device)
    dz = torch.softmax(z, -1) - (1 - label_smoothing) * wanted - label_smoothing / classes
    dz = torch.where(wrong[:, None], torch.nan, dz)
    dz = torch.where(kept[:, None], dz * dloss[:, None], 0.0)
    db = None if bias is None else dz.sum(0).to(bias.dtype)
    dz = dz.to(x.dtype)
    return dz @ weight, dz.t() @ x, db
