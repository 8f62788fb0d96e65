"""Labels of texts, or of pairs of texts, by a fine-tuned BERT.

    single label   probabilities = softmax(logits)        exactly one label is right
    multi-label    probabilities = sigmoid(logits)        each label is right or not by itself
    regression     values = logits

Which one is the config's `problem_type`; where it says nothing, one output is read as multi-label
and several as single label (as transformers' text-classification pipeline does).

Legend: B texts of a batch, C labels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from bertkern.data.features import TokenSequence
from bertkern.data.tokenizer import load_tokenizer

from .bert_tasks import BertForSequenceClassification
from .replay import Outputs, ReplayedForward
from .serving import (
    BATCH_SIZE,
    WINDOW,
    PackedTokens,
    Text,
    check_stream,
    computed,
    cutting_tokenizer,
    length_limit,
    pack,
    tokenize,
    windows,
)

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


@dataclass(frozen=True)
class Classification:
    """The labels of one text or pair.

    Attributes:
        labels: the most probable one; of a multi-label model those whose probability is 0.5 or
            more, most probable first; of a regression none.
        scores: of every label by name, in the model's order: its probability, or the value of a
            regression.
        truncated: the text was longer than the model takes and has been cut.
    """

    labels: tuple[str, ...]
    scores: dict[str, float]
    truncated: bool


class Classify:
    """Classifies texts with a fine-tuned BERT.

    Args:
        model: with its head; put into evaluation mode.
        tokenizer: its tokenizer, which adds [CLS] and [SEP].
        max_length: longer texts are cut to so many tokens, special ones included, of a pair the
            longer one first; None: all positions of the model.

    Attributes:
        problem_type: SINGLE, MULTI or REGRESSION.
        labels: their names, in the order of the outputs.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: Tokenizer,
        max_length: int | None = None,
    ) -> None:
        config = model.config
        self.model = model.eval()
        self.max_length = length_limit("max_length", max_length, config.max_position_embeddings)
        self.tokenizer = cutting_tokenizer(tokenizer, self.max_length)
        self.problem_type = config.problem_type or (MULTI if config.num_labels == 1 else SINGLE)
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        self._forward = ReplayedForward(model, self._logits, config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Classify:
        """Read the folder of a BERT that was fine-tuned for classification.

        Args:
            folder: with config.json, model.safetensors and the tokenizer.
            device: where to compute.
            dtype: of the weights; None keeps the stored one.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: a damaged file, or a model without the head.
        """
        model = BertForSequenceClassification.from_pretrained(folder, dtype)
        return cls(model.to(device), load_tokenizer(folder))

    def __call__(self, texts: Sequence[Text], batch_size: int = BATCH_SIZE) -> list[Classification]:
        """The labels of each text, in order; arguments and errors as `stream`."""
        return list(self.stream(texts, batch_size))

    def stream(
        self, texts: Iterable[Text], batch_size: int = BATCH_SIZE, window: int = WINDOW
    ) -> Iterator[Classification]:
        """The labels of any number of texts, in order, in the memory of a window.

        Args:
            texts: each a string, or a pair of strings for a model of pairs; read no further ahead
                than `window`.
            batch_size: at most so many texts are computed together.
            window: texts that are read, sorted by length and computed before the first of their
                results is given; 1 answers each as it comes.

        Raises:
            TypeError: texts is one string, or holds something else than strings and pairs.
            ValueError: batch_size or window is less than 1.
        """
        check_stream(texts, batch_size, window)
        return self._stream(texts, batch_size, window)

    def _stream(
        self, texts: Iterable[Text], batch_size: int, window: int
    ) -> Iterator[Classification]:
        for first, chunk in windows(texts, window):
            sequences, truncated = tokenize(self.tokenizer, chunk, first)
            scores = computed(sequences, self._scores, batch_size)
            for row, cut in zip(scores, truncated, strict=True):
                named = dict(zip(self.labels, row, strict=True))
                yield Classification(self._chosen(named), named, cut)

    def _chosen(self, scores: dict[str, float]) -> tuple[str, ...]:
        if self.problem_type == REGRESSION:
            return ()
        ranked = sorted(scores, key=lambda label: -scores[label])
        if self.problem_type == SINGLE:
            return (ranked[0],)
        return tuple(label for label in ranked if scores[label] >= 0.5)

    def _logits(self, batch: PackedTokens) -> Outputs:
        return (self.model(**batch.arguments()).logits,)

    @torch.inference_mode()
    def _scores(self, batch: Sequence[TokenSequence]) -> list[list[float]]:
        """B texts -> [B][C] probabilities or values."""
        device = self.model.bert.embeddings.word.weight.device
        logits = self._forward(pack(batch, device))[0].float()
        if self.problem_type == SINGLE:
            logits = logits.softmax(1)
        elif self.problem_type == MULTI:
            logits = logits.sigmoid()
        return logits.tolist()
