"""What the serving classes share: any number of inputs, read in windows, computed without padding.

A window holds a bounded number of inputs. Its sequences are sorted by length, packed one behind
the other into batches under a token budget, computed, and put back into the order of the input.

Legend: B sequences of a batch, T their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bertkern.data.features import TokenSequence
from bertkern.data.packing import cumulative_lengths, to_device
from bertkern.data.text import HALF_PAIR, has_half_pair

Text = str | tuple[str, str]
Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOW = 1024  # inputs read ahead; enough for batches of nearly equal lengths
TOKENS_PER_BATCH = 16384
BATCH_SIZE = 64


class InputError(ValueError):
    """One input of many cannot be computed.

    Attributes:
        index: which, counted from 0 in the order of the input.
        reason: why.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"input {index}: {reason}")
        self.index, self.reason = index, reason


@dataclass(frozen=True)
class PackedTokens:
    """Sequences behind one another, on the model's device.

    Attributes:
        input_ids, token_type_ids: int64 [T].
        cu_seqlens: int32 [B + 1], 0 and the running sum of the lengths.
        max_seqlen: the longest length, or more.
        sequences: B.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def sequences(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a model's forward."""
        return {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
        }


def pack(sequences: Sequence[TokenSequence], device: torch.device) -> PackedTokens:
    """Put sequences behind one another; a GPU is not waited for."""
    lengths = np.array([len(sequence.input_ids) for sequence in sequences], dtype=np.int64)
    ids = chain.from_iterable(sequence.input_ids for sequence in sequences)
    types = chain.from_iterable(sequence.token_type_ids for sequence in sequences)
    tokens = int(lengths.sum())
    arrays = {
        "input_ids": np.fromiter(ids, np.int64, tokens),
        "token_type_ids": np.fromiter(types, np.int64, tokens),
        "cu_seqlens": cumulative_lengths(lengths).astype(np.int32),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return PackedTokens(**to_device(tensors, device), max_seqlen=int(lengths.max(initial=0)))


def windows(inputs: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """(index of the first, at most `size` inputs in order); reads no further than that."""
    first, window = 0, []
    for item in inputs:
        window.append(item)
        if len(window) == size:
            yield first, window
            first, window = first + size, []
    if window:
        yield first, window


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices by falling length, at most batch_size and TOKENS_PER_BATCH tokens a batch."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or tokens + lengths[i] > TOKENS_PER_BATCH):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def computed(
    sequences: Sequence[TokenSequence],
    compute: Callable[[Sequence[TokenSequence]], Iterable[Result]],
    batch_size: int,
) -> list[Result]:
    """One result a sequence, in the order of `sequences`.

    Args:
        sequences: of a window.
        compute: the results of the sequences of one batch, in its order.
        batch_size: at most so many sequences a batch.
    """
    results: dict[int, Result] = {}
    for batch in batches_by_length([len(s.input_ids) for s in sequences], batch_size):
        results.update(zip(batch, compute([sequences[i] for i in batch]), strict=True))
    return [results[i] for i in range(len(sequences))]


def length_limit(name: str, value: int | None, positions: int) -> int:
    """The most tokens of a sequence, special ones included: `value`, or all positions for None.

    Raises:
        ValueError: `value` leaves no room for a word, or is more than the positions.
    """
    if value is None:
        return positions
    if not 2 < value <= positions:
        raise ValueError(f"{name} must be in 3..{positions}, the positions, not {value}")
    return value


def cutting_tokenizer(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    """A copy that does not pad and that cuts to `max_length` tokens, of a pair the longer text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.enable_truncation(max_length)
    return copy


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[Text], first: int
) -> tuple[list[TokenSequence], list[bool]]:
    """The sequences of texts, or of pairs of texts, and which of them have been cut.

    Args:
        tokenizer: of `cutting_tokenizer`.
        texts: a window of the input.
        first: index of its first text in the whole input, for errors.

    Raises:
        TypeError: neither a string nor a pair of strings.
        InputError: a text holds half of a surrogate pair, which no text encoding has.
    """
    for index, text in enumerate(texts, start=first):
        for part in text if isinstance(text, tuple) else (text,):
            check_text(part, index)
    encodings = tokenizer.encode_batch(list(texts))
    return (
        [TokenSequence(encoding.ids, encoding.type_ids) for encoding in encodings],
        [bool(encoding.overflowing) for encoding in encodings],
    )


def check_text(text: object, index: int) -> None:
    """Raise as `tokenize` unless `text`, of the input's `index`, is a string of characters."""
    if not isinstance(text, str):
        raise TypeError(f"input {index}: texts must be strings, not {type(text).__name__}")
    if has_half_pair(text):
        raise InputError(index, f"the text {HALF_PAIR}")


def check_stream(texts: object, batch_size: int, window: int = 1) -> None:
    """Raise TypeError for one string in place of many, ValueError for a size below 1."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, not one string")
    for name, value in (("batch_size", batch_size), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
