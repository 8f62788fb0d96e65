"""SQuAD's figures by their rules, thresholds against a search, and the prediction files."""

import json

import numpy as np
import pytest

from bertkern.data.answer_spans import Answers, Span
from bertkern.data.question_answering import Answer, Question
from bertkern.train.squad import (
    exact_match,
    normalize_answer,
    squad_figures,
    word_f1,
    write_predictions,
)


def test_normal_form():
    assert normalize_answer(" The  Cat's\nhat, a dog! ") == "cats hat dog"
    assert normalize_answer("an-other theatre") == "another theatre"
    assert normalize_answer("The.") == ""
    assert normalize_answer("Café “x”") == "café “x”"  # quotes that are not ASCII stay


def test_scores_of_one_answer():
    assert exact_match("The Cat", "cat!") == 1
    assert exact_match("cat", "cats") == 0
    assert word_f1("the big black cat", "big cat cat") == pytest.approx(2 * 2 / (3 + 3))
    assert word_f1("cat", "dog") == 0
    assert word_f1("", "the") == word_f1("a", "") == 1
    assert word_f1("cat", "") == 0


def question(number, *answers, impossible=False):
    return Question(
        str(number), "?", "context", tuple(Answer(text, 0) for text in answers), impossible
    )


def test_the_best_of_several_answers():
    questions = [question(0, "the cat", "big cat"), question(1, "dog")]
    figures = squad_figures(questions, {"0": "Big cat", "1": "a dog house"})
    assert figures == {"exact": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 2), "total": 2.0}
    with pytest.raises(ValueError, match=r"1 of 2 questions have no prediction: \['1'\]"):
        squad_figures(questions, {"0": "x"})


@pytest.fixture
def drawn():
    """200 questions, a third without answer, and predictions that are often right."""
    rng = np.random.default_rng(0)
    texts = ["cat", "big cat", "dog", "house", "big house"]
    questions, predictions, differences = [], {}, {}
    for i in range(200):
        right = str(rng.choice(texts))
        impossible = bool(rng.random() < 0.35)
        questions.append(question(i, *([] if impossible else [right]), impossible=impossible))
        predictions[str(i)] = right if rng.random() < 0.5 else str(rng.choice(texts))
        differences[str(i)] = float(rng.normal(2.0 if impossible else -2.0, 2.0))
    return questions, predictions, differences


def by_hand(questions, predictions, differences, threshold):
    """(exact, f1) of each question, one after the other."""
    scores = []
    for q in questions:
        text = "" if differences[q.id] > threshold else predictions[q.id]
        right = [a.text for a in q.answers] or [""]
        scores.append([max(f(a, text) for a in right) for f in (exact_match, word_f1)])
    return 100 * np.array(scores)


@pytest.mark.parametrize("threshold", [0.0, -1.5, 3.0])
def test_questions_without_answer(drawn, threshold):
    questions, predictions, differences = drawn
    figures = squad_figures(questions, predictions, differences, threshold)
    scores = by_hand(questions, predictions, differences, threshold)
    answered = np.array([not q.impossible for q in questions])
    for prefix, chosen in (("", answered | True), ("HasAns_", answered), ("NoAns_", ~answered)):
        exact, f1 = scores[chosen].mean(0)
        assert figures[f"{prefix}exact"] == pytest.approx(exact)
        assert figures[f"{prefix}f1"] == pytest.approx(f1)
        assert figures[f"{prefix}total"] == chosen.sum()


def test_best_thresholds(drawn):
    questions, predictions, differences = drawn
    figures = squad_figures(questions, predictions, differences)
    candidates = [min(differences.values()) - 1, *differences.values()]
    means = [by_hand(questions, predictions, differences, t).mean(0) for t in candidates]
    for column, name in enumerate(("exact", "f1")):
        assert figures[f"best_{name}"] == pytest.approx(max(mean[column] for mean in means))
        threshold = figures[f"best_{name}_thresh"]
        there = by_hand(questions, predictions, differences, threshold).mean(0)[column]
        assert there == pytest.approx(figures[f"best_{name}"])
        assert figures[f"best_{name}"] > figures[name]


def test_prediction_files(tmp_path):
    spans = [Span("Café", 3, 7, 2.0, 1.0), Span("x", 0, 1, 1.0, 1.0)]
    answers = [
        Answers(spans, Span("", 0, 0, 0.5, 0.0)),
        Answers(spans[1:], Span("", 0, 0, 2.0, 2.0)),
        Answers([], Span("", 0, 0, 0.0, 0.0)),
    ]
    questions = [question(i) for i in range(3)]
    files = write_predictions(tmp_path / "one", questions, answers, with_null=False)
    assert [f.name for f in files] == ["predictions.json", "nbest_predictions.json"]
    assert json.loads(files[0].read_text("utf-8")) == {"0": "Café", "1": "x", "2": ""}
    nbest = json.loads(files[1].read_text("utf-8"))
    p = 1 / (1 + np.exp(-1))
    assert nbest["0"] == [
        {"text": "Café", "probability": pytest.approx(p), "start_logit": 2.0, "end_logit": 1.0},
        {"text": "x", "probability": pytest.approx(1 - p), "start_logit": 1.0, "end_logit": 1.0},
    ]
    assert nbest["2"] == [{"text": "", "probability": 1.0, "start_logit": 0.0, "end_logit": 0.0}]
    files = write_predictions(tmp_path / "two", questions, answers, True, null_threshold=1.0)
    assert json.loads(files[0].read_text("utf-8")) == {"0": "Café", "1": "", "2": ""}
    assert json.loads(files[2].read_text("utf-8")) == {"0": -2.5, "1": 2.0, "2": 0.0}
    assert [entry["text"] for entry in json.loads(files[1].read_text("utf-8"))["1"]] == ["", "x"]
