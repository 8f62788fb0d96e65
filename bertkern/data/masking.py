"""Which tokens are predicted, and what stands in their place (Devlin et al. 2018, appendix A).

    15 % of a sequence's tokens are chosen, one at least and at most a limit: 80 % of them become
    [MASK], 10 % a random ordinary token, 10 % stay; [CLS] and [SEP] are never chosen
    whole-word masking chooses words in random order and masks all pieces of each; a word that
    would exceed the number to choose is passed over

Choices are a function of a sequence's tokens and its key, so they do not depend on the batch.

Legend: B sequences, S the longest of them, T their tokens, W words, V vocabulary size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .packing import Ids, cumulative_lengths, positions
from .random_bits import Bits, below, derive, uniform
from .tokenizer import SpecialIds, continuation_ids

LONGEST = 1 << 16  # tokens of a sequence whose place fits in the low bits of a rank
_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)
# What is drawn below a sequence's key; `pairs` draws below 0..7.
_RANK, _FATE, _REPLACEMENT = 8, 9, 10


@dataclass(frozen=True)
class MaskingSettings:
    """How examples are made.

    Attributes:
        max_length: tokens of a sequence, special ones included.
        masked_fraction: part of the tokens that is predicted; at least one of a sequence is.
        max_predictions: at most so many in a sequence; None for masked_fraction of max_length,
            rounded up. A run's part with longer sequences has so many more as they are longer.
        short_sequence_probability: how often a pair aims at a random shorter length.
        whole_word: mask all pieces of a word together.
        static_masks: the same pairs and masks in every epoch; else they are drawn anew.
        duplication: how often an epoch uses each document, with other pairs and masks each time.
    """

    max_length: int = 128
    masked_fraction: float = 0.15
    max_predictions: int | None = None
    short_sequence_probability: float = 0.1
    whole_word: bool = False
    static_masks: bool = False
    duplication: int = 1

    def __post_init__(self) -> None:
        if not 8 <= self.max_length < LONGEST:
            raise ValueError(
                f"max_length must be at least 8 and below {LONGEST}, not {self.max_length}"
            )
        for name in ("masked_fraction", "short_sequence_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)}")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise ValueError(f"max_predictions must be at least 1, not {self.max_predictions}")
        if self.duplication < 1:
            raise ValueError(f"duplication must be at least 1, not {self.duplication}")

    def with_length(self, max_length: int) -> MaskingSettings:
        """For sequences of another length: a given max_predictions grows with it (20 -> 80)."""
        most = self.max_predictions
        if most is not None:
            most = max(1, math.ceil(most * max_length / self.max_length))
        return replace(self, max_length=max_length, max_predictions=most)

    @property
    def prediction_limit(self) -> int:
        """The most predictions of one sequence."""
        if self.max_predictions is not None:
            return self.max_predictions
        return max(1, int(np.ceil(self.masked_fraction * self.max_length)))


class Masker:
    """Masks sequences of a vocabulary.

    Args:
        tokenizer: with BERT's special tokens.
        settings: how many are masked, and whether by whole words.

    Raises:
        ValueError: nothing in the vocabulary besides special tokens, or whole words are asked for
            and the tokenizer does not say where they begin.
    """

    def __init__(self, tokenizer: Tokenizer, settings: MaskingSettings) -> None:
        self.special = SpecialIds.of(tokenizer)
        self.settings = settings
        self.ordinary_ids = np.setdiff1d(
            np.arange(tokenizer.get_vocab_size()), self.special.as_tuple()
        )
        if not len(self.ordinary_ids):
            raise ValueError("the vocabulary has special tokens only")
        self._never = np.zeros(tokenizer.get_vocab_size(), dtype=np.bool_)
        self._never[[self.special.pad, self.special.cls, self.special.sep, self.special.mask]] = (
            True
        )
        self._continuation = continuation_ids(tokenizer) if settings.whole_word else None

    def mask(self, original: Ids, lengths: Ids, keys: Bits) -> tuple[Ids, NDArray[np.bool_]]:
        """(input ids with masks [T], which tokens are predicted [T]).

        Args:
            original: int64 [T], sequences behind one another.
            lengths: tokens of each, int64 [B].
            keys: of each, uint64 [B].
        """
        settings = self.settings
        wanted = np.rint(lengths * settings.masked_fraction).astype(np.int64)
        wanted = np.clip(wanted, 1, settings.prediction_limit)
        if self._continuation is None:
            masked = self._choose_tokens(original, lengths, derive(keys, _RANK), wanted)
        else:
            masked = self._choose_words(original, lengths, derive(keys, _RANK), wanted)
        places = np.flatnonzero(masked)
        sequence = np.repeat(np.arange(len(lengths)), lengths)[places]
        position = positions(lengths)[places]
        fate = uniform(derive(derive(keys, _FATE)[sequence], position))
        drawn = below(
            derive(derive(keys, _REPLACEMENT)[sequence], position), len(self.ordinary_ids)
        )
        input_ids = original.copy()
        input_ids[places[fate < 0.8]] = self.special.mask
        is_random = (fate >= 0.8) & (fate < 0.9)
        input_ids[places[is_random]] = self.ordinary_ids[drawn[is_random]]
        return input_ids, masked

    def _choose_tokens(
        self, original: Ids, lengths: Ids, keys: Bits, wanted: Ids
    ) -> NDArray[np.bool_]:
        """Those with the `wanted` lowest random ranks of each sequence, [T]."""
        place = np.arange(lengths.max(initial=0))  # [S]
        inside = place < lengths[:, None]  # [B, S]
        candidate = inside.copy()
        candidate[inside] = ~self._never[original]
        # ranks of a sequence differ, as each ends with the token's place
        low = np.uint64(LONGEST - 1)
        rank = derive(keys[:, None], place) & ~low | place.astype(np.uint64)
        rank[~candidate] = _LAST
        limit = np.sort(rank, axis=1)[np.arange(len(lengths)), wanted - 1]
        return ((rank <= limit[:, None]) & candidate)[inside]

    def _choose_words(
        self, original: Ids, lengths: Ids, keys: Bits, wanted: Ids
    ) -> NDArray[np.bool_]:
        """Whole words in random order as long as they fit into `wanted`, [T]."""
        assert self._continuation is not None
        never = self._never[original]
        opens = ~self._continuation[original] | never  # a special token is a word by itself,
        opens[1:] |= never[:-1]  # and another word begins behind it
        starts = np.flatnonzero(opens)
        sizes = np.diff(starts, append=len(original))
        starts, sizes = starts[~never[starts]], sizes[~never[starts]]  # [W]
        cu_seqlens = cumulative_lengths(lengths)
        sequence = np.searchsorted(cu_seqlens, starts, side="right") - 1
        rank = derive(keys[sequence], starts - cu_seqlens[sequence])
        order = np.lexsort((rank, sequence))
        starts, sizes = starts[order], sizes[order]
        words = np.bincount(sequence, minlength=len(lengths))  # of each sequence
        begin = np.cumsum(words) - words
        chosen = np.zeros(len(starts), dtype=np.bool_)
        room = wanted.copy()
        for number in range(words.max(initial=0)):  # the word of this number of every sequence
            open_ = np.flatnonzero((number < words) & (room > 0))
            if not len(open_):
                break
            word = begin[open_] + number
            fits = sizes[word] <= room[open_]
            chosen[word[fits]] = True
            room[open_[fits]] -= sizes[word[fits]]
        masked = np.zeros(len(original), dtype=np.bool_)
        masked[np.repeat(starts[chosen], sizes[chosen]) + positions(sizes[chosen])] = True
        return masked
