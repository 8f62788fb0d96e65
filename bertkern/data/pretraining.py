"""BERT's pre-training batches: masked sentence pairs, packed (Devlin et al. 2018, appendix A).

    [CLS] A [SEP] B [SEP], token types 0 up to the first [SEP], then 1

`pairs` plans which texts A and B are, `masking` chooses what is predicted; here pairs are filled
into batches of so many tokens, and a part of a batch is read from the corpus and masked when it is
asked for: a process pays for its own share only. Everything is a function of (corpus, settings,
seed, epoch), whatever computes it.

Legend: E examples of a batch, B sequences of a part, T their tokens, P of them predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import Corpus
from .masking import Masker, MaskingSettings
from .packing import Ids, cumulative_lengths, fill_batches, positions, to_device
from .pairs import PAIR, Pairs, lengths_of, windows
from .tokenizer import SpecialIds, vocabulary_digest


@dataclass
class PackedPretrainingBatch:
    """The arguments of a packed call of BertForPreTraining.

    Attributes:
        input_ids, token_type_ids, position_ids: int64 [T].
        cu_seqlens: int32 [B + 1].
        max_seqlen: the longest sequence of the whole batch.
        sequence_offset: number of the first sequence in the whole batch.
        labels, label_tokens: int64 [P], the tokens to predict and where in 0..T-1 they stand.
        next_sentence_label: int64 [B]; 0 is next, 1 is random.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    sequence_offset: int
    labels: Tensor
    label_tokens: Tensor
    next_sentence_label: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def sequences(self) -> int:
        """B."""
        return len(self.next_sentence_label)

    @property
    def predictions(self) -> int:
        """P."""
        return len(self.labels)

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments for the model, on its device; a GPU is not waited for."""
        return to_device(vars(self), device)


class PretrainingBatch:
    """One step's examples, planned; `part` makes them.

    Attributes:
        lengths: tokens of each, int64 [E].
        pairs: where they lie in the corpus.
    """

    def __init__(self, pairs: Pairs, corpus: Corpus, masker: Masker) -> None:
        self.pairs = pairs
        self.lengths: Ids = lengths_of(pairs)
        self._corpus, self._masker = corpus, masker

    def __len__(self) -> int:
        return len(self.pairs)

    def part(self, first: int, last: int) -> PackedPretrainingBatch:
        """Examples first .. last - 1, packed.

        Raises:
            ValueError: the corpus is damaged.
        """
        pairs, lengths = self.pairs[first:last], self.lengths[first:last]
        position = positions(lengths)
        a_size = np.repeat(pairs["a_size"], lengths)
        in_b = position > a_size + 1
        original = self._read(pairs, lengths, position, a_size, in_b)
        input_ids, masked = self._masker.mask(original, lengths, pairs["key"])
        label_tokens = np.flatnonzero(masked)
        return PackedPretrainingBatch(
            input_ids=torch.from_numpy(input_ids),
            token_type_ids=torch.from_numpy(in_b.astype(np.int64)),
            position_ids=torch.from_numpy(position),
            cu_seqlens=torch.from_numpy(cumulative_lengths(lengths).astype(np.int32)),
            max_seqlen=int(self.lengths.max()),
            sequence_offset=first,
            labels=torch.from_numpy(original[label_tokens]),
            label_tokens=torch.from_numpy(label_tokens),
            next_sentence_label=torch.from_numpy(pairs["label"].copy()),
        )

    def _read(
        self, pairs: Pairs, lengths: Ids, position: Ids, a_size: Ids, in_b: np.ndarray
    ) -> Ids:
        """[CLS] A [SEP] B [SEP] of each pair, [T]."""
        starts = cumulative_lengths(lengths)[:-1]
        separators = (starts + pairs["a_size"] + 1, starts + lengths - 1)
        # A's first token stands at position 1, B's at a_size + 2
        source = np.where(
            in_b,
            np.repeat(pairs["b_start"], lengths) - a_size - 2,
            np.repeat(pairs["a_start"], lengths) - 1,
        )
        source += position
        for places in (starts, *separators):
            source[places] = pairs["a_start"]  # any token: it is replaced below
        ids = self._corpus.ids[source].astype(np.int64)
        self._corpus.check(ids)
        ids[starts] = self._masker.special.cls
        for places in separators:
            ids[places] = self._masker.special.sep
        return ids


class PretrainingData:
    """A corpus, from which batches of examples are made.

    Args:
        corpus: at least two documents.
        tokenizer: the corpus's.
        settings: how examples are made.
        seed: of everything random here, 0 or more.
        workers: processes that plan ahead; examples do not depend on how many.

    Raises:
        ValueError: fewer than two documents, another tokenizer than the corpus's, or one whose
            vocabulary has special tokens only or, for whole words, does not say where they begin.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        settings: MaskingSettings | None = None,
        seed: int = 0,
        *,
        workers: int = 0,
    ) -> None:
        if seed < 0 or workers < 0:
            raise ValueError(f"seed and workers must be at least 0, not {seed} and {workers}")
        if corpus.documents < 2:
            raise ValueError(
                f"{corpus.documents} document(s) with two or more sentences; pairs of unrelated "
                "sentences need two (empty lines separate documents)"
            )
        if vocabulary_digest(tokenizer) != corpus.vocabulary:
            raise ValueError(
                f"the corpus was made with another tokenizer: its {corpus.vocab_size} tokens are "
                f"not the {tokenizer.get_vocab_size()} of this one"
            )
        self.corpus = corpus
        self.settings = settings or MaskingSettings()
        self.seed = seed
        self.workers = workers
        self.special = SpecialIds.of(tokenizer)
        self.vocab_size = corpus.vocab_size
        self._tokenizer = tokenizer
        self._masker = Masker(tokenizer, self.settings)

    def batches(
        self, epoch: int, tokens_per_batch: int, start: int = 0, max_length: int | None = None
    ) -> Iterator[PretrainingBatch]:
        """The batches of an epoch, in random order; the same for the same arguments.

        Each takes examples as long as they fit into tokens_per_batch; the last may be smaller.

        Args:
            epoch: from 0 on.
            tokens_per_batch: the most tokens of a batch.
            start: leave out so many batches; their texts are planned, not read.
            max_length: in place of the settings', see MaskingSettings.with_length.

        Raises:
            ValueError: a sequence of max_length would not fit into a batch.
        """
        settings, masker = self.settings, self._masker
        if max_length is not None and max_length != settings.max_length:
            settings = settings.with_length(max_length)
            masker = Masker(self._tokenizer, settings)
        if tokens_per_batch < settings.max_length:
            raise ValueError(
                f"tokens_per_batch = {tokens_per_batch} is less than max_length = "
                f"{settings.max_length}"
            )
        planned = windows(self.corpus, settings, self.seed, epoch, self.workers)
        return self._fill(planned, masker, tokens_per_batch, start)

    def _fill(
        self, planned: Iterator[Pairs], masker: Masker, tokens_per_batch: int, start: int
    ) -> Iterator[PretrainingBatch]:
        number = 0
        rest: Pairs = np.empty(0, dtype=PAIR)
        for window in planned:
            pairs = np.concatenate((rest, window))
            bounds = fill_batches(lengths_of(pairs), tokens_per_batch)
            # the last batch of a window goes on in the next one
            for first, last in pairwise(bounds[:-1]):
                if number >= start:
                    yield PretrainingBatch(pairs[first:last], self.corpus, masker)
                number += 1
            rest = pairs[bounds[-2] :]
        if number >= start:
            yield PretrainingBatch(rest, self.corpus, masker)
