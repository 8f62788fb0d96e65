"""The next token: its probability, the most probable ones, or one that is drawn.

    p = softmax(logits);  drawn from softmax(log p / temperature), cut to top_k and top_p

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_RUN = 64  # columns whose maximum is taken before the best are sought


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut and renormalised.

    Attributes:
        temperature: below 1 prefers the probable tokens, above 1 the others.
        top_k: only so many of the most probable tokens (Fan et al. 2018); None: all.
        top_p: of these, the most probable ones whose sum first reaches top_p (Holtzman et al.
            2020); 1: all.
        seed: of the random numbers; a step's number is a function of (seed, number of the sequence,
            number of the sample, step).

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be positive and finite, not {self.temperature}; without chance: "
                "greedy, beam_size=1"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2^63 - 1, not {self.seed}")


def log_probabilities(logits: Tensor, never: Tensor) -> Tensor:
    """The model's, among all tokens; -inf for those that are never produced.

    A row that is -inf throughout stays so, where log_softmax would give NaN; a row that holds NaN
    or +inf is NaN throughout.

    Args:
        logits: [R, V].
        never: int64, each id once, on the device.

    Returns:
        float32 [R, V].
    """
    impossible = logits.amax(1, keepdim=True) == -math.inf
    log_p = logits.float().log_softmax(1).masked_fill_(impossible, -math.inf)
    log_p[:, never] -= math.inf  # not an assignment: NaN stays
    return log_p


def best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row and their columns, [R, count], largest first.

    Of equal ones the lower column comes first. In wide rows they are sought in the `count` best
    runs of columns, by largest value and then from the left: each run before that of a value holds
    one that comes before it.
    """
    if values.shape[1] < 4 * _RUN * count:
        return _best(values, count)
    runs = F.pad(values, (0, -values.shape[1] % _RUN), value=-math.inf).unflatten(1, (-1, _RUN))
    chosen = _best(runs.amax(2), count)[1].sort(dim=1).values
    sought = runs.gather(1, chosen[:, :, None].expand(-1, -1, _RUN)).flatten(1)
    largest, places = _best(sought, count)
    return largest, chosen.gather(1, places // _RUN) * _RUN + places % _RUN


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same over all columns.

    topk takes any of those that equal the least one; so from it comes the least value only, and the
    columns from a topk of numbers that all differ.
    """
    columns = values.shape[1]
    least = values.topk(count, dim=1).values[:, -1:]
    lower_first = torch.arange(columns, 0, -1, dtype=torch.int32, device=values.device)
    rank = lower_first * (values >= least) + columns * (values > least).int()
    places = rank.topk(count, dim=1).indices.sort(dim=1).values
    largest, order = values.gather(1, places).sort(dim=1, descending=True, stable=True)
    return largest, places.gather(1, order)


def draw(log_p: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """One token of each row: the first whose cumulative probability is above a uniform number.

    Args:
        log_p: [R, V], log-probabilities, or logits; -inf is never drawn.
        uniforms: float64 [R], multiples of 2^-53 in [0, 1).
        sampling: temperature and cuts. With top_k or top_p the tokens stand in the order of their
            probability, else in that of their ids.

    Returns:
        int64 [R]; of a row that is -inf throughout, any.
    """
    ids = None
    if sampling.top_k is not None:
        log_p, ids = best(log_p, min(sampling.top_k, log_p.shape[1]))
    elif sampling.top_p < 1:
        log_p, ids = log_p.sort(dim=1, descending=True, stable=True)
    p = (log_p.double() / sampling.temperature).softmax(1)
    if sampling.top_p < 1:
        p = p * (p.cumsum(1) - p < sampling.top_p)  # what comes before has not reached it
    cumulative = p.cumsum(1)
    # at most 1 - 2^-53 of the total: rounded, it stays below the total, so that one is above it
    target = uniforms[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=p.shape[1] - 1)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
