"""Linear layer with the epilogues of the feed-forward network.

    z = x wᵀ + b,   y = residual + dropout(act(z))          x [M, K], w [N, K], b [N], y [M, N]

Backward, with g = dropout'(dy) = dy · mask:
    dz = g · act'(z),  dx = dz w,  dw = dzᵀ x,  db = Σ_rows dz,  dresidual = dy.
"""

from torch import Tensor
from torch.nn import functional as F

from .activation import activate, activation_derivative
from .dropout import dropout
from .layer_norm import statistics_dtype


def _pre_activation(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, w, None if b is None else b.to(x.dtype))


def linear_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z); z is empty unless it was asked for and there is an activation."""
    z = _pre_activation(x, w, b)
    y = activate(z, activation)
    if dropout_seed is not None:
        y = dropout(y, dropout_p, dropout_seed, dropout_rows)
    if residual is not None:
        y = residual + y
    return y, z if save_preact and activation else z.new_empty(0)


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    z: Tensor,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dw, db). z is recomputed, so that this formula can be differentiated again."""
    dz = dy
    if dropout_seed is not None:
        dz = dropout(dz, dropout_p, dropout_seed, dropout_rows)
    if activation:
        z = _pre_activation(x, w, b).to(statistics_dtype(x))
        dz = (dz * activation_derivative(z, activation)).to(dy.dtype)
    db = None if b is None else dz.sum(0, dtype=statistics_dtype(dz)).to(b.dtype)
    return dz @ w, dz.t() @ x, db
