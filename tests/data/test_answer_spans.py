"""The best answers of a question, against a search over all spans of all windows."""

import numpy as np
import pytest

from bertkern.data import train_tokenizer
from bertkern.data.answer_spans import best_answers
from bertkern.data.question_answering import Question, WindowSettings, make_windows

CONTEXT = "the cat sat on the mat and the dog saw the cat in New York today with Ann " * 3


@pytest.fixture(scope="module")
def windows(words):
    question = Question("1", "where did the dog go", CONTEXT)
    found = make_windows([question], words, WindowSettings(30, 9, 10))
    assert len(found) > 4
    return found


def logits_of(windows, seed, scale=2.0):
    rng = np.random.default_rng(seed)
    return [
        [(rng.standard_normal(len(w.input_ids)) * scale).astype(np.float32) for w in windows]
        for _ in range(2)
    ]


def all_spans(windows, starts, ends, most):
    """Every text with the best score of its spans, and the least null score."""
    best = {}
    for window, s, e in zip(windows, starts, ends, strict=True):
        for i in range(len(s)):
            for j in range(i, min(len(s), i + most)):
                if window.max_context[i] and window.offsets[j, 0] >= 0:
                    text = CONTEXT[window.offsets[i, 0] : window.offsets[j, 1]]
                    score = float(s[i]) + float(e[j])
                    best[text] = max(score, best.get(text, -np.inf))
    null = min(float(s[0]) + float(e[0]) for s, e in zip(starts, ends, strict=True))
    return sorted(best.items(), key=lambda entry: -entry[1]), null


@pytest.mark.parametrize("most", [1, 3, 30])
def test_all_spans(windows, most):
    for seed in range(5):
        starts, ends = logits_of(windows, seed)
        expected, null = all_spans(windows, starts, ends, most)
        found = best_answers(CONTEXT, windows, starts, ends, 10_000, most)
        assert [s.text for s in found.spans] == [text for text, _ in expected]
        assert [s.score for s in found.spans] == [score for _, score in expected]
        assert all(CONTEXT[s.start : s.end] == s.text for s in found.spans)
        assert found.null.score == null
        assert found.null_difference == null - expected[0][1]


def test_n_best_are_the_best(windows):
    """The n best starts and ends of each window hold its best spans, if it has any among them."""
    for seed in range(5):
        starts, ends = logits_of(windows, seed)
        whole = best_answers(CONTEXT, windows, starts, ends, 10_000).spans
        few = best_answers(CONTEXT, windows, starts, ends, 5).spans
        assert len(few) == 5
        assert len({s.text for s in few}) == 5
        assert [s.score for s in few] == sorted((s.score for s in few), reverse=True)
        assert few[0].score <= whole[0].score
        assert {(s.text, s.score) for s in few} <= {(s.text, s.score) for s in whole}


def test_probabilities(windows):
    starts, ends = logits_of(windows, 0)
    found = best_answers(CONTEXT, windows, starts, ends, 20)
    for with_null in (False, True):
        ranked = found.ranked(with_null)
        scores = np.array([span.score for span, _ in ranked])
        assert (np.diff(scores) <= 0).all()
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose([p for _, p in ranked], expected, rtol=1e-12)
        assert sum(span.text == "" for span, _ in ranked) == with_null
        assert len(ranked) == 20 + with_null


def test_logits_of_the_question_are_no_answer(windows):
    """However large they are; and a window's start is one where it has most context."""
    starts, ends = logits_of(windows, 1, scale=0.1)
    for window, s, e in zip(windows, starts, ends, strict=True):
        s[window.offsets[:, 0] < 0] = e[window.offsets[:, 0] < 0] = 100.0
    found = best_answers(CONTEXT, windows, starts, ends, 3)
    assert len(found.spans) == 3
    assert found.null.score == 200
    assert found.null_difference > 190


def test_answers_of_byte_level_tokens_have_no_white_space_around_them():
    """Their tokens begin with the space before the word, and a line end is one by itself."""
    context = "the cat\nsat on \n the mat"
    tokenizer = train_tokenizer([context] * 9, 300, kind="bpe", min_frequency=1)
    (window,) = make_windows([Question("1", "where", context)], tokenizer)
    places = window.offsets[window.offsets[:, 0] >= 0]
    assert any(context[a:b].startswith(" ") for a, b in places)
    assert any(not context[a:b].strip() for a, b in places)
    starts, ends = logits_of([window], 0)
    found = best_answers(context, [window], starts, ends, 10_000)
    assert len(found.spans) > 15
    for span in found.spans:
        assert span.text == context[span.start : span.end] == span.text.strip() != ""


def test_a_context_without_words(words):
    windows = make_windows([Question("1", "where", "\u200b")], words)
    found = best_answers("\u200b", windows, [np.ones(4)], [np.ones(4)])
    assert found.spans == []
    assert found.null_difference == 0
    assert [(span.text, p) for span, p in found.ranked(False)] == [("", 1.0)]
    with pytest.raises(ValueError, match="0 windows, n_best = 20"):
        best_answers("", [], [], [])
