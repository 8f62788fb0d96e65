"""From the logits of a question's windows to its best answers (Devlin et al. 2018, and its code).

    score(i, j) = start[i] + end[j],    i <= j < i + max_answer_tokens, both of the context, and
                                        i with most context in its window
    null = start[0] + end[0], the least of the windows     ([CLS]: the window has no answer)

Of each window the n best such starts and n best ends are combined; of equal texts the best counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .question_answering import Window


@dataclass(frozen=True)
class Span:
    """An answer: context[start:end] == text, and its logits; the null answer is empty, at 0."""

    text: str
    start: int
    end: int
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """What is greatest for the best answer."""
        return self.start_logit + self.end_logit


@dataclass(frozen=True)
class Answers:
    """The answers of one question.

    Attributes:
        spans: those of the context, best first, at most n_best, texts all different.
        null: the empty answer.
    """

    spans: list[Span]
    null: Span

    @property
    def null_difference(self) -> float:
        """Score of the empty answer minus that of the best other one, 0 without any other.

        The question counts as without answer where it exceeds a threshold (SQuAD 2.0).
        """
        return self.null.score - self.spans[0].score if self.spans else 0.0

    def ranked(self, with_null: bool) -> list[tuple[Span, float]]:
        """(answer, probability) best first; the probabilities are a softmax over these answers.

        Args:
            with_null: the empty answer is among them, at the place that its score gives it.
        """
        spans = list(self.spans)
        if with_null or not spans:
            spans = sorted([*spans, self.null], key=lambda span: -span.score)
        scores = np.array([span.score for span in spans])
        weights = np.exp(scores - scores.max())
        return list(zip(spans, (weights / weights.sum()).tolist(), strict=True))


def best_answers(
    context: str,
    windows: Sequence[Window],
    start_logits: Sequence[NDArray[Any]],
    end_logits: Sequence[NDArray[Any]],
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> Answers:
    """The best answers of one question.

    Args:
        context: of the question.
        windows: of the question.
        start_logits, end_logits: of each window, its tokens' logits, [n].
        n_best: at most so many answers.
        max_answer_tokens: longer spans are no answers.

    Raises:
        ValueError: no windows, n_best or max_answer_tokens less than 1.
    """
    if not windows or n_best < 1 or max_answer_tokens < 1:
        raise ValueError(
            f"{len(windows)} windows, n_best = {n_best}, max_answer_tokens = {max_answer_tokens}: "
            "each must be 1 at least"
        )
    null: Span | None = None
    best: dict[str, Span] = {}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        empty = Span("", 0, 0, float(starts[0]), float(ends[0]))
        if null is None or empty.score < null.score:
            null = empty
        for i, j in _pairs(window, starts, ends, n_best, max_answer_tokens):
            span = _span(context, window, int(i), int(j), float(starts[i]), float(ends[j]))
            if not span.text:
                continue  # white space alone is no answer
            if span.text not in best or span.score > best[span.text].score:
                best[span.text] = span
    assert null is not None
    return Answers(sorted(best.values(), key=lambda span: -span.score)[:n_best], null)


def _span(context: str, window: Window, i: int, j: int, start: float, end: float) -> Span:
    """Tokens i .. j as text, without the white space that byte-level tokens begin with."""
    first, last = int(window.offsets[i, 0]), int(window.offsets[j, 1])
    text = context[first:last]
    first += len(text) - len(text.lstrip())
    text = text.strip()
    return Span(text, first, first + len(text), start, end)


def _pairs(
    window: Window,
    starts: NDArray[Any],
    ends: NDArray[Any],
    n_best: int,
    max_answer_tokens: int,
) -> NDArray[np.int64]:
    """(first, last) tokens of the answers of one window, [k, 2]."""
    i = _largest(starts, np.flatnonzero(window.max_context), n_best)
    j = _largest(ends, np.flatnonzero(window.offsets[:, 0] >= 0), n_best)
    pairs = np.stack(np.meshgrid(i, j, indexing="ij"), axis=-1).reshape(-1, 2)
    lengths = pairs[:, 1] - pairs[:, 0] + 1
    return pairs[(lengths >= 1) & (lengths <= max_answer_tokens)]


def _largest(logits: NDArray[Any], places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Those of the places with the largest logits, largest first, of equal ones the first."""
    order = np.argsort(-np.asarray(logits, dtype=np.float64)[places], kind="stable")
    return places[order[:count]]
