"""Feed-forward network: y = dropout(act(x w1ᵀ + b1) w2ᵀ + b2)        (Vaswani et al. 2017, section
3.3)

x [M, K], w1 [F, K], b1 [F], w2 [N, F], b2 [N], y [M, N]. The pre-activation z = x w1ᵀ + b1 [M, F]
is what the backward needs, saved or recomputed: dh = g w2 with g = dropout'(dy), dz = dh · act'(z),
h = act(z).
"""

from torch import Tensor

from .linear import linear_bwd, linear_fwd


def ffn_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z); z is empty unless it was asked for."""
    h, z = linear_fwd(x, w1, b1, None, activation, 0.0, None, None, save_preact)
    y, _ = linear_fwd(h, w2, b2, None, "", dropout_p, dropout_seed, dropout_rows, False)
    return y, z


def ffn_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    z: Tensor,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """(dx, dw1, db1, dw2, db2); the hidden activations are recomputed."""
    h, _ = linear_fwd(x, w1, b1, None, activation, 0.0, None, None, False)
    dh, dw2, db2 = linear_bwd(dy, h, w2, b2, h, "", dropout_p, dropout_seed, dropout_rows)
    dx, dw1, db1 = linear_bwd(dh, x, w1, b1, z, activation, 0.0, None, None)
    return dx, dw1, db1, dw2, db2
