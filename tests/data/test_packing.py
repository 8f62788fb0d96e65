"""Packing: where sequences and batches begin, and arguments on their device."""

import numpy as np
import torch

from bertkern.data.packing import cumulative_lengths, fill_batches, positions, to_device


def greedy(lengths, budget):
    bounds, total = [0], 0
    for i, length in enumerate(lengths):
        if total and total + length > budget:
            bounds.append(i)
            total = 0
        total += length
    return [*bounds, len(lengths)] if len(lengths) else bounds


def test_batches_are_filled_as_long_as_sequences_fit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 30, rng.integers(0, 50))
        budget = int(rng.integers(1, 100))
        assert fill_batches(lengths, budget) == greedy(lengths.tolist(), budget)
    assert fill_batches(np.array([5, 5, 20, 1]), 10) == [0, 2, 3, 4]


def test_positions():
    lengths = np.array([3, 1, 2])
    assert cumulative_lengths(lengths).tolist() == [0, 3, 4, 6]
    assert positions(lengths).tolist() == [0, 1, 2, 0, 0, 1]
    assert cumulative_lengths(np.zeros(0, dtype=np.int64)).tolist() == [0]


def test_arguments_go_to_their_device():
    tensor = torch.arange(3)
    moved = to_device({"input_ids": tensor, "max_seqlen": 3}, "cpu")
    assert moved["input_ids"] is tensor
    assert moved["max_seqlen"] == 3
    assert to_device({"input_ids": tensor}, "meta")["input_ids"].device.type == "meta"
