"""Batches of sentence pairs for translation, packed (Vaswani et al. 2017, section 5.1).

    source = pieces [SEP];    decoder's input = [CLS] pieces;    labels = pieces [SEP]

Pairs of like length come together and a batch has so many tokens, of sources and targets. The
batches of an epoch are a function of (pairs, tokenizer, seed, epoch), whatever computes them.

Legend: N pairs, E of a batch, B sequences of a part (a source and a target for each); Ts, Tt tokens
of their sources and targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from .features import check_max_length
from .packing import Ids, cumulative_lengths, fill_batches, positions, to_device
from .parallel_text import Pair
from .tokenizer import SpecialIds, vocabulary_digest

_BUCKET = 8  # pairs whose tokens are the same multiple of this are of like length
_CHUNK = 10_000  # texts tokenised at once


class TranslationData:
    """Sentence pairs as token ids.

    Args:
        pairs: texts and translations.
        tokenizer: of both languages, with BERT's special tokens.
        max_length: most tokens of a source or a target, its special token among them; pairs with
            more are left out.
        seed: of the batches, 0 or more.

    Attributes:
        pairs: those that are kept, N.
        left_out: how many are not.
        tokenizer: what was given.
        source_lengths, target_lengths: tokens of each source and target, int64 [N].

    Raises:
        ValueError: max_length or seed out of range, or special tokens are missing.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        max_length: int = 256,
        seed: int = 0,
    ) -> None:
        check_max_length(max_length, 2)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        self.tokenizer, self.seed = tokenizer, seed
        self.special = SpecialIds.of(tokenizer)
        self.pairs: list[Pair] = []
        sources: list[Ids] = []
        targets: list[Ids] = []
        for first in range(0, len(pairs), _CHUNK):
            chunk = pairs[first : first + _CHUNK]
            sides = (
                self._encode([p.source for p in chunk]),
                self._encode([p.target for p in chunk]),
            )
            for pair, source, target in zip(chunk, *sides, strict=True):
                if max(len(source), len(target)) <= max_length - 1:
                    self.pairs.append(pair)
                    sources.append(source)
                    targets.append(target)
        self.left_out = len(pairs) - len(self.pairs)
        self.source_lengths, self.target_lengths = (
            np.array([len(ids) + 1 for ids in side], dtype=np.int64) for side in (sources, targets)
        )
        end = np.array([self.special.sep], dtype=np.int64)
        self._sources, self._targets = (
            np.concatenate([end[:0], *(part for ids in side for part in (ids, end))])
            for side in (sources, targets)
        )
        self._source_starts = cumulative_lengths(self.source_lengths)
        self._target_starts = cumulative_lengths(self.target_lengths)

    def _encode(self, texts: list[str]) -> list[Ids]:
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def lengths(self) -> Ids:
        """Tokens of each pair, source and target together, [N]."""
        return self.source_lengths + self.target_lengths

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the token ids and the vocabulary."""
        digest = hashlib.sha256(vocabulary_digest(self.tokenizer).encode())
        for array in (self.source_lengths, self.target_lengths, self._sources, self._targets):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def batches(
        self, epoch: int, tokens_per_batch: int, start: int = 0
    ) -> Iterator[TranslationBatch]:
        """The batches of an epoch from number `start` on, in random order.

        Args:
            epoch: 0 or more.
            tokens_per_batch: most tokens, of sources and targets; a longer pair is a batch by
                itself.
            start: how many of the batches were had before.

        Raises:
            ValueError: tokens_per_batch is less than 1.
        """
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, not {tokens_per_batch}")
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = generator.permutation(len(self))
        order = shuffled[np.argsort(self.lengths[shuffled] // _BUCKET, kind="stable")]
        bounds = list(pairwise(fill_batches(self.lengths[order], tokens_per_batch)))
        for number in generator.permutation(len(bounds))[start:]:
            first, last = bounds[number]
            yield TranslationBatch(self, order[first:last])

    def packed_ids(self, examples: Ids) -> tuple[Ids, Ids, Ids]:
        """(source ids [Ts], decoder's input [Tt], labels [Tt]) of the given pairs, one behind the
        other."""
        source = self._sources[_places(self._source_starts, examples, self.source_lengths)]
        lengths = self.target_lengths[examples]
        labels = self._targets[_places(self._target_starts, examples, self.target_lengths)]
        target = np.roll(labels, 1)
        target[cumulative_lengths(lengths)[:-1]] = self.special.cls
        return source, target, labels


class TranslationBatch:
    """One step's pairs (a Batch of `packing`), in their order.

    Attributes:
        examples: their numbers in the data, int64 [E].
        source_lengths, target_lengths: tokens of each source and target, int64 [E].
    """

    def __init__(self, data: TranslationData, examples: Ids) -> None:
        self.data, self.examples = data, examples
        self.source_lengths = data.source_lengths[examples]
        self.target_lengths = data.target_lengths[examples]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> Ids:
        """Tokens of each pair, source and target together, [E]."""
        return self.source_lengths + self.target_lengths

    def part(self, first: int, last: int) -> PackedTranslationBatch:
        """Pairs first .. last - 1, with the dropout masks that they have in the whole batch."""
        return PackedTranslationBatch(self, first, last)


class PackedTranslationBatch:
    """What one process computes at once (a PackedBatch of `packing`).

    Attributes:
        tokens: Ts + Tt.
        sequences: B.
        targets: labels, Tt.
    """

    def __init__(self, batch: TranslationBatch, first: int, last: int) -> None:
        source, target, labels = batch.data.packed_ids(batch.examples[first:last])
        source_cu_seqlens, target_cu_seqlens = (
            cumulative_lengths(lengths[first:last]).astype(np.int32)
            for lengths in (batch.source_lengths, batch.target_lengths)
        )
        self.sequences = len(source_cu_seqlens) - 1
        self.targets = len(labels)
        self.tokens = len(source) + len(target)
        self._arrays = {
            "source_ids": source,
            "target_ids": target,
            "labels": labels,
            "source_cu_seqlens": source_cu_seqlens,
            "target_cu_seqlens": target_cu_seqlens,
        }
        self._numbers = {
            "source_max_seqlen": int(batch.source_lengths.max(initial=0)),
            "target_max_seqlen": int(batch.target_lengths.max(initial=0)),
            "sequence_offset": first,
        }

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments of Transformer's forward, on its device; a GPU is not waited for."""
        tensors = {name: torch.from_numpy(array) for name, array in self._arrays.items()}
        return to_device({**self._numbers, **tensors}, device)


def _places(starts: Ids, examples: Ids, lengths: Ids) -> Ids:
    """Where the tokens of the given texts stand among those of all."""
    own = lengths[examples]
    return np.repeat(starts[examples], own) + positions(own)
