"""CUDA-graph replay of small packed batches, whose many short kernels cost more to launch than run.

A graph is recorded once for a budget of T tokens and B sequences and replayed for every batch that
fits: its tokens are filled up to T, past the last sequence, and its cu_seqlens up to B + 1 by empty
sequences. Packed forwards never wait for the GPU and no sequence depends on its neighbours, so
what is filled in changes nothing.

Legend: B sequences, T tokens, of the batch or of the budget.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .serving import PackedTokens

SMALLEST_BUDGET, LARGEST_BUDGET = 64, 2048  # tokens; a budget is a power of two between
SEQUENCES = 32  # of every budget; fewer than SMALLEST_BUDGET, so that an output tells which it is
_WARM_UPS = 3  # before recording, for what a first call sets up (as torch's documentation has it)

Outputs = tuple[Tensor, ...]
Forward = Callable[[PackedTokens], Outputs]


def token_budget(batch: PackedTokens) -> int | None:
    """The budget of the graph for this batch, or None when it is too large for one."""
    tokens = batch.input_ids.shape[0]
    if not 0 < tokens <= LARGEST_BUDGET or batch.sequences > SEQUENCES:
        return None
    return max(SMALLEST_BUDGET, 1 << (tokens - 1).bit_length())


def empty_budget(tokens: int, max_seqlen: int, device: torch.device) -> PackedTokens:
    """A batch of `tokens` filled-in tokens and SEQUENCES empty sequences."""
    return PackedTokens(
        torch.zeros(tokens, dtype=torch.int64, device=device),
        torch.zeros(tokens, dtype=torch.int64, device=device),
        torch.zeros(SEQUENCES + 1, dtype=torch.int32, device=device),
        max_seqlen,
    )


def fill(budget: PackedTokens, batch: PackedTokens) -> None:
    """Copy a batch into a budget; what it does not use is filled in."""
    tokens = batch.input_ids.shape[0]
    budget.input_ids.zero_()[:tokens].copy_(batch.input_ids)
    budget.token_type_ids.zero_()[:tokens].copy_(batch.token_type_ids)
    budget.cu_seqlens.fill_(tokens)[: batch.sequences + 1].copy_(batch.cu_seqlens)


def used(outputs: Outputs, batch: PackedTokens) -> Outputs:
    """The batch's part of a budget's outputs, [T, ...] or [B, ...], as copies."""
    tokens = batch.input_ids.shape[0]
    return tuple(
        x[: batch.sequences if x.shape[0] == SEQUENCES else tokens].clone() for x in outputs
    )


def record(forward: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """(the outputs' memory, what computes them anew): a CUDA graph of `forward`."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            forward()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()
    return outputs, graph.replay


class ReplayedForward:
    """A forward of packed batches that replays CUDA graphs where the batch is small and on a GPU.

    Call it from one CUDA stream at a time. A graph holds for the weights' memory: weights changed
    in place count at once; when they have moved (to another device or dtype), graphs are recorded
    anew.

    Args:
        model: whose parameters `forward` reads.
        forward: outputs [T, ...] or [B, ...] of a batch, without waiting for the GPU.
        longest: max_position_embeddings.
    """

    def __init__(self, model: nn.Module, forward: Forward, longest: int) -> None:
        self.model, self.forward, self.longest = model, forward, longest
        self._graphs: dict[int, tuple[PackedTokens, Outputs, Callable[[], None]]] = {}
        self._weights: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self._usable = True

    def __call__(self, batch: PackedTokens) -> Outputs:
        """The outputs of a batch."""
        budget = token_budget(batch) if batch.input_ids.device.type == "cuda" else None
        if budget is None or not self._usable:
            return self.forward(batch)
        with self._lock, torch.cuda.device(batch.input_ids.device):
            try:
                return self.replayed(batch, budget)
            except RuntimeError as error:
                self._usable = False
                reason = str(error).splitlines()[0]
                warnings.warn(f"computing without a CUDA graph: {reason}", stacklevel=2)
        return self.forward(batch)

    def replayed(self, batch: PackedTokens, budget: int) -> Outputs:
        """The outputs of a batch, by the graph for `budget` tokens, recorded if need be."""
        weights = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        if weights != self._weights:
            self._graphs.clear()
            self._weights = weights
        if budget not in self._graphs:
            filled = empty_budget(budget, min(budget, self.longest), batch.input_ids.device)
            fill(filled, batch)
            self._graphs[budget] = (filled, *record(lambda: self.forward(filled)))
        filled, outputs, replay = self._graphs[budget]
        fill(filled, batch)
        replay()
        return used(outputs, batch)
