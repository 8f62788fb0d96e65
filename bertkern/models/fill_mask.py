"""The most probable words at the [MASK]s of texts: softmax of the masked-LM logits there.

Legend: B texts of a batch, T their tokens, P their [MASK]s, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bertkern.data.features import TokenSequence
from bertkern.data.tokenizer import SpecialIds, load_tokenizer

from .bert import BertForMaskedLM, BertForPreTraining
from .replay import Outputs, ReplayedForward
from .serving import (
    BATCH_SIZE,
    WINDOW,
    InputError,
    PackedTokens,
    check_stream,
    computed,
    cutting_tokenizer,
    length_limit,
    pack,
    tokenize,
    windows,
)

_MASKS_AT_ONCE = 512  # rows of logits held: 62 MB for a vocabulary of 30,522


class Guess(NamedTuple):
    """A token and its probability among the whole vocabulary."""

    token: str
    probability: float


@dataclass(frozen=True)
class FilledText:
    """What stands at the [MASK]s of a text.

    Attributes:
        masks: for each [MASK] in order, its guesses, best first.
        truncated: the text was longer than the model takes; [MASK]s past the cut have no guesses.
    """

    masks: list[list[Guess]]
    truncated: bool


class FillMask:
    """Fills in words with a pre-trained BERT.

    Args:
        model: with a masked-LM head; put into evaluation mode.
        tokenizer: its tokenizer, which adds [CLS] and [SEP].
        max_length: longer texts are cut to so many tokens, special ones included; None: all
            positions of the model.
    """

    def __init__(
        self,
        model: BertForMaskedLM | BertForPreTraining,
        tokenizer: Tokenizer,
        max_length: int | None = None,
    ) -> None:
        positions = model.config.max_position_embeddings
        self.model = model.eval()
        self.max_length = length_limit("max_length", max_length, positions)
        self.tokenizer = cutting_tokenizer(tokenizer, self.max_length)
        self._mask = SpecialIds.of(tokenizer).mask
        self._forward = ReplayedForward(model, self._hidden_states, positions)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> FillMask:
        """Read the folder of a BERT with a masked-LM head, of pre-training or alone.

        Args:
            folder: with config.json, model.safetensors and the tokenizer.
            device: where to compute.
            dtype: of the weights; None keeps the stored one.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: a damaged file, or a model without the head.
        """
        model = BertForMaskedLM.from_pretrained(folder, dtype)
        return cls(model.to(device), load_tokenizer(folder))

    def __call__(
        self,
        texts: Sequence[str],
        top_k: int = 5,
        targets: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[FilledText]:
        """The guesses for each text, in order; arguments and errors as `stream`."""
        return list(self.stream(texts, top_k, targets, batch_size))

    def stream(
        self,
        texts: Iterable[str],
        top_k: int = 5,
        targets: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        window: int = WINDOW,
    ) -> Iterator[FilledText]:
        """The guesses for any number of texts, in order, in the memory of a window.

        Args:
            texts: with [MASK] where a word is to be found; read no further ahead than `window`.
            top_k: guesses for each [MASK].
            targets: only these tokens are guessed (fewer than top_k give fewer guesses);
                probabilities stay those among the whole vocabulary.
            batch_size: at most so many texts are computed together.
            window: texts that are read, sorted by length and computed before the first of their
                results is given; 1 answers each as it comes.

        Raises:
            TypeError: texts is one string, or holds something else than strings.
            ValueError: top_k, batch_size or window out of range, or a target that is not in the
                vocabulary.
            InputError: a text has no [MASK].
        """
        check_stream(texts, batch_size, window)
        size = self.model.config.vocab_size
        if not 1 <= top_k <= size:
            raise ValueError(f"top_k must be in 1..{size}, the vocabulary, not {top_k}")
        return self._stream(texts, top_k, self._target_ids(targets), batch_size, window)

    def _stream(
        self,
        texts: Iterable[str],
        top_k: int,
        targets: Tensor | None,
        batch_size: int,
        window: int,
    ) -> Iterator[FilledText]:
        for first, chunk in windows(texts, window):
            sequences, truncated = tokenize(self.tokenizer, chunk, first)
            for i, sequence in enumerate(sequences):
                if self._mask not in sequence.input_ids and not truncated[i]:
                    raise InputError(first + i, f"no [MASK] in {chunk[i]!r}")
            guesses = computed(
                sequences, lambda batch: self._guesses(batch, top_k, targets), batch_size
            )
            yield from map(FilledText, guesses, truncated)

    def _target_ids(self, targets: Sequence[str] | None) -> Tensor | None:
        """Vocabulary ids of the targets, each once; None for None."""
        if targets is None:
            return None
        found = {token: self.tokenizer.token_to_id(token) for token in targets}
        missing = [token for token, i in found.items() if i is None]
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(f"targets must be tokens of the vocabulary, which has no {names}")
        if not found:
            raise ValueError("targets must name at least one token, or be None")
        return torch.tensor(sorted(set(found.values())))

    def _hidden_states(self, batch: PackedTokens) -> Outputs:
        return (self.model.bert(**batch.arguments()).last_hidden_state,)

    @torch.inference_mode()
    def _guesses(
        self, batch: Sequence[TokenSequence], top_k: int, targets: Tensor | None
    ) -> list[list[list[Guess]]]:
        """For each text of a batch, for each [MASK], its guesses."""
        device = self.model.bert.embeddings.word.weight.device
        flat = [token for sequence in batch for token in sequence.input_ids]
        places = [t for t, token in enumerate(flat) if token == self._mask]
        x = self._forward(pack(batch, device))[0]
        x = x.index_select(0, torch.tensor(places, dtype=torch.int64, device=device))  # [P, hidden]
        found: list[list[Guess]] = []
        for rows in x.split(_MASKS_AT_ONCE):
            found += self._best(rows, top_k, targets)
        guesses = iter(found)
        return [[next(guesses) for _ in range(s.input_ids.count(self._mask))] for s in batch]

    def _best(self, x: Tensor, top_k: int, targets: Tensor | None) -> list[list[Guess]]:
        """Hidden states [P, hidden] of [MASK]s -> for each, its guesses."""
        probabilities = self.model.predict(x).float().softmax(1)  # [P, V]
        if targets is not None:
            targets = targets.to(x.device)
            probabilities = probabilities.index_select(1, targets)
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        ids = best.indices if targets is None else targets[best.indices]
        return [
            [
                Guess(self.tokenizer.id_to_token(i) or "", probability)
                for i, probability in zip(row_ids, row, strict=True)
            ]
            for row_ids, row in zip(ids.tolist(), best.values.tolist(), strict=True)
        ]
