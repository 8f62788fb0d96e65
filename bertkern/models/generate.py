"""The target sequences that a decoder finds probable: greedy, beam search, sampling.

    score(Y) = log p(Y) / lp(|Y|),   lp(n) = ((5 + n) / 6)^alpha     (Wu et al. 2016, equation 14)

|Y| counts the end token. The model is asked for the next token's logits of all rows at a time, and
knows nothing of the search. What is decided stands on the host: each step waits for the device
once, for a few numbers a row.

A sequence's result is a function of its own logits, and of (seed, its number) where it is sampled:
each one stops on its own and leaves the batch.

Legend: B sequences, K rows of each (beams or samples), R = B · K rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bertkern.data.packing import Ids, to_device
from bertkern.data.random_bits import derive, uniform

from .next_token import Sampling, best, draw, log_probabilities

ROOM = 50  # tokens that a target may have more than its source (Vaswani et al. 2017, section 6.1)

Floats = NDArray[np.float64]


class State(Protocol):
    """What a decoder keeps between two steps."""

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from where row rows[r] is, a row of the same sequence; int64 [R]."""

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences, in this order; int64 [B']."""


StateType = TypeVar("StateType", bound=State)
Source = TypeVar("Source", contravariant=True)


class Decoder(Protocol[Source, StateType]):
    """What the search asks of a model."""

    def start_decoding(self, source: Source, beams: int) -> StateType:
        """The state before the first token; row r is row r % beams of sequence r // beams."""

    def decode_step(self, tokens: Tensor, state: StateType) -> Tensor:
        """One token more of each row, int64 [R] -> logits of the next one [R, V]."""


@dataclass(frozen=True)
class TargetTokens:
    """The token ids with a meaning.

    Attributes:
        start: comes before every target and is not part of it.
        end: ends a target.
        never: are not produced, whatever their probability; each once.
    """

    start: int
    end: int
    never: tuple[int, ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """A target that was found.

    Attributes:
        ids: its tokens, without start and end.
        score: log_probability divided by the length penalty.
        log_probability: of its tokens, the end token among them; natural logarithm.
        finished: the model ended it; else it was cut at the limit.
    """

    ids: list[int]
    score: float
    log_probability: float
    finished: bool


def penalty(length: ArrayLike, alpha: float) -> Floats:
    """lp(length), of one length or of many: 1 for one token, and for alpha = 0."""
    return ((5.0 + np.asarray(length, dtype=np.float64)) / 6.0) ** alpha


def length_limits(source_lengths: Sequence[int], max_length: int | None = None) -> list[int]:
    """The most tokens of each target, its end among them: max_length, or its source's and ROOM.

    Raises:
        ValueError: max_length is less than 1.
    """
    if max_length is None:
        return [length + ROOM for length in source_lengths]
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, or None, not {max_length}")
    return [max_length] * len(source_lengths)


def check_search(
    beam_size: int, length_penalty: float, num: int, sampling: Sampling | None = None
) -> None:
    """Raise ValueError where `generate` cannot search so."""
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, not {beam_size}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be 0 or more and finite, not {length_penalty}")
    most = math.inf if sampling else beam_size
    if not 1 <= num <= most:
        allowed = "at least 1" if sampling else f"in 1..{beam_size}, the beam size"
        raise ValueError(f"num must be {allowed}, not {num}")


def _checked(limits: Sequence[int]) -> Ids:
    """The limits, [B], each 1 or more."""
    limit = np.array(limits, dtype=np.int64)
    if limit.size and limit.min() < 1:
        raise ValueError(f"limits must be at least 1, not {limit.min()}")
    return limit


def generate(
    model: Decoder[Source, StateType],
    source: Source,
    limits: Sequence[int],
    tokens: TargetTokens,
    *,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    num: int = 1,
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """Targets of B sources: by beam search, greedily for a beam of 1, or by sampling.

    Args:
        model: steps through the targets.
        source: B sources, as model.start_decoding takes them.
        limits: [B], the most tokens of each target, its end among them (`length_limits`).
        tokens: start, end, and what is never produced.
        beam_size: hypotheses that live at once; of no effect when sampling.
        length_penalty: alpha, 0 or more; 0 ranks by probability alone.
        num: hypotheses of each source, at most beam_size unless sampling.
        sampling: draw `num` targets in place of searching the best.
        numbers: [B], of each source in the whole input, for sampling; None: 0, 1, ...
        device: of the model.

    Returns:
        For each source at most `num`, the finished ones first, each sort best first.

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: the model's logits hold NaN, or +inf.
    """
    check_search(beam_size, length_penalty, num, sampling)
    if sampling is not None:
        return sample(
            model, source, limits, tokens, sampling, numbers, length_penalty, num, device=device
        )
    if beam_size == 1:
        return greedy(model, source, limits, tokens, length_penalty, device=device)
    return beam_search(model, source, limits, tokens, beam_size, length_penalty, num, device=device)


def beam_search(
    model: Decoder[Source, StateType],
    source: Source,
    limits: Sequence[int],
    tokens: TargetTokens,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    num: int = 1,
    *,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """The best-scored hypotheses that a beam comes upon; arguments as `generate`.

    A step extends every living hypothesis by every token. Those of the beam_size best extensions
    that end are finished; the beam_size best that do not end live on. Of equal ones the lower token
    comes first, then the better parent.

    A sequence's search ends when no living hypothesis can still be among the best `num`. Log p only
    falls, and it is negative, so nothing that grows out of a hypothesis scores above its log p now
    divided by the largest penalty in reach, which for alpha >= 0 is that of the limit. Going on
    would therefore change nothing: the end is exact. What has not ended at the limit is cut, and
    given only where fewer than `num` are finished.
    """
    check_search(beam_size, length_penalty, num)
    found = _Finished(len(limits), num, length_penalty)
    limit = _checked(limits)
    sequences = np.arange(len(limits))  # [B], those that are still searched
    log_p = np.full((len(limits), beam_size), -np.inf)  # [B, K], best first; -inf is dead
    log_p[:, :1] = 0.0  # all rows begin alike: one of them lives
    prefixes = np.full((len(limits), beam_size, 1), tokens.start)  # [B, K, 1 + length]
    never = _tensor(np.array(tokens.never, dtype=np.int64), device)
    state = model.start_decoding(source, beam_size)
    length = 0
    while sequences.size:
        newest = _tensor(prefixes[:, :, -1].reshape(-1), device)
        next_log_p = log_probabilities(model.decode_step(newest, state), never)
        length += 1
        # of one row, beam_size extensions and an end are enough to have the best of all rows
        values, ids = _to_host(*best(next_log_p, min(beam_size + 1, next_log_p.shape[1])))
        ranked = _ranked(log_p, values, ids)
        ends = ranked.tokens == tokens.end
        for b, place in np.argwhere(ends[:, :beam_size] & (ranked.log_p[:, :beam_size] > -np.inf)):
            prefix = prefixes[b, ranked.parents[b, place], 1:]
            found.add(sequences[b], prefix, ranked.log_p[b, place], length)

        alive = np.argsort(ends, axis=1, kind="stable")[:, :beam_size]
        log_p = np.take_along_axis(ranked.log_p, alive, 1)
        parents = np.take_along_axis(ranked.parents, alive, 1)
        chosen = np.take_along_axis(ranked.tokens, alive, 1)
        prefixes = np.take_along_axis(prefixes, parents[:, :, None], 1)
        prefixes = np.concatenate((prefixes, chosen[:, :, None]), axis=2)

        at_limit = length >= limit[sequences]
        for b in np.flatnonzero(at_limit):
            found.fill_up(sequences[b], prefixes[b, :, 1:], log_p[b], length)
        reachable = log_p[:, 0] / penalty(limit[sequences], length_penalty)
        stay = np.flatnonzero(~at_limit & (reachable > found.least[sequences]))
        if len(stay) < len(sequences):
            sequences, parents = sequences[stay], parents[stay]
            log_p, prefixes = log_p[stay], prefixes[stay]
            if len(stay):
                state.select(_tensor(stay, device))
        if (parents != np.arange(beam_size)).any():
            first = beam_size * np.arange(len(sequences))[:, None]
            state.reorder(_tensor((first + parents).reshape(-1), device))
    return found.hypotheses


def greedy(
    model: Decoder[Source, StateType],
    source: Source,
    limits: Sequence[int],
    tokens: TargetTokens,
    length_penalty: float = 0.6,
    *,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """The most probable token at each step, of equal ones the lower; arguments as `generate`."""
    check_search(1, length_penalty, 1)

    def most_probable(log_p: Tensor, sequences: Ids, step: int) -> Tensor:
        return log_p.argmax(1)

    return _walk(model, source, limits, tokens, most_probable, length_penalty, 1, device)


def sample(
    model: Decoder[Source, StateType],
    source: Source,
    limits: Sequence[int],
    tokens: TargetTokens,
    sampling: Sampling,
    numbers: Sequence[int] | None = None,
    length_penalty: float = 0.6,
    num: int = 1,
    *,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """`num` targets of each source, drawn independently; arguments as `generate`.

    Their scores are of the model's own probabilities, whatever the temperature and the cuts.
    """
    check_search(1, length_penalty, num, sampling)
    if numbers is not None and len(numbers) != len(limits):
        raise ValueError(
            f"numbers must be one for each of {len(limits)} sources, not {len(numbers)}"
        )
    numbered = np.arange(len(limits)) if numbers is None else np.asarray(numbers, dtype=np.int64)
    keys = derive(derive(sampling.seed, numbered)[:, None], np.arange(num))  # [B, K]

    def drawn(log_p: Tensor, sequences: Ids, step: int) -> Tensor:
        uniforms = uniform(derive(keys[sequences].reshape(-1), step))
        return draw(log_p, _tensor(uniforms, device), sampling)

    return _walk(model, source, limits, tokens, drawn, length_penalty, num, device)


def _walk(
    model: Decoder[Source, StateType],
    source: Source,
    limits: Sequence[int],
    tokens: TargetTokens,
    choose: Callable[[Tensor, Ids, int], Tensor],
    length_penalty: float,
    num: int,
    device: torch.device | str,
) -> list[list[Hypothesis]]:
    """Go on with one chosen token after another.

    Args:
        choose: (log-probabilities [R, V], which sequences [B], step) -> tokens [R].
    """
    shape = (len(limits), num)
    limit = _checked(limits)
    sequences = np.arange(len(limits))  # [B], those that have not all ended
    log_p, length = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    going, finished = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
    history: list[Ids] = []  # of each step, [B, K] of all sequences
    newest = np.full(shape, tokens.start)
    never = _tensor(np.array(tokens.never, dtype=np.int64), device)
    state = model.start_decoding(source, num)
    while sequences.size:
        logits = model.decode_step(_tensor(newest[sequences].reshape(-1), device), state)
        next_log_p = log_probabilities(logits, never)
        chosen = choose(next_log_p, sequences, len(history))[:, None]
        values, ids = _to_host(next_log_p.gather(1, chosen), chosen)
        values, ids = values.reshape(-1, num), ids.reshape(-1, num)
        newest = np.full(shape, tokens.end)
        newest[sequences] = ids
        history.append(newest)
        # where nothing is possible a target stops, unfinished, before this token
        goes = going[sequences] & (values > -np.inf)
        log_p[sequences] += np.where(goes, values, 0.0)
        length[sequences] += goes
        finished[sequences] |= goes & (ids == tokens.end)
        going[sequences] = goes & (ids != tokens.end)
        stay = going[sequences].any(axis=1) & (len(history) < limit[sequences])
        if not stay.all():
            sequences = sequences[stay]
            if sequences.size:
                state.select(_tensor(np.flatnonzero(stay), device))
    scores = log_p / penalty(length, length_penalty)
    found = []
    for b in range(len(limits)):
        hypotheses = [
            Hypothesis(
                [int(step[b, k]) for step in history[: length[b, k] - finished[b, k]]],
                float(scores[b, k]),
                float(log_p[b, k]),
                bool(finished[b, k]),
            )
            for k in range(num)
        ]
        found.append(sorted(hypotheses, key=lambda h: (not h.finished, -h.score)))
    return found


class _Finished:
    """The best `num` finished hypotheses of each sequence.

    Attributes:
        hypotheses: of each sequence, best first; of equal ones the one that was found first.
        least: [B], the score that one more must be above; -inf as long as there are fewer.
    """

    def __init__(self, sequences: int, num: int, length_penalty: float) -> None:
        self.hypotheses: list[list[Hypothesis]] = [[] for _ in range(sequences)]
        self.least = np.full(sequences, -np.inf)
        self._num, self._alpha = num, length_penalty

    def add(self, sequence: int, ids: Ids, log_p: float, length: int) -> None:
        """A hypothesis that has ended, with `length` tokens."""
        found = self.hypotheses[sequence]
        found.append(self._hypothesis(ids, log_p, length, finished=True))
        found.sort(key=lambda h: -h.score)
        del found[self._num :]
        if len(found) == self._num:
            self.least[sequence] = found[-1].score

    def fill_up(self, sequence: int, prefixes: Ids, log_p: Floats, length: int) -> None:
        """Those that have been cut, best first; behind the finished ones while there is room."""
        found = self.hypotheses[sequence]
        for ids, value in zip(prefixes, log_p, strict=True):
            if len(found) < self._num and value > -np.inf:
                found.append(self._hypothesis(ids, value, length, finished=False))

    def _hypothesis(self, ids: Ids, log_p: float, length: int, finished: bool) -> Hypothesis:
        score = float(log_p / penalty(length, self._alpha))
        return Hypothesis(ids.tolist(), score, float(log_p), finished)


@dataclass(frozen=True)
class _Ranked:
    """Extensions of a sequence's living hypotheses, best first; all [B, candidates]."""

    log_p: Floats
    parents: Ids
    tokens: Ids


def _ranked(log_p: Floats, steps: Floats, ids: Ids) -> _Ranked:
    """Rank extensions.

    Args:
        log_p: [B, K], of the hypotheses.
        steps: [R, C], of each row's best C tokens.
        ids: [R, C], these tokens.
    """
    batch, beams = log_p.shape
    extended = np.repeat(log_p, steps.shape[1], axis=1) + steps.reshape(batch, -1)
    parents = np.broadcast_to(np.repeat(np.arange(beams), steps.shape[1]), extended.shape)
    tokens = ids.reshape(batch, -1)
    order = np.lexsort((parents, tokens, -extended), axis=1)
    return _Ranked(
        np.take_along_axis(extended, order, 1),
        np.take_along_axis(parents, order, 1),
        np.take_along_axis(tokens, order, 1),
    )


def _to_host(values: Tensor, ids: Tensor) -> tuple[Floats, Ids]:
    """Both in one transfer: the step's one wait for the device."""
    both = torch.stack((values.double(), ids.double())).cpu().numpy()
    if np.isnan(both[0]).any():
        raise FloatingPointError("the model's logits hold NaN or +inf: no token can be chosen")
    return both[0], both[1].astype(np.int64)


def _tensor(array: NDArray[np.generic], device: torch.device | str) -> Tensor:
    """The array on the device, which is not waited for."""
    tensor: Tensor = to_device({"it": torch.from_numpy(np.ascontiguousarray(array))}, device)["it"]
    return tensor
