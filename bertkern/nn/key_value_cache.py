"""Keys and values that generation keeps, so that a step computes its newest token alone.

Legend: R rows (sequences, or beams of them), B sequences, S keys, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_ROOM = 32  # keys; the room doubles when it is full


class KeyValueCache:
    """Keys and values of the tokens that were decoded so far, as many for each row.

    Args:
        rows: R.
        num_heads, head_dim: H, D.
        like: a tensor with the dtype and device of the keys.

    Attributes:
        k, v: [R, room, H, D]; what stands behind `length` is not defined.
        length: tokens decoded so far.
        lengths: the same, int32 [R] on the device.
    """

    def __init__(self, rows: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.k = like.new_empty(rows, _FIRST_ROOM, num_heads, head_dim)
        self.v = torch.empty_like(self.k)
        self.length = 0
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=like.device)

    def append(self, k_RHD: Tensor, v_RHD: Tensor) -> None:
        """Keep the key and the value of one more token of each row."""
        if self.length == self.k.shape[1]:
            self.k, self.v = (torch.cat((t, torch.empty_like(t)), dim=1) for t in (self.k, self.v))
        self.k[:, self.length] = k_RHD
        self.v[:, self.length] = v_RHD
        self.length += 1
        self.lengths = torch.full_like(self.lengths, self.length)

    def select(self, rows: Tensor) -> None:
        """Row r becomes what row rows[r] was; `rows` int64 [R'] may repeat and leave out."""
        self.k, self.v = (t.index_select(0, rows) for t in (self.k, self.v))
        self.lengths = self.lengths.new_full((rows.shape[0],), self.length)


@dataclass
class SourceKeys:
    """Keys and values of the source, for cross-attention.

    Attributes:
        k, v: [B, S, H, D], zeros behind a sequence's end.
        lengths: int32 [B].
    """

    k: Tensor
    v: Tensor
    lengths: Tensor

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences, int64 [B'], in this order."""
        self.k, self.v, self.lengths = (
            t.index_select(0, sequences) for t in (self.k, self.v, self.lengths)
        )
