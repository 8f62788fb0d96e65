"""Answers that are spans of a text, by a BERT fine-tuned on questions as SQuAD's.

A long text is read in windows that overlap; the answer is the best span of all of them, see
`bertkern.data.answer_spans`.

Legend: W windows of a batch, T their tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertkern.data.answer_spans import Span, best_answers
from bertkern.data.features import TokenSequence
from bertkern.data.question_answering import Question, WindowSettings, make_windows
from bertkern.data.tokenizer import load_tokenizer

from .bert_tasks import BertForQuestionAnswering
from .replay import Outputs, ReplayedForward
from .serving import (
    BATCH_SIZE,
    PackedTokens,
    check_stream,
    check_text,
    computed,
    length_limit,
    pack,
    windows,
)

QUESTIONS_AHEAD = 256  # a question is often several windows of 384 tokens

SpanLogits = tuple[NDArray[Any], NDArray[Any]]  # start and end, of the tokens of a window


@dataclass(frozen=True)
class Answered:
    """What a text answers to a question.

    Attributes:
        best: the answer, `context[best.start : best.end]`; the empty span at 0 where the text does
            not answer.
        ranked: (answer, probability) best first. The probabilities are a softmax of the scores
            (start logit + end logit) over these answers.
        null_difference: score of the empty answer minus that of the best other one.
        truncated: the question was longer than the model takes and has been cut.
    """

    best: Span
    ranked: list[tuple[Span, float]]
    null_difference: float
    truncated: bool


class Answer:
    """Answers questions from texts with a fine-tuned BERT.

    Args:
        model: with its head; put into evaluation mode.
        tokenizer: its tokenizer.
        max_length, stride, max_query_length: of the windows, see `WindowSettings`; None: 384, 128
            and 64 tokens, or what a model of fewer positions has room for.

    Raises:
        ValueError: a window longer than the model's positions, or too short for question and
            stride.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering,
        tokenizer: Tokenizer,
        max_length: int | None = None,
        stride: int | None = None,
        max_query_length: int | None = None,
    ) -> None:
        positions = model.config.max_position_embeddings
        self.model = model.eval()
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.settings = _window_settings(positions, max_length, stride, max_query_length)
        self._forward = ReplayedForward(model, self._logits, positions)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        max_query_length: int | None = None,
    ) -> Answer:
        """Read the folder of a BERT that was fine-tuned for question answering.

        Args:
            folder: with config.json, model.safetensors and the tokenizer.
            device: where to compute.
            dtype: of the weights; None keeps the stored one.
            max_length, stride, max_query_length: as the class.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: a damaged file, or a model without the head.
        """
        model = BertForQuestionAnswering.from_pretrained(folder, dtype)
        tokenizer = load_tokenizer(folder)
        return cls(model.to(device), tokenizer, max_length, stride, max_query_length)

    def __call__(
        self,
        questions: Sequence[tuple[str, str]],
        n_best: int = 20,
        null_threshold: float | None = None,
        max_answer_tokens: int = 30,
        batch_size: int = BATCH_SIZE,
    ) -> list[Answered]:
        """The answer to each (question, context), in order; arguments and errors as `stream`."""
        return list(self.stream(questions, n_best, null_threshold, max_answer_tokens, batch_size))

    def stream(
        self,
        questions: Iterable[tuple[str, str]],
        n_best: int = 20,
        null_threshold: float | None = None,
        max_answer_tokens: int = 30,
        batch_size: int = BATCH_SIZE,
        window: int = QUESTIONS_AHEAD,
    ) -> Iterator[Answered]:
        """The answers to any number of (question, context), in order, in the memory of a window.

        Args:
            questions: pairs of strings; read no further ahead than `window`.
            n_best: at most so many answers are ranked, and so many starts and ends of a window
                looked at.
            null_threshold: the text has no answer where null_difference exceeds it (for models
                trained on SQuAD 2.0; 0 is a good begin). None: there is always an answer, unless
                the text has no words.
            max_answer_tokens: longer spans are no answers.
            batch_size: at most so many windows are computed together.
            window: questions that are read, and whose windows are sorted by length and computed,
                before the first of their answers is given; 1 answers each as it comes.

        Raises:
            TypeError: a question or context is no string.
            ValueError: a number is less than 1.
        """
        check_stream(questions, batch_size, window)
        for name, value in (("n_best", n_best), ("max_answer_tokens", max_answer_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        return self._stream(
            questions, n_best, null_threshold, max_answer_tokens, batch_size, window
        )

    def _stream(
        self,
        questions: Iterable[tuple[str, str]],
        n_best: int,
        null_threshold: float | None,
        max_answer_tokens: int,
        batch_size: int,
        window: int,
    ) -> Iterator[Answered]:
        for first, chunk in windows(questions, window):
            asked = [self._question(first + i, *pair) for i, pair in enumerate(chunk)]
            parts = make_windows(asked, self.tokenizer, self.settings)
            sequences = [TokenSequence(part.input_ids, part.token_type_ids) for part in parts]
            logits = computed(sequences, self._span_logits, batch_size)
            own: list[list[int]] = [[] for _ in asked]
            for number, part in enumerate(parts):
                own[part.question].append(number)
            for question, numbers in zip(asked, own, strict=True):
                answers = best_answers(
                    question.context,
                    [parts[number] for number in numbers],
                    [logits[number][0] for number in numbers],
                    [logits[number][1] for number in numbers],
                    n_best,
                    max_answer_tokens,
                )
                no_answer = not answers.spans or (
                    null_threshold is not None and answers.null_difference > null_threshold
                )
                yield Answered(
                    answers.null if no_answer else answers.spans[0],
                    answers.ranked(with_null=null_threshold is not None),
                    answers.null_difference,
                    self._is_cut(question.question),
                )

    def _question(self, index: int, question: str, context: str) -> Question:
        check_text(question, index)
        check_text(context, index)
        return Question(str(index), question, context)

    def _is_cut(self, question: str) -> bool:
        ids = self.tokenizer.encode(question, add_special_tokens=False).ids
        return len(ids) > self.settings.max_query_length

    def _logits(self, batch: PackedTokens) -> Outputs:
        output = self.model(**batch.arguments())
        return output.start_logits, output.end_logits

    @torch.inference_mode()
    def _span_logits(self, batch: Sequence[TokenSequence]) -> list[SpanLogits]:
        """Logits of the tokens of each of W windows, float32 on the host."""
        device = self.model.bert.embeddings.word.weight.device
        logits = torch.stack(self._forward(pack(batch, device))).float().cpu().numpy()  # [2, T]
        ends = np.cumsum([len(sequence.input_ids) for sequence in batch])
        return [(start, end) for start, end in np.split(logits, ends[:-1], axis=1)]


def _window_settings(
    positions: int, max_length: int | None, stride: int | None, max_query_length: int | None
) -> WindowSettings:
    """SQuAD's settings where nothing else is asked for, or smaller ones where they do not fit."""
    usual = WindowSettings()
    length = length_limit(
        "max_length",
        min(usual.max_length, positions) if max_length is None else max_length,
        positions,
    )
    query = (
        min(usual.max_query_length, length // 4) if max_query_length is None else max_query_length
    )
    if stride is None:
        stride = min(usual.stride, max(1, (length - query - 3) // 2))
    return WindowSettings(length, stride, query)
