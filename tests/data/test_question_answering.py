"""Questions in SQuAD's form, their windows and the places of the answers."""

import json

import numpy as np
import pytest
import transformers

from bertkern.data import save_tokenizer
from bertkern.data.question_answering import (
    IMPOSSIBLE,
    Answer,
    Question,
    QuestionAnsweringData,
    WindowSettings,
    make_windows,
    read_questions,
)

CONTEXT = "The café 😀 in Ne\u0301w York, naïve dogs: it sat in 1895-1943 (Ann Lee)."


def answer(text, context=CONTEXT):
    return {"text": text, "answer_start": context.index(text)}


def squad(*qas, context=CONTEXT):
    paragraphs = [{"context": context, "qas": list(qas)}]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


def asked(identifier, *texts, **others):
    return {"id": identifier, "question": "Where?", "answers": [answer(t) for t in texts]} | others


def test_squad_files(write):
    whole = squad(
        asked("a", "dogs", "naïve dogs"),
        asked("b", is_impossible=True, plausible_answers=[answer("York")]),
        asked("c", "1895", is_impossible=False),
    )
    whole["data"][0]["paragraphs"].append({"context": "x", "qas": [{"id": "d", "question": "?"}]})
    for text in (json.dumps(whole), json.dumps(whole, indent=2, ensure_ascii=False)):
        questions = read_questions(write("dev.json", text))
        assert [q.id for q in questions] == ["a", "b", "c", "d"]
        start = CONTEXT.index("naïve")
        assert questions[0].answers == (Answer("dogs", start + 6), Answer("naïve dogs", start))
        assert [q.impossible for q in questions] == [False, True, False, False]
        assert [q.labelled for q in questions] == [True, True, True, False]
        assert questions[1].answers == ()
    with pytest.raises(
        ValueError, match=r"data\[0\].paragraphs\[1\].qas\[0\]: question id 'd': no"
    ):
        read_questions(write("dev.json", json.dumps(whole)), labelled=True)


def test_json_lines(write):
    listed = {"text": ["dogs"], "answer_start": [CONTEXT.index("dogs")]}
    rows = [
        {"id": 1, "question": "Where?", "context": CONTEXT, "answers": listed},
        {"id": "2", "question": "Who?", "context": CONTEXT, "answers": [answer("Ann Lee")]},
        {"id": "3", "question": "Why?", "context": CONTEXT, "answers": []},
        {"id": "4", "question": "How?", "context": CONTEXT},
    ]
    lines = "\n".join(map(json.dumps, rows))
    for path in (
        write("a.jsonl", lines),
        write("b.json", lines),
        write("c.json", json.dumps(rows)),
    ):
        questions = read_questions(path)
        assert [q.id for q in questions] == ["1", "2", "3", "4"]
        assert questions[0].answers[0].text == "dogs"
        assert [q.impossible for q in questions] == [False, False, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (squad(asked("a", "dogs", answers=[{"text": "dogs", "answer_start": 3}])),
         r"q.json: data\[0\].paragraphs\[0\].qas\[0\].answers\[0\]: question id 'a': the answer "
         r"'dogs' does not stand at answer_start = 3 of the context, which has ' caf' there"),
        (squad(asked("a", answers=[{"text": "", "answer_start": 3}])), r"the answer '' does not"),
        (squad(asked("a", answers=[{"text": "dogs", "answer_start": -1}])),
         r"answers\[0\]: 'answer_start' must be a number from 0, not -1"),
        (squad(asked("a", answers=[{"text": "dogs"}])), r"answers\[0\]: no 'answer_start'; found"),
        (squad(asked("a", "dogs"), asked("a", "1895")),
         r"qas\[1\]: id 'a' was already at .*qas\[0\]"),
        (squad(asked("a", "dogs", is_impossible=True)), r"'a': 1 answer\(s\) and is_impossible"),
        (squad(asked("a", is_impossible=False)), r"'a': 0 answer\(s\) and is_impossible = f"),
        (squad(asked("a", is_impossible="no")), r"'is_impossible' must be true or false, not 'no'"),
        (squad({"question": "?", "answers": []}), r"qas\[0\]: no 'id'; found: 'question'"),
        (squad({"id": "a", "answers": []}), r"qas\[0\]: no 'question'"),
        (squad(asked("a"), context=" "), r"paragraphs\[0\]: 'context' is empty"),
        (squad(asked("a"), context=7), r"paragraphs\[0\]: 'context' must be text, not 7"),
        ({"data": [{"paragraphs": {}}]}, r"data\[0\]: 'paragraphs' must be a list, not {}"),
        ({"data": [3]}, r"data\[0\]: an object was expected, not 3"),
        ({"data": []}, r"q.json: no question"),
        ({"version": "1"}, r"q.json: no 'data'; found: 'version'"),
    ],
)  # fmt: skip
def test_refusals(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write("q.json", json.dumps(content)))


def test_truncated_files(write):
    text = json.dumps(squad(asked("a", "dogs")), indent=1)
    with pytest.raises(ValueError, match=r"q.json: line 1\d: not JSON"):
        read_questions(write("q.json", text[:-60]))
    with pytest.raises(ValueError, match=r"q.jsonl: line 2: not JSON"):
        read_questions(write("q.jsonl", '{"id": 1, "question": "?", "context": "x"}\n{"id'))
    with pytest.raises(ValueError, match=r"q.csv: .*must end in .json or .jsonl"):
        read_questions(write("q.csv", text))


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    vocabulary = ["cat", "Café", "dog,", "zzqx", "1895-1943", "e\u0301te\u0301", "😀", "naïve"]
    found = []
    for i in range(40):
        words = list(rng.choice(vocabulary, rng.integers(1, 60)))
        first = int(rng.integers(len(words)))
        last = min(len(words), first + int(rng.integers(1, 4)))
        start = len(" ".join(words[:first])) + (first > 0)
        answers = (Answer(" ".join(words[first:last]), start),)
        question = " ".join(rng.choice(vocabulary, rng.integers(1, 5)))
        impossible = i % 5 == 0
        context = " ".join(words)
        assert context[start:].startswith(answers[0].text)
        found.append(Question(str(i), question, context, () if impossible else answers, impossible))
    return found


SETTINGS = WindowSettings(max_length=40, stride=11, max_query_length=20)


def test_windows_are_those_of_transformers(questions, words, tmp_path):
    save_tokenizer(words, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    windows = make_windows(questions, words, SETTINGS)
    assert len(windows) > 2 * len(questions)
    left = iter(windows)
    for number, question in enumerate(questions):
        query = len(theirs(question.question, add_special_tokens=False)["input_ids"])
        assert query <= SETTINGS.max_query_length
        expected = theirs(
            question.question,
            question.context,
            truncation="only_second",
            max_length=SETTINGS.max_length,
            stride=SETTINGS.max_length - query - 3 - SETTINGS.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for w in range(len(expected["input_ids"])):
            window = next(left)
            assert window.question == number
            assert window.input_ids == expected["input_ids"][w]
            assert window.token_type_ids == expected["token_type_ids"][w]
            for i, side in enumerate(expected.sequence_ids(w)):
                first, last = expected["offset_mapping"][w][i] if side == 1 else (-1, -1)
                behind = question.context[last : last + 1] if side == 1 else ""
                # the accent that ends a word is stripped from the token, but not from the text
                assert tuple(window.offsets[i]) == (first, last + (behind == "\u0301"))
    assert next(left, None) is None


def test_answers_cover_their_characters_and_no_more(questions, words):
    """Of all windows that hold the whole answer; the others point at [CLS]."""
    found = set()
    for window in make_windows(questions, words, SETTINGS):
        question = questions[window.question]
        if question.impossible:
            assert window.answer == IMPOSSIBLE
            continue
        right = question.answers[0]
        end = right.start + len(right.text)
        inside = [
            i for i, (a, b) in enumerate(window.offsets) if a >= 0 and a < end and b > right.start
        ]
        own = window.offsets[window.offsets[:, 0] >= 0]
        if own[0, 0] <= right.start and own[-1, 1] >= end:
            assert window.answer == (inside[0], inside[-1])
            text = question.context[window.offsets[inside[0], 0] : window.offsets[inside[-1], 1]]
            assert text == right.text
            found.add(window.question)
        else:
            assert window.answer == IMPOSSIBLE
    assert found == {i for i, q in enumerate(questions) if not q.impossible}


def test_most_context(questions, words):
    """By the rule's words: each token counts in exactly one window, the one of the best score."""
    windows = make_windows(questions, words, SETTINGS)
    for number in range(len(questions)):
        own = [w for w in windows if w.question == number]
        scores = {}  # (first character, last) of a token -> (score, window, place), best first
        for w, window in enumerate(own):
            places = np.flatnonzero(window.offsets[:, 0] >= 0)
            for i in places:
                before, behind = i - places[0], places[-1] - i
                score = min(before, behind) + 0.01 * len(places)
                scores.setdefault(tuple(window.offsets[i]), []).append((score, -w, i))
        marked = {
            (w, i) for w, window in enumerate(own) for i in np.flatnonzero(window.max_context)
        }
        assert marked == {(-w, i) for _, w, i in (max(entries) for entries in scores.values())}


def test_data(questions, words):
    data = QuestionAnsweringData(questions, words, SETTINGS)
    features = data.features
    assert len(data) == len(data.windows) == len(features)
    assert data.has_impossible
    for number, (window, start, end) in enumerate(
        zip(
            data.windows,
            features.example_labels["start_positions"],
            features.example_labels["end_positions"],
            strict=True,
        )
    ):
        assert window.answer == (start, end)
        part = slice(features.starts[number], features.starts[number + 1])
        assert features.input_ids[part].tolist() == window.input_ids
    assert [n for numbers in data.windows_of() for n in numbers] == list(range(len(data)))
    without = sum(
        w.answer == IMPOSSIBLE and not questions[w.question].impossible for w in data.windows
    )
    assert data.notes == [
        f"{without} of {len(data)} windows do not hold their question's answer; they count as "
        "without answer"
    ]
    unlabelled = QuestionAnsweringData([Question("1", "Where?", "The cat.")], words, SETTINGS)
    assert not unlabelled.features.example_labels


def test_long_questions_are_cut_and_counted(words):
    long = Question("1", "dog " * 50, "The cat sat.", (Answer("cat", 4),))
    data = QuestionAnsweringData([long], words, SETTINGS)
    (window,) = data.windows
    assert window.token_type_ids.index(1) == 20 + 2
    assert data.notes == ["1 of 1 questions cut to 20 tokens"]


def test_unusable_settings_and_answers(words):
    with pytest.raises(ValueError, match=r"max_length = 384 leaves 317 tokens .* stride = 318 or"):
        WindowSettings(stride=318)
    with pytest.raises(ValueError, match="stride must be at least 1, not 0"):
        WindowSettings(stride=0)
    invisible = Question("7", "?", "a \u200b b", (Answer("\u200b", 2),), place="f.json: data[0]")
    with pytest.raises(
        ValueError, match=r"f.json: data\[0\]: question id '7': the tokenizer leaves"
    ):
        make_windows([invisible], words)
