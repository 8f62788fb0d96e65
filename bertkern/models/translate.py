"""Translations of texts: what a Transformer's decoder finds probable after the text is encoded.

A source is its pieces and [SEP]; a target begins after [CLS] and ends with [SEP].

Legend: B texts of a batch, T their tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from bertkern.data.features import TokenSequence
from bertkern.data.tokenizer import SpecialIds, load_tokenizer

from .generate import Hypothesis, check_search, length_limits
from .next_token import Sampling
from .serving import (
    BATCH_SIZE,
    WINDOW,
    batches_by_length,
    check_stream,
    cutting_tokenizer,
    pack,
    tokenize,
    windows,
)
from .transformer import Transformer

MAX_SOURCE_LENGTH = 512


class Alternative(NamedTuple):
    """One translation of a text.

    Attributes:
        text: of the target's tokens.
        score: its log-probability divided by the length penalty.
        finished: the model ended it; else it was cut at max_length.
    """

    text: str
    score: float
    finished: bool


@dataclass(frozen=True)
class Translation:
    """What a text was translated to.

    Attributes:
        text, score, finished: of the best translation, as in Alternative.
        alternatives: the others that were asked for, best first.
        truncated: the source was longer than the model takes and has been cut.
    """

    text: str
    score: float
    finished: bool
    alternatives: list[Alternative]
    truncated: bool


class Translate:
    """Translates texts with an encoder-decoder Transformer.

    Args:
        model: put into evaluation mode.
        tokenizer: of both languages, which adds [CLS] and [SEP].
        max_source_length: longer texts are cut to so many tokens, [SEP] included. The model takes
            any length, but has learned from no longer ones than its training had.

    Raises:
        ValueError: the tokenizer is not the model's, or max_source_length is less than 2.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, max_source_length: int = MAX_SOURCE_LENGTH
    ) -> None:
        if max_source_length < 2:
            raise ValueError(f"max_source_length must be at least 2, not {max_source_length}")
        self.model = model.eval()
        self.max_source_length = max_source_length
        self.tokenizer = cutting_tokenizer(tokenizer, max_source_length + 1)  # [CLS] goes
        self._never = _never_produced(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_source_length: int = MAX_SOURCE_LENGTH,
    ) -> Translate:
        """Read the folder of a trained Transformer.

        Args:
            folder: with config.json, model.safetensors and the tokenizer.
            device: where to compute.
            dtype: of the weights; None keeps the stored one.
            max_source_length: as of the class.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: a damaged file, another model, or the tokenizer of another one.
        """
        model = Transformer.from_pretrained(folder, dtype)
        return cls(model.to(device), load_tokenizer(folder), max_source_length)

    def __call__(
        self,
        texts: Sequence[str],
        *,
        beam_size: int = 4,
        length_penalty: float = 0.6,
        num: int = 1,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Translation]:
        """The translation of each text, in order; arguments and errors as `stream`."""
        return list(
            self.stream(
                texts,
                beam_size=beam_size,
                length_penalty=length_penalty,
                num=num,
                sampling=sampling,
                max_length=max_length,
                batch_size=batch_size,
            )
        )

    def stream(
        self,
        texts: Iterable[str],
        *,
        beam_size: int = 4,
        length_penalty: float = 0.6,
        num: int = 1,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        batch_size: int = BATCH_SIZE,
        window: int = WINDOW,
    ) -> Iterator[Translation]:
        """The translations of any number of texts, in order, in the memory of a window.

        Args:
            texts: read no further ahead than `window`. One without a word is translated to "".
            beam_size: hypotheses that the search follows at once; 1 is greedy.
            length_penalty: alpha of the score (`generate.py`), 0 or more; larger prefers longer.
            num: translations of each text: the best and num - 1 alternatives; at most beam_size
                unless sampling.
            sampling: draw translations in place of searching the best; a text's are a function of
                the seed and the text's number in the input (on a CPU up to the rounding of its
                batch's products).
            max_length: the most tokens of a translation, its end included; None: 50 more than the
                source has.
            batch_size: at most so many texts are computed together.
            window: texts that are read, sorted by length and computed before the first of their
                results is given; 1 answers each as it comes.

        Raises:
            TypeError: texts is one string, or holds something else than strings.
            ValueError: an option out of range.
            FloatingPointError: the model's logits hold NaN or +inf.
        """
        check_stream(texts, batch_size, window)
        check_search(beam_size, length_penalty, num, sampling)
        length_limits([], max_length)
        search = _Search(beam_size, length_penalty, num, sampling, max_length)
        return self._stream(texts, search, batch_size, window)

    def _stream(
        self, texts: Iterable[str], search: _Search, batch_size: int, window: int
    ) -> Iterator[Translation]:
        for first, chunk in windows(texts, window):
            sequences, truncated = tokenize(self.tokenizer, chunk, first)
            sources = [TokenSequence(ids[1:], types[1:]) for ids, types in sequences]
            nothing = [Hypothesis([], 0.0, 0.0, True)]
            found = [nothing] * len(sources)  # for those that are [SEP] alone
            worded = [i for i, source in enumerate(sources) if len(source.input_ids) > 1]
            # the budget of tokens is one of rows: each beam keeps keys and values of its own
            lengths = [search.rows * len(sources[i].input_ids) for i in worded]
            for batch in batches_by_length(lengths, batch_size):
                places = [worded[i] for i in batch]
                hypotheses = self._search(
                    [sources[i] for i in places], search, [first + i for i in places]
                )
                for i, best in zip(places, hypotheses, strict=True):
                    found[i] = best
            for best, cut in zip(found, truncated, strict=True):
                one, *others = [self._read(hypothesis) for hypothesis in best]
                yield Translation(*one, others, cut)

    def _search(
        self, batch: Sequence[TokenSequence], search: _Search, numbers: Sequence[int]
    ) -> list[list[Hypothesis]]:
        packed = pack(batch, self.model.embedding.weight.device)
        return self.model.generate(
            packed.input_ids,
            source_cu_seqlens=packed.cu_seqlens,
            source_max_seqlen=packed.max_seqlen,
            beam_size=search.beam_size,
            length_penalty=search.length_penalty,
            max_length=search.max_length,
            num=search.num,
            sampling=search.sampling,
            numbers=numbers,
            never=self._never,
        )

    def _read(self, hypothesis: Hypothesis) -> Alternative:
        text = self.tokenizer.decode(hypothesis.ids, skip_special_tokens=False)
        # byte-level BPE writes the space before a word into its first piece
        return Alternative(text.removeprefix(" "), hypothesis.score, hypothesis.finished)


class _Search(NamedTuple):
    """Options of `stream`."""

    beam_size: int
    length_penalty: float
    num: int
    sampling: Sampling | None
    max_length: int | None

    @property
    def rows(self) -> int:
        """Rows of each text that are decoded together."""
        return self.num if self.sampling else self.beam_size


def _never_produced(model: Transformer, tokenizer: Tokenizer) -> list[int]:
    """[MASK], ids that the tokenizer does not have, and of BPE, to which nothing is unknown, [UNK].

    Raises:
        ValueError: the tokenizer does not fit the model.
    """
    config, special = model.config, SpecialIds.of(tokenizer)
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise ValueError(f"the tokenizer has {size} tokens, the model only {config.vocab_size}")
    ours = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    theirs = (special.pad, special.cls, special.sep)
    if ours != theirs:
        raise ValueError(
            f"the tokenizer's [PAD], [CLS], [SEP] are {theirs}, the model's pad_token_id, "
            f"bos_token_id, eos_token_id {ours}"
        )
    never = [special.mask, *range(size, config.vocab_size)]
    return [*never, special.unk] if isinstance(tokenizer.model, BPE) else never
