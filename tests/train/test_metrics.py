"""Figures against their definitions, intervals against SciPy's."""

import sys
import warnings

import numpy as np
import pytest
import scipy.stats

from bertkern.train.metrics import (
    Entity,
    classification_figures,
    entities,
    entity_figures,
    regression_figures,
    wilson_interval,
)


def test_wilson_interval_is_scipys():
    for total in (1, 2, 7, 100, 277, 10_000):
        for right in {0, 1, total // 3, total - 1, total}:
            interval = scipy.stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
            np.testing.assert_allclose(wilson_interval(right, total), interval, atol=1e-12)
    for right, total in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=rf"right = {right} must be in 0..total, and total ="):
            wilson_interval(right, total)


def test_two_classes():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, (2, 200))
    tp, tn, fp, fn = (
        int(((labels == a) & (predictions == b)).sum()) for a, b in ((1, 1), (0, 0), (0, 1), (1, 0))
    )
    figures = classification_figures(labels, predictions, 2)
    assert figures == pytest.approx(
        {
            "accuracy": (tp + tn) / 200,
            "f1": 2 * tp / (2 * tp + fp + fn),
            "mcc": (tp * tn - fp * fn)
            / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
        }
    )
    constant = classification_figures(labels, np.zeros(200, dtype=int), 2)
    assert (constant["f1"], constant["mcc"]) == (0, 0)


def test_one_class_alone_is_no_cause_for_a_warning():
    """As in a held-out share of a few examples; scikit-learn's warnings would reach the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for classes in (2, 3):
            figures = classification_figures(np.ones(3, dtype=int), np.ones(3, dtype=int), classes)
            assert (figures["accuracy"], figures["mcc"]) == (1, 0)


def test_several_classes():
    """A class that is neither there nor predicted counts as 0 in the macro mean."""
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, (2, 200))
    f1 = []
    for c in range(4):
        both = ((labels == c) & (predictions == c)).sum()
        either = (labels == c).sum() + (predictions == c).sum()
        f1.append(2 * both / either if either else 0.0)
    figures = classification_figures(labels, predictions, 4)
    assert figures["f1_macro"] == pytest.approx(np.mean(f1))
    assert figures["accuracy"] == pytest.approx((labels == predictions).mean())
    assert "f1" not in figures


def test_scores():
    rng = np.random.default_rng(0)
    labels = rng.standard_normal(50).astype(np.float32)
    predictions = (labels + rng.standard_normal(50)).astype(np.float32)
    figures = regression_figures(labels, predictions)
    assert figures["pearson"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1], rel=1e-5)
    ranks = [values.argsort().argsort() for values in (labels, predictions)]
    assert figures["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-6)
    assert figures["mean_squared_error"] == pytest.approx(((labels - predictions) ** 2).mean())
    flat = regression_figures(labels, np.ones(50, dtype=np.float32))
    assert (flat["pearson"], flat["spearman"]) == (0, 0)


def drawn(rng, words):
    """Random entities of a sentence that do not overlap."""
    found, word = [], 0
    while word < words:
        word += int(rng.integers(0, 3))
        last = word + int(rng.integers(0, 3))
        if last < words:
            found.append(Entity(str(rng.choice(["PER", "LOC"])), word, last))
        word = last + 1
    return found


def tagged(found, words, scheme):
    """The tags of entities in one of the schemes."""
    tags, before = ["O"] * words, None
    for entity in found:
        first, last = entity.first, entity.last
        touches = before is not None and before.last == first - 1 and before.type == entity.type
        for word in range(first, last + 1):
            prefix = "I"
            if scheme == "IOB1":
                prefix = "B" if word == first and touches else "I"
            elif word == first:
                prefix = "B"
            if scheme == "IOBES":
                if first == last:
                    prefix = "S"
                elif word == last:
                    prefix = "E"
            tags[word] = f"{prefix}-{entity.type}"
        before = entity
    return tags


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES"])
def test_entities_of_every_scheme(scheme):
    rng = np.random.default_rng(0)
    counts = 0
    for _ in range(300):
        words = int(rng.integers(1, 12))
        found = drawn(rng, words)
        assert entities(tagged(found, words, scheme)) == found
        counts += len(found)
    assert counts > 300


def test_entities_of_broken_tags():
    """As CoNLL's script: I behind O or another type begins an entity; E and S end theirs."""
    assert entities(["I-A", "I-B", "O", "E-A", "I-A"]) == [
        Entity("A", 0, 0),
        Entity("B", 1, 1),
        Entity("A", 3, 3),
        Entity("A", 4, 4),
    ]
    assert entities(["B-A", "S-A", "I-A"]) == [Entity("A", i, i) for i in range(3)]
    assert entities(["noun", "noun", "verb", "O"]) == [Entity("noun", 0, 1), Entity("verb", 2, 2)]
    assert entities([]) == entities(["O"]) == []


def test_entity_figures():
    tags = [["B-A", "I-A", "O", "B-B"], ["B-A", "O"]]
    predictions = [["B-A", "I-A", "O", "B-A"], ["O", "B-A"]]
    assert entity_figures(tags, predictions) == pytest.approx(
        {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "accuracy": 3 / 6}
    )
    nothing = entity_figures([["O"]], [["O"]])
    assert nothing == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
    with pytest.raises(ValueError, match="1 predictions for 2 words"):
        entity_figures([["O", "O"]], [["O"]])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"scikit-learn .*pip install 'bertkern\[train\]'"
    ):
        classification_figures(np.zeros(1), np.zeros(1), 2)
