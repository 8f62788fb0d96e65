"""Sinusoidal positions (Vaswani et al. 2017, section 3.5).

    PE[p, 2i] = sin(p / 10000^(2i / hidden)),   PE[p, 2i + 1] = cos(p / 10000^(2i / hidden))

Legend: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoidal_positions(
    count: int, hidden_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """PE of positions 0 .. count - 1, float32 [count, hidden_size].

    Computed in float64: angles of far positions have no digits to spare.
    """
    pair = torch.arange(hidden_size, dtype=torch.float64, device=device) // 2
    position = torch.arange(count, dtype=torch.float64, device=device)
    angle = position[:, None] * 10000.0 ** (-2.0 * pair / hidden_size)
    odd = torch.arange(hidden_size, device=device) % 2 == 1
    return torch.where(odd, angle.cos(), angle.sin()).float()


class SinusoidalPositions(nn.Module):
    """The table above, for any position: it grows when a longer sequence comes.

    Args:
        hidden_size: its columns.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self._table: Tensor | None = None  # no parameter and no buffer: it is not stored

    def forward(self, positions: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """Integer [T], all less than `longest` -> [T, hidden_size] in dtype."""
        return self._rows(positions.device, longest).index_select(0, positions).to(dtype)

    def _rows(self, device: torch.device, longest: int) -> Tensor:
        """The table with rows enough, on the device."""
        table = self._table
        if table is None or table.device != device or table.shape[0] < longest:
            count = max(longest, 2 * table.shape[0] if table is not None else 256)
            table = sinusoidal_positions(count, self.hidden_size, device)
            if not torch.compiler.is_compiling():  # a traced graph keeps nothing outside itself
                self._table = table
        return table
