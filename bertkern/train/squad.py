"""SQuAD's figures and prediction files (Rajpurkar et al. 2016, 2018).

    normal form    lower case, without punctuation and the articles a, an, the; single spaces
    exact          the prediction's normal form is that of one of the right answers
    f1             2PR/(P + R) over the words of the normal forms; the best of the right answers

Figures are percentages, by the names of the official script for SQuAD 2.0, whose rules these are:
a question without answer is answered rightly by the empty text alone. It counts as such where the
null difference (see `answer_spans`) exceeds a threshold.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bertkern.data.answer_spans import Answers
from bertkern.data.files import write_text
from bertkern.data.question_answering import Question

PREDICTIONS, NBEST, NULL_ODDS = "predictions.json", "nbest_predictions.json", "null_odds.json"

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """The normal form in which answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, prediction: str) -> float:
    """1 where both have the same normal form, else 0."""
    return float(normalize_answer(answer) == normalize_answer(prediction))


def word_f1(answer: str, prediction: str) -> float:
    """F1 of the words of the normal forms, a repeated word counting as often as in both."""
    wanted, given = normalize_answer(answer).split(), normalize_answer(prediction).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (Counter(wanted) & Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


def squad_figures(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    null_differences: Mapping[str, float] | None = None,
    null_threshold: float = 0.0,
) -> dict[str, float]:
    """exact, f1 and total; with null_differences the same of questions with (HasAns_) and without
    (NoAns_) answer, and best_exact, best_f1 with the thresholds that give them.

    Args:
        questions: labelled.
        predictions: the best answer that is not empty, by question id.
        null_differences: by question id; None: every question has an answer.
        null_threshold: the prediction is empty where the null difference exceeds it.

    Raises:
        ValueError: no questions, or one without prediction.
    """
    missing = [question.id for question in questions if question.id not in predictions]
    if missing or not questions:
        raise ValueError(
            f"{len(missing)} of {len(questions)} questions have no prediction: {missing[:3]}"
        )
    exact, f1 = np.array([_scores(q, predictions[q.id]) for q in questions]).T
    if null_differences is None:
        return _means(exact, f1)
    has_answer = np.array([bool(_right_texts(question)) for question in questions])
    differences = np.array([null_differences[question.id] for question in questions])
    empty = differences > null_threshold
    # an empty prediction is right where there is no answer
    exact_here, f1_here = (np.where(empty, ~has_answer, scores) for scores in (exact, f1))
    figures = _means(exact_here, f1_here)
    for prefix, chosen in (("HasAns", has_answer), ("NoAns", ~has_answer)):
        if chosen.any():
            part = _means(exact_here[chosen], f1_here[chosen])
            figures |= {f"{prefix}_{name}": value for name, value in part.items()}
    given = np.array([bool(predictions[question.id]) for question in questions])
    for name, scores in (("exact", exact), ("f1", f1)):
        best, threshold = _best_threshold(scores, has_answer, given, differences)
        figures |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return figures


def write_predictions(
    folder: Path,
    questions: Sequence[Question],
    answers: Sequence[Answers],
    with_null: bool,
    null_threshold: float = 0.0,
) -> list[Path]:
    """Write predictions.json, nbest_predictions.json and, with_null, null_odds.json.

    Args:
        folder: where to.
        questions, answers: one for each.
        with_null: as SQuAD 2.0: predictions may be empty.
        null_threshold: they are where the null difference exceeds it.

    Returns:
        The files.
    """
    texts, nbest, odds = {}, {}, {}
    for question, own in zip(questions, answers, strict=True):
        empty = not own.spans or (with_null and own.null_difference > null_threshold)
        texts[question.id] = "" if empty else own.spans[0].text
        odds[question.id] = own.null_difference
        nbest[question.id] = [
            {
                "text": span.text,
                "probability": probability,
                "start_logit": span.start_logit,
                "end_logit": span.end_logit,
            }
            for span, probability in own.ranked(with_null)
        ]
    contents: dict[str, object] = {PREDICTIONS: texts, NBEST: nbest}
    if with_null:
        contents[NULL_ODDS] = odds
    for name, content in contents.items():
        write_text(folder / name, json.dumps(content, ensure_ascii=False, indent=4) + "\n")
    return [folder / name for name in contents]


def _right_texts(question: Question) -> list[str]:
    """The right answers that have any words in their normal form."""
    return [answer.text for answer in question.answers if normalize_answer(answer.text)]


def _scores(question: Question, prediction: str) -> tuple[float, float]:
    """(exact, f1) in 0..1."""
    right = _right_texts(question) or [""]
    return (
        max(exact_match(answer, prediction) for answer in right),
        max(word_f1(answer, prediction) for answer in right),
    )


def _means(exact: NDArray[np.float64], f1: NDArray[np.float64]) -> dict[str, float]:
    return {
        "exact": 100 * float(exact.mean()),
        "f1": 100 * float(f1.mean()),
        "total": float(len(exact)),
    }


def _best_threshold(
    scores: NDArray[np.float64],
    has_answer: NDArray[np.bool_],
    given: NDArray[np.bool_],
    differences: NDArray[np.float64],
) -> tuple[float, float]:
    """(best score in percent, the threshold that gives it).

    Below all differences every prediction is empty, and the questions without answer are right.
    Each difference that the threshold passes gives one prediction back: it gains the score of a
    question with an answer, or loses one without, unless the prediction is empty anyway.
    """
    order = np.argsort(differences, kind="stable")
    gains = np.where(has_answer, scores, -given.astype(np.float64))[order]
    totals = np.concatenate(([0.0], np.cumsum(gains))) + (~has_answer).sum()
    best = int(totals.argmax())
    threshold = float(differences[order[best - 1]]) if best else 0.0
    return 100 * float(totals[best]) / len(scores), threshold
