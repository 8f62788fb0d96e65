"""Examples of a fine-tuning task as token ids, and their batches, packed without padding.

    [CLS] A [SEP]    or    [CLS] A [SEP] B [SEP], type 1 from B on

An example is one sequence, or C of them where one of C choices is right. Labels belong to an
example (a class, a span) or to each token. The order of an epoch is a function of (seed, epoch).

Legend: E examples, C sequences of each, R = E·C sequences, N their tokens; B, T those of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .packing import Ids, cumulative_lengths, fill_batches, positions, to_device
from .tokenizer import SpecialIds


class TokenSequence(NamedTuple):
    """One sequence of a model's input."""

    input_ids: list[int]
    token_type_ids: list[int]


def sequence_of(first: list[int], second: list[int] | None, special: SpecialIds) -> TokenSequence:
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP]; nothing is cut."""
    ids = [special.cls, *first, special.sep]
    types = [0] * len(ids)
    if second is not None:
        ids += [*second, special.sep]
        types += [1] * (len(second) + 1)
    return TokenSequence(ids, types)


def kept_of_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept, so that together they are at most `room`.

    The longer text loses tokens until both have half of the room, then both do (the rule
    "longest_first" of `tokenizers`).
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    longer = room - shorter
    return (shorter, longer) if first <= second else (longer, shorter)


def check_max_length(max_length: int, least: int) -> None:
    """Raise ValueError where sequences of max_length tokens have no room for any text."""
    if max_length < least:
        raise ValueError(f"max_length must be at least {least}, not {max_length}")


@dataclass(frozen=True)
class Features:
    """Sequences behind one another: sequence r owns tokens starts[r] .. starts[r + 1] - 1.

    Attributes:
        input_ids, token_type_ids: int64 [N].
        starts: int64 [R + 1].
        choices: C; example e owns sequences e·C .. e·C + C - 1.
        example_labels: by the name of the model's argument, arrays [E, ...].
        token_labels: likewise, arrays [N].
    """

    input_ids: Ids
    token_type_ids: Ids
    starts: Ids
    choices: int = 1
    example_labels: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    token_labels: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: Iterable[TokenSequence], **others: Any) -> Features:
        """From sequences one by one; `others` are the attributes from `choices` on."""
        ids: list[int] = []
        types: list[int] = []
        starts = [0]
        for sequence in sequences:
            ids += sequence.input_ids
            types += sequence.token_type_ids
            starts.append(len(ids))
        ids_N, types_N, starts_R = (np.array(v, dtype=np.int64) for v in (ids, types, starts))
        return cls(ids_N, types_N, starts_R, **others)

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.choices

    @cached_property
    def lengths(self) -> Ids:
        """Tokens of each example, [E]."""
        return np.diff(self.starts[:: self.choices])

    @cached_property
    def sequence_lengths(self) -> Ids:
        """Tokens of each sequence, [R]."""
        return np.diff(self.starts)

    def batches(
        self, epoch: int, batch_size: int, seed: int, shuffle: bool = True, start: int = 0
    ) -> Iterator[FeatureBatch]:
        """The batches of an epoch from number `start` on; the last one may be smaller.

        Raises:
            ValueError: batch_size is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        order = np.arange(len(self))
        if shuffle:
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
        for first in range(start * batch_size, len(order), batch_size):
            yield FeatureBatch(self, order[first : first + batch_size])

    def evaluation_batches(self, tokens_per_batch: int) -> Iterator[FeatureBatch]:
        """Every example once, the short ones first, as many together as the budget holds."""
        lengths = self.lengths
        order = np.argsort(lengths, kind="stable")
        for first, last in pairwise(fill_batches(lengths[order], tokens_per_batch)):
            yield FeatureBatch(self, order[first:last])


@dataclass(frozen=True)
class FeatureBatch:
    """One batch (a Batch of `packing`): the given examples, in their order."""

    features: Features
    examples: Ids

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> Ids:
        """Tokens of each example, [E]."""
        return self.features.lengths[self.examples]

    @property
    def sequence_lengths(self) -> Ids:
        """Tokens of each sequence of the batch, [B]."""
        return self.features.sequence_lengths[self._sequences(0, len(self))]

    def part(self, first: int, last: int) -> PackedFeatures:
        """Examples first .. last - 1, with the dropout masks that they have in the whole batch."""
        choices = self.features.choices
        longest = self.sequence_lengths.max(initial=0)
        return PackedFeatures(
            self.features,
            self.examples[first:last],
            self._sequences(first, last),
            max_seqlen=int(longest),
            sequence_offset=first * choices,
        )

    def _sequences(self, first: int, last: int) -> Ids:
        choices = self.features.choices
        return (self.examples[first:last, None] * choices + np.arange(choices)).reshape(-1)


class PackedFeatures:
    """What one process computes at once (a PackedBatch of `packing`).

    Attributes:
        examples: [E], their numbers in the features.
        lengths: tokens of each of the B sequences.
        tokens, sequences: T and E.
        places: [T], where the tokens stand in the features.
    """

    def __init__(
        self, features: Features, examples: Ids, rows: Ids, max_seqlen: int, sequence_offset: int
    ) -> None:
        self.examples = examples
        self.lengths = features.sequence_lengths[rows]
        self.sequences = len(examples)
        cu_seqlens = cumulative_lengths(self.lengths)
        self.tokens = int(cu_seqlens[-1])
        position_ids = positions(self.lengths)
        self.places = np.repeat(features.starts[rows], self.lengths) + position_ids
        self._labels = {
            **{name: values[examples] for name, values in features.example_labels.items()},
            **{name: values[self.places] for name, values in features.token_labels.items()},
        }
        self._arrays = {
            "input_ids": features.input_ids[self.places],
            "token_type_ids": features.token_type_ids[self.places],
            "position_ids": position_ids,
            "cu_seqlens": cu_seqlens.astype(np.int32),
            **self._labels,
        }
        self._numbers = {"max_seqlen": max_seqlen, "sequence_offset": sequence_offset}
        if features.choices > 1:
            self._numbers["num_choices"] = features.choices

    def label(self, name: str) -> NDArray[Any]:
        """The labels of that name, of the examples or of the tokens of this part."""
        return self._labels[name]

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments for the model, on its device; a GPU is not waited for."""
        tensors = {name: torch.from_numpy(array) for name, array in self._arrays.items()}
        return to_device({**self._numbers, **tensors}, device)
