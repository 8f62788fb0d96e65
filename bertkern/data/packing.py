"""Batches without padding: what the training loop needs of them, and what they are made with.

Sequences lie behind one another: sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of
the batch. A `Batch` is a whole optimizer step; `part` packs some of its examples, so that several
processes, or several passes that accumulate gradients, share it. A part knows the longest sequence
of the whole batch and the number of its first sequence there: dropout masks are a function of
these, so the parts together compute what the batch at once would.

Legend: E examples of a batch, B sequences (E, times the choices of a multiple-choice example),
T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


class PackedBatch(Protocol):
    """What one process computes at once."""

    @property
    def tokens(self) -> int:
        """T."""

    @property
    def sequences(self) -> int:
        """Sequences, counted as examples: those of a multiple-choice example are one."""

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments of the model's forward, labels included; a GPU is not waited for."""


class Batch(Protocol):
    """One optimizer step of all processes together."""

    @property
    def lengths(self) -> Ids:
        """Tokens of each example, int64 [E]."""

    def __len__(self) -> int:
        """E."""

    def part(self, first: int, last: int) -> PackedBatch:
        """Examples first .. last - 1, packed."""


def cumulative_lengths(lengths: Ids) -> Ids:
    """cu_seqlens of sequences with these lengths, int64 [B + 1]: 0, then their running sum."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)))


def positions(lengths: Ids) -> Ids:
    """Each token's place in its own sequence, int64 [T]."""
    cu_seqlens = cumulative_lengths(lengths)
    return np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)


def fill_batches(lengths: Ids, tokens_per_batch: int) -> list[int]:
    """Where batches begin when each takes the next sequences as long as they fit.

    Args:
        lengths: tokens of each sequence, int64 [N].
        tokens_per_batch: the most tokens of a batch. A longer sequence is a batch by itself.

    Returns:
        The number of each batch's first sequence, ascending, and N at the end; [0] for none.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(ends):
        first = bounds[-1]
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + tokens_per_batch, side="right"))
        bounds.append(max(last, first + 1))
    return bounds


def to_device(arguments: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The arguments with every tensor on the device; towards a GPU pinned and without waiting."""
    device = torch.device(device)
    moved: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and device.type != "cpu":
            if device.type == "cuda":
                value = value.pin_memory()
            value = value.to(device, non_blocking=True)
        moved[name] = value
    return moved
