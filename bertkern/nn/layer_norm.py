"""LayerNorm: y = (x - mean) · rstd · weight + bias over the last dimension (Ba et al. 2016)."""

from typing import cast

import torch
from torch import Tensor, nn

from bertkern import ops


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias [hidden], on `bertkern.layer_norm`.

    Args:
        hidden_size: the size of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(
        self,
        x: Tensor,
        residual: Tensor,
        dropout_p: float = 0.0,
        dropout_seed: Tensor | None = None,
        dropout_rows: Tensor | None = None,
    ) -> Tensor:
        """LayerNorm(residual + dropout(x)) in one pass; x and residual [T, hidden]."""
        y = ops.dropout_add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            dropout_p,
            self.eps,
            dropout_seed=dropout_seed,
            dropout_rows=dropout_rows,
        )
        return cast(Tensor, y)  # one tensor, as prenorm is off

    def add_and_sum(
        self,
        x: Tensor,
        residual: Tensor,
        dropout_p: float = 0.0,
        dropout_seed: Tensor | None = None,
        dropout_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(LayerNorm(z), z) with z = residual + dropout(x), in one pass; all [T, hidden]."""
        y = ops.dropout_add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            dropout_p,
            self.eps,
            prenorm=True,
            dropout_seed=dropout_seed,
            dropout_rows=dropout_rows,
        )
        return cast(tuple[Tensor, Tensor], y)

    def extra_repr(self) -> str:
        """Sizes, for print(module)."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
