"""BERT's pre-training examples: sentence pairs and masked tokens (Devlin et al. 2018, appendix A).

    pair    [CLS] A [SEP] B [SEP]; with probability 1/2 B continues A (label 0), else it starts
            at a random sentence of another document (label 1)
    masks   15 % of the tokens: 80 % of them become [MASK], 10 % a random token, 10 % stay

Everything is a function of (documents, settings, seed, epoch): pairs and masks are drawn anew in
each epoch. Batches are packed: sequences lie behind one another without padding.

Legend: E examples of an epoch, N their tokens, B sequences, T tokens of a batch, P of them masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .text import Document
from .tokenizer import SpecialIds

Ids = NDArray[np.int64]
TokenizedDocument = list[Ids]  # the token ids of each sentence

IS_NEXT, IS_RANDOM = 0, 1


@dataclass(frozen=True)
class MaskingSettings:
    """How examples are made.

    Attributes:
        max_length: tokens of a sequence, special ones included.
        masked_fraction: part of the tokens that is predicted.
        max_predictions: at most so many in a sequence; None for masked_fraction of max_length,
            rounded up.
        short_sequence_probability: how often a pair aims at a random shorter length.
    """

    max_length: int = 128
    masked_fraction: float = 0.15
    max_predictions: int | None = None
    short_sequence_probability: float = 0.1

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise ValueError(f"max_length must be at least 8, not {self.max_length}")
        for name in ("masked_fraction", "short_sequence_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)}")

    @property
    def prediction_limit(self) -> int:
        """The most predictions of one sequence."""
        if self.max_predictions is not None:
            return self.max_predictions
        return int(np.ceil(self.masked_fraction * self.max_length))


@dataclass
class PackedBatch:
    """The arguments of a packed call of BertForPreTraining.

    Attributes:
        input_ids, token_type_ids, position_ids: int64 [T].
        cu_seqlens: int32 [B + 1].
        max_seqlen: the longest sequence.
        labels, label_tokens: int64 [P], the tokens to predict and where in 0..T-1 they stand.
        next_sentence_label: int64 [B].
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    label_tokens: Tensor
    next_sentence_label: Tensor

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Tensor | int]:
        """Keyword arguments for the model, on its device; a GPU is not waited for."""
        arguments: dict[str, Tensor | int] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and torch.device(device).type != "cpu":
                value = (value.pin_memory() if torch.device(device).type == "cuda" else value).to(
                    device, non_blocking=True
                )
            arguments[field.name] = value
        return arguments


@dataclass(frozen=True)
class Epoch:
    """The examples of one epoch, flat: example e owns tokens starts[e] .. starts[e + 1] - 1.

    Attributes:
        input_ids: [N], with the masks in place.
        original_ids: [N], before.
        token_type_ids: [N].
        masked: bool [N], the tokens to predict.
        starts: [E + 1].
        next_sentence_label: [E].
    """

    input_ids: Ids
    original_ids: Ids
    token_type_ids: Ids
    masked: NDArray[np.bool_]
    starts: Ids
    next_sentence_label: Ids

    def __len__(self) -> int:
        return len(self.next_sentence_label)

    def pack(self, examples: Ids) -> PackedBatch:
        """The batch of the given examples, in their order."""
        lengths = np.diff(self.starts)[examples]
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        tokens = np.repeat(self.starts[examples], lengths) + positions
        label_tokens = np.flatnonzero(self.masked[tokens])
        return PackedBatch(
            input_ids=torch.from_numpy(self.input_ids[tokens]),
            token_type_ids=torch.from_numpy(self.token_type_ids[tokens]),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(lengths.max()),
            labels=torch.from_numpy(self.original_ids[tokens][label_tokens]),
            label_tokens=torch.from_numpy(label_tokens),
            next_sentence_label=torch.from_numpy(self.next_sentence_label[examples]),
        )

    def batches(self, tokens_per_batch: int, order: Ids) -> list[Ids]:
        """The examples of each batch: as many as follow in `order` until the budget is spent."""
        lengths = np.diff(self.starts)
        batches: list[Ids] = []
        first = total = 0
        for i, example in enumerate(order):
            if total + lengths[example] > tokens_per_batch and i > first:
                batches.append(order[first:i])
                first, total = i, 0
            total += int(lengths[example])
        batches.append(order[first:])
        return batches


class PretrainingData:
    """Documents, tokenised, from which epochs of examples are made.

    Args:
        documents: at least two.
        tokenizer: with BERT's special tokens.
        settings: how examples are made.
        seed: of everything random here.

    Raises:
        ValueError: fewer than two documents with two sentences or more, or nothing in the
            vocabulary besides special tokens.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        settings: MaskingSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = settings or MaskingSettings()
        self.seed = seed
        self.special = SpecialIds.of(tokenizer)
        self.vocab_size = tokenizer.get_vocab_size()
        self.documents = tokenize_documents(documents, tokenizer)
        if len(self.documents) < 2:
            raise ValueError(
                f"{len(self.documents)} document(s) with two or more sentences; pairs of unrelated "
                "sentences need two (empty lines separate documents)"
            )
        ordinary = np.setdiff1d(np.arange(self.vocab_size), self.special.as_tuple())
        if not len(ordinary):
            raise ValueError("the vocabulary has special tokens only")
        self._ordinary_ids = ordinary

    def epoch(self, epoch: int) -> Epoch:
        """The examples of an epoch; the same number gives the same examples."""
        rng = np.random.default_rng([self.seed, epoch])
        tokens: list[Ids | list[int]] = []
        types: list[int] = []
        lengths: list[int] = []
        labels: list[int] = []
        special = self.special
        for index in range(len(self.documents)):
            for first, second, label in self._pairs(index, rng):
                tokens += [[special.cls], first, [special.sep], second, [special.sep]]
                types += [len(first) + 2, len(second) + 1]
                lengths.append(len(first) + len(second) + 3)
                labels.append(label)
        original = np.concatenate(tokens).astype(np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        token_types = np.repeat(np.tile([0, 1], len(labels)), types)
        input_ids, masked = self._mask(original, starts, rng)
        return Epoch(input_ids, original, token_types, masked, starts, np.array(labels))

    def batches(self, epoch: int, tokens_per_batch: int) -> tuple[Epoch, list[Ids]]:
        """An epoch and its batches, in random order.

        Raises:
            ValueError: a sequence of max_length would not fit into a batch.
        """
        if tokens_per_batch < self.settings.max_length:
            raise ValueError(
                f"tokens_per_batch = {tokens_per_batch} is less than max_length = "
                f"{self.settings.max_length}"
            )
        examples = self.epoch(epoch)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(examples))
        return examples, examples.batches(tokens_per_batch, order)

    def unigram_counts(self) -> Ids:
        """How often each vocabulary id occurs in the documents, [vocab_size]."""
        sentences = [sentence for document in self.documents for sentence in document]
        return np.bincount(np.concatenate(sentences), minlength=self.vocab_size)

    def _pairs(self, index: int, rng: np.random.Generator) -> list[tuple[Ids, Ids, int]]:
        """The pairs (A, B, label) of one document.

        Sentences are gathered until they fill the target length; A is a random number of them, B
        the rest or, as often, text from elsewhere, and then the rest is used again. The label is
        drawn only where both outcomes are possible (two sentences or more at hand), so each has
        probability 1/2.
        """
        document = self.documents[index]
        room = self.settings.max_length - 3
        pairs = []
        first = 0
        while first < len(document) - 1:
            target = room
            if rng.random() < self.settings.short_sequence_probability:
                target = int(rng.integers(2, room + 1))
            end, length = first, 0
            while end < len(document) and (length < target or end - first < 2):
                length += len(document[end])
                end += 1
            split = first + int(rng.integers(1, end - first))
            a = np.concatenate(document[first:split])
            if rng.random() < 0.5:
                label, b, first = IS_NEXT, np.concatenate(document[split:end]), end
            else:
                label, b, first = IS_RANDOM, self._elsewhere(index, target - len(a), rng), split
            pairs.append((*_truncate(a, b, target, rng), label))
        return pairs

    def _elsewhere(self, index: int, length: int, rng: np.random.Generator) -> Ids:
        """About `length` tokens, at least a sentence, from a random place of another document."""
        other = int(rng.integers(len(self.documents) - 1))
        document = self.documents[other + (other >= index)]
        first = end = int(rng.integers(len(document)))
        total = 0
        while end < len(document) and (total < length or end == first):
            total += len(document[end])
            end += 1
        return np.concatenate(document[first:end])

    def _mask(
        self, original: Ids, starts: Ids, rng: np.random.Generator
    ) -> tuple[Ids, NDArray[np.bool_]]:
        """(input ids with masks [N], which tokens are predicted [N]); [CLS] and [SEP] never are."""
        lengths = np.diff(starts)
        wanted = np.rint(lengths * self.settings.masked_fraction).astype(np.int64)
        wanted = np.clip(wanted, 1, self.settings.prediction_limit)
        # a random rank within each example: sort by (example, random key), special tokens last
        example = np.repeat(np.arange(len(lengths)), lengths)
        keys = rng.random(len(original))
        is_special = np.isin(original, (self.special.cls, self.special.sep))
        keys[is_special] = 2.0
        order = np.lexsort((keys, example))
        rank = np.arange(len(original)) - np.repeat(starts[:-1], lengths)
        masked = np.zeros(len(original), dtype=np.bool_)
        masked[order[rank < wanted[example]]] = True
        masked &= ~is_special
        places = np.flatnonzero(masked)
        fate = rng.random(len(places))
        input_ids = original.copy()
        input_ids[places[fate < 0.8]] = self.special.mask
        replaced = places[(fate >= 0.8) & (fate < 0.9)]
        input_ids[replaced] = rng.choice(self._ordinary_ids, len(replaced))
        return input_ids, masked


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> list[TokenizedDocument]:
    """Token ids of every sentence that has any, by document; documents with one are left out."""
    sentences = [sentence for document in documents for sentence in document]
    encodings = iter(tokenizer.encode_batch(sentences, add_special_tokens=False))
    tokenized = []
    for document in documents:
        ids = [np.array(next(encodings).ids, dtype=np.int64) for _ in document]
        ids = [sentence for sentence in ids if len(sentence)]
        if len(ids) >= 2:
            tokenized.append(ids)
    return tokenized


def _truncate(a: Ids, b: Ids, length: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """A and B cut to `length` tokens together.

    Tokens go one by one from the longer of the two, from its front or its back by chance.
    """
    size_a, size_b = len(a), len(b)
    excess = size_a + size_b - length
    if excess <= 0:
        return a, b
    # the longer loses tokens until both are equal, then they lose in turn
    cut_a = min(max(0, size_a - size_b), excess)
    cut_b = min(max(0, size_b - size_a), excess)
    rest = excess - cut_a - cut_b
    cut_a, cut_b = cut_a + rest // 2, cut_b + (rest + 1) // 2
    front_a, front_b = rng.binomial(cut_a, 0.5), rng.binomial(cut_b, 0.5)
    return a[front_a : size_a - (cut_a - front_a)], b[front_b : size_b - (cut_b - front_b)]
