"""The feed-forward network y = dropout(act(x w1ᵀ + b1) w2ᵀ + b2) on the kernels of linear.py.
(Vaswani et al. 2017)

Legend: M tokens, C model columns, F feed-forward columns; x, y [M, C], w1 [F, C], w2 [C, F], z = x
w1ᵀ + b1 [M, F], h = act(z).

    forward   z, h   one product: both are stored by its epilogue; h is given back when y is done
              y      one product: bias and dropout in its epilogue
    backward  dh = dropout'(dy) w2,  dz = dh * act'(z),  h = act(z)     one product: dz and h from
    its epilogue
              dw2 = dropout'(dy)ᵀ h,  db2 = sum dropout'(dy)            one product
              dx = dz w1                                                one product
              dw1 = dzᵀ x,  db1 = sum dz                                one product
Only x and z are kept for the backward: h is recomputed from z where z is read anyway. Without
save_preact x alone is kept, and the backward begins with z = x w1ᵀ + b1, the same bits, one product
more.
"""

import torch

from .linear import bwd_input, bwd_weight, linear_fwd, preactivation, unit_stride


def ffn_fwd(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
    save_preact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [M, C], z [M, F], empty [0] unless save_preact)."""
    h, z = linear_fwd(x, w1, b1, None, activation, 0.0, None, None, save_preact)
    y, _ = linear_fwd(h, w2, b2, None, "", dropout_p, dropout_seed, dropout_rows, False)
    return y, z


def ffn_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    z: torch.Tensor,
    activation: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(dx, dw1, db1, dw2, db2); db1, db2 are None without b1, b2. z is empty [0] where it was not
    saved."""
    dy = unit_stride(dy)
    z = preactivation(x, w1, b1, z)
    dropout = (dropout_p, dropout_seed, dropout_rows)
    dz, h = bwd_input(dy, w2, None, "", *dropout, z_prev=z, previous=activation)
    dw2, db2 = bwd_weight(dy, h, w2, b2, None, "", *dropout)
    dx, _ = bwd_input(dz, w1, None, "", 0.0, None, None)
    dw1, db1 = bwd_weight(dz, x, w1, b1, None, "", 0.0, None, None)
    return dx, dw1, db1, dw2, db2
