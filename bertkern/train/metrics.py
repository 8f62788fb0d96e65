"""Figures of held-out predictions: classes, scores, entities; and how sure an accuracy is.

    accuracy    share of right labels, with Wilson's interval (Wilson 1927)
    f1, mcc     of class 1 of two (GLUE's for MRPC, QQP and CoLA); f1_macro of more classes
    pearson, spearman    correlations of scores (GLUE's for STS-B)
    entities    F1 of whole entities, as CoNLL's script counts them (Tjong Kim Sang and De Meulder
                2003): right is one with the same first and last word and the same type

scikit-learn and SciPy compute all but the entities.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from numpy.typing import NDArray

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


class Entity(NamedTuple):
    """Words first .. last of a sentence are one entity of a type."""

    type: str
    first: int
    last: int


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, right / total, by Wilson's score (1927).

    (c ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n) with c = p + z²/2n

    Raises:
        ValueError: total is less than 1, or right is not in 0..total.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"right = {right} must be in 0..total, and total = {total} at least 1")
    p, square = right / total, _Z95 * _Z95 / total
    middle = p + square / 2
    width = _Z95 * math.sqrt(p * (1 - p) / total + square / (4 * total))
    return max(0.0, (middle - width) / (1 + square)), min(1.0, (middle + width) / (1 + square))


def classification_figures(
    labels: NDArray[Any], predictions: NDArray[Any], classes: int
) -> dict[str, float]:
    """accuracy; f1 and mcc for two classes, f1_macro and mcc for more. mcc is 0 where only one
    class occurs.

    Args:
        labels, predictions: class numbers, [E].
        classes: how many there are.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    sklearn = _need("sklearn.metrics", "scikit-learn")
    figures = {"accuracy": float(sklearn.accuracy_score(labels, predictions))}
    if classes == 2:
        figures["f1"] = float(sklearn.f1_score(labels, predictions, zero_division=0.0))
    else:
        numbers = list(range(classes))
        figures["f1_macro"] = float(
            sklearn.f1_score(
                labels, predictions, labels=numbers, average="macro", zero_division=0.0
            )
        )
    one_class = len({*labels.tolist(), *predictions.tolist()}) < 2  # of which it would warn
    figures["mcc"] = 0.0 if one_class else float(sklearn.matthews_corrcoef(labels, predictions))
    return figures


def regression_figures(labels: NDArray[Any], predictions: NDArray[Any]) -> dict[str, float]:
    """pearson, spearman (0 where either side is constant) and the mean squared error.

    Args:
        labels, predictions: scores, [E].

    Raises:
        ModuleNotFoundError: SciPy is not installed.
    """
    stats = _need("scipy.stats", "scipy")
    constant = len(labels) < 2 or min(map(float, (labels.std(), predictions.std()))) == 0
    pearson = spearman = 0.0
    if not constant:
        pearson = float(stats.pearsonr(labels, predictions).statistic)
        spearman = float(stats.spearmanr(labels, predictions).statistic)
    error = float(((labels - predictions) ** 2).mean())
    return {"pearson": pearson, "spearman": spearman, "mean_squared_error": error}


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence's tags, in order.

    Tags are "O", "B-type", "I-type" (IOB1 and IOB2), also "E-" (last) and "S-" (single). An entity
    begins at B and S, and at I or E behind another type or behind none; it ends before such a
    beginning, before O, and behind E and S. A tag without a "-" is a type of its own.
    """
    found: list[Entity] = []
    first: int | None = None
    type_before = ""
    for word, tag in enumerate([*tags, "O"]):
        prefix, _, type_here = tag.partition("-") if "-" in tag else ("I", "", tag)
        outside = tag == "O"
        begins = not outside and (prefix in ("B", "S") or first is None or type_here != type_before)
        if first is not None and (outside or begins):
            found.append(Entity(type_before, first, word - 1))
            first = None
        if begins:
            first, type_before = word, type_here
        if not outside and prefix in ("E", "S"):
            assert first is not None
            found.append(Entity(type_here, first, word))
            first = None
    return found


def entity_figures(
    tags: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """precision, recall and f1 of entities over all sentences, and the accuracy of words' tags.

    Raises:
        ValueError: a sentence whose predictions are not as many as its tags.
    """
    right = wanted = given = right_words = words = 0
    for own, predicted in zip(tags, predictions, strict=True):
        if len(own) != len(predicted):
            raise ValueError(f"{len(predicted)} predictions for {len(own)} words")
        truth, guess = set(entities(own)), set(entities(predicted))
        right += len(truth & guess)
        wanted += len(truth)
        given += len(guess)
        right_words += sum(a == b for a, b in zip(own, predicted, strict=True))
        words += len(own)
    precision = right / given if given else 0.0
    recall = right / wanted if wanted else 0.0
    total = precision + recall
    return {
        "f1": 2 * precision * recall / total if total else 0.0,
        "precision": precision,
        "recall": recall,
        "accuracy": right_words / max(words, 1),
    }


def _need(module: str, package: str) -> ModuleType:
    """Import what the figures are computed with."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the held-out figures need the package {package} ({error}): "
            "pip install 'bertkern[train]'"
        ) from error
