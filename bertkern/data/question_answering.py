"""Questions whose answer is a span of a text: SQuAD's files, and the windows that a model reads.

    [CLS] question [SEP] part of the context [SEP]

SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018): JSON with paragraphs, questions and, in 2.0,
`is_impossible`, whose plausible answers are not looked at. Or JSON lines {"id", "question",
"context", "answers"}, with answers as [{"text", "answer_start"}] or {"text": [..],
"answer_start": [..]}.

A long context is read in windows (Devlin et al. 2018, section 4.2, and its code): a window begins
`stride` tokens after the one before. A token in several windows counts only in the one where it has
most context: the greatest min(tokens before, tokens behind), plus a hundredth of the window's
length; the first of equals. All places are characters of the context as Python counts them, as the
tokenizer reports them: answers are cut from the text itself.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .features import Features, TokenSequence, sequence_of
from .tables import KINDS, Row, UniqueIds, parse_json, read_table, read_utf8
from .tokenizer import SpecialIds

IMPOSSIBLE = (0, 0)  # the span of a window without the answer: its [CLS]
_NOWHERE = (-1, -1)  # the tokens of the context that answer a question which has no answer


@dataclass(frozen=True)
class Answer:
    """A span of the context: context[start : start + len(text)] == text."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question and the text that is to answer it.

    Attributes:
        id, question, context: texts.
        answers: those that are right (training takes the first).
        impossible: the context has no answer (SQuAD 2.0).
        place: where it stands, for messages.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    impossible: bool = False
    place: str = ""

    @property
    def labelled(self) -> bool:
        """Whether it is known what is right."""
        return bool(self.answers) or self.impossible


@dataclass(frozen=True)
class WindowSettings:
    """How contexts become windows.

    Attributes:
        max_length: most tokens of a window, question included.
        stride: tokens from the beginning of a window to that of the next one.
        max_query_length: longer questions are cut.
    """

    max_length: int = 384
    stride: int = 128
    max_query_length: int = 64

    def __post_init__(self) -> None:
        for name in ("stride", "max_query_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        room = self.max_length - self.max_query_length - 3
        if room < self.stride:
            raise ValueError(
                f"max_length = {self.max_length} leaves {room} tokens of a context beside a "
                f"question of max_query_length = {self.max_query_length} and 3 special tokens; "
                f"they must be stride = {self.stride} or more, or tokens would be left out: lower "
                "stride (--stride) or max_query_length, or raise max_length (--max-length)"
            )


@dataclass(frozen=True)
class Window:
    """What the model reads at once.

    Attributes:
        question: number of the question.
        input_ids, token_type_ids: of its n tokens.
        offsets: int64 [n, 2], first character of each token in the context and the one behind its
            last; -1 at tokens that are not of the context.
        max_context: bool [n], tokens of the context that have most context in this window.
        answer: first and last token of the first right answer; IMPOSSIBLE where there is none or it
            is not wholly in this window; None where it is not known.
    """

    question: int
    input_ids: list[int]
    token_type_ids: list[int]
    offsets: NDArray[np.int64]
    max_context: NDArray[np.bool_]
    answer: tuple[int, int] | None = None


def read_questions(path: str | os.PathLike[str], labelled: bool | None = None) -> list[Question]:
    """Read SQuAD's JSON, or JSON lines. An empty list of answers says that there is none.

    Args:
        path: .json or .jsonl.
        labelled: True: a question without `answers` and `is_impossible` is an error; None: either
            way.

    Raises:
        FileNotFoundError: no such file.
        ValueError: malformed JSON (file and line); something missing or of the wrong type, an
            answer that does not stand at its answer_start, an id that comes twice (file and the
            path of the object, or the line, and the id); no question.
    """
    path = Path(path)
    if KINDS.get(path.suffix.lower()) not in ("json", "jsonl"):
        raise ValueError(f"{path}: the file's name must end in .json or .jsonl")
    rows = _squad_rows(path) if path.suffix.lower() == ".json" else None
    if rows is None:
        rows = [(row, row) for row in read_table(path).rows]
    seen = UniqueIds()
    questions = [_question(row, holder, seen, labelled) for row, holder in rows]
    if not questions:
        raise ValueError(f"{path}: no question")
    return questions


def make_windows(
    questions: Sequence[Question], tokenizer: Tokenizer, settings: WindowSettings | None = None
) -> list[Window]:
    """The windows of all questions, in order, one at least for each.

    Raises:
        ValueError: the tokenizer leaves nothing of a right answer.
    """
    settings = settings or WindowSettings()
    special = SpecialIds.of(tokenizer)
    contexts = list(dict.fromkeys(question.context for question in questions))
    encodings = dict(
        zip(contexts, tokenizer.encode_batch(contexts, add_special_tokens=False), strict=True)
    )
    asked = tokenizer.encode_batch([q.question for q in questions], add_special_tokens=False)
    windows = []
    for number, (question, encoding) in enumerate(zip(questions, asked, strict=True)):
        query = encoding.ids[: settings.max_query_length]
        context = encodings[question.context]
        offsets = _with_marks(question.context, context.offsets)
        answer = _answer_tokens(question, offsets)
        bounds = _bounds(len(offsets), settings.max_length - len(query) - 3, settings.stride)
        begin = len(query) + 2  # where the context begins in a window
        for (first, last), most in zip(bounds, _max_context(bounds), strict=True):
            sequence = sequence_of(query, context.ids[first:last], special)
            inside = slice(begin, begin + last - first)
            own_offsets = np.full((len(sequence.input_ids), 2), -1, dtype=np.int64)
            own_offsets[inside] = offsets[first:last]
            max_context = np.zeros(len(sequence.input_ids), dtype=np.bool_)
            max_context[inside] = most
            span = answer
            if answer is not None:
                within = first <= answer[0] and answer[1] < last  # never for _NOWHERE
                shift = begin - first
                span = (answer[0] + shift, answer[1] + shift) if within else IMPOSSIBLE
            windows.append(Window(number, *sequence, own_offsets, max_context, span))
    return windows


class QuestionAnsweringData:
    """Questions as windows of token ids; an example of the features is a window.

    Args:
        questions: what read_questions gives.
        tokenizer: with BERT's special tokens.
        settings: how contexts become windows.

    Attributes:
        questions, tokenizer: what was given.
        windows: of all questions, in order.
        features: the windows' ids, with start_positions and end_positions where all questions are
            labelled.
        notes: how many questions were cut, how many windows do not hold the answer.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: Tokenizer,
        settings: WindowSettings | None = None,
    ) -> None:
        self.settings = settings or WindowSettings()
        self.questions, self.tokenizer = list(questions), tokenizer
        self.windows = make_windows(self.questions, tokenizer, self.settings)
        labels = {}
        if all(question.labelled for question in self.questions):
            spans = np.array([window.answer for window in self.windows], dtype=np.int64)
            labels = {"start_positions": spans[:, 0], "end_positions": spans[:, 1]}
        self.features = Features.of(
            (TokenSequence(w.input_ids, w.token_type_ids) for w in self.windows),
            example_labels=labels,
        )
        limit = self.settings.max_query_length
        asked = tokenizer.encode_batch(
            [question.question for question in self.questions], add_special_tokens=False
        )
        cut = sum(len(encoding.ids) > limit for encoding in asked)
        without = sum(
            window.answer == IMPOSSIBLE and not self.questions[window.question].impossible
            for window in self.windows
        )
        self.notes = []
        if cut:
            self.notes.append(f"{cut} of {len(asked)} questions cut to {limit} tokens")
        if without:
            self.notes.append(
                f"{without} of {len(self.windows)} windows do not hold their question's answer; "
                "they count as without answer"
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def has_impossible(self) -> bool:
        """Whether there are questions without an answer, as in SQuAD 2.0."""
        return any(question.impossible for question in self.questions)

    def windows_of(self) -> list[list[int]]:
        """The numbers of each question's windows."""
        numbers: list[list[int]] = [[] for _ in self.questions]
        for number, window in enumerate(self.windows):
            numbers[window.question].append(number)
        return numbers


def _with_marks(context: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Places of the tokens, [n, 2], an accent that follows its letter belonging to it.

    Where accents are stripped, the tokenizer's own places leave out one that ends a word.
    """
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    if context.isascii():
        return places
    limits = [*places[1:, 0].tolist(), len(context)]
    for token, limit in enumerate(limits[: len(places)]):
        end = int(places[token, 1])
        while end < limit and unicodedata.category(context[end]) == "Mn":
            end += 1
        places[token, 1] = end
    return places


def _bounds(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First token of each window and the one behind its last."""
    bounds = [(0, min(tokens, room))]
    while bounds[-1][1] < tokens:
        first = bounds[-1][0] + stride
        bounds.append((first, min(tokens, first + room)))
    return bounds


def _max_context(bounds: Sequence[tuple[int, int]]) -> list[NDArray[np.bool_]]:
    """For each window, which of its tokens have most context there."""
    tokens = bounds[-1][1]
    best = np.full(tokens, -1.0)
    owner = np.full(tokens, -1)
    for number, (first, last) in enumerate(bounds):
        before = np.arange(last - first)
        score = np.minimum(before, before[::-1]) + 0.01 * (last - first)
        better = score > best[first:last]
        best[first:last][better] = score[better]
        owner[first:last][better] = number
    return [owner[first:last] == number for number, (first, last) in enumerate(bounds)]


def _answer_tokens(question: Question, offsets: NDArray[np.int64]) -> tuple[int, int] | None:
    """First and last token of the context that share characters with the first right answer."""
    if not question.answers:
        return _NOWHERE if question.impossible else None
    answer = question.answers[0]
    end = answer.start + len(answer.text)
    covered = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > answer.start))
    if not len(covered):
        raise ValueError(
            f"{question.place}: question id {question.id!r}: the tokenizer leaves nothing of the "
            f"answer {answer.text!r}"
        )
    return int(covered[0]), int(covered[-1])


def _squad_rows(path: Path) -> list[tuple[Row, Row]] | None:
    """(question, paragraph) of SQuAD's JSON; None for a file of another form."""
    text = read_utf8(path)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON lines
            return None
        parse_json(text, str(path))
    if not isinstance(whole, dict) or "question" in whole:
        return None
    top = Row(str(path), whole)
    return [
        (row, paragraph)
        for article in _objects(top, "data", f"{path}: ")
        for paragraph in _objects(article, "paragraphs")
        for row in _objects(paragraph, "qas")
    ]


def _objects(row: Row, key: str, prefix: str = "") -> list[Row]:
    """The objects of a list that stands in a row, each with the path to it."""
    values = row.value(key)
    if not isinstance(values, list):
        raise row.error(f"{key!r} must be a list, not {json.dumps(values)[:80]}")
    prefix = prefix or f"{row.where}."
    rows = []
    for index, value in enumerate(values):
        where = f"{prefix}{key}[{index}]"
        if not isinstance(value, dict):
            raise ValueError(f"{where}: an object was expected, not {json.dumps(value)[:80]}")
        rows.append(Row(where, value))
    return rows


def _question(row: Row, holder: Row, seen: UniqueIds, labelled: bool | None) -> Question:
    context = holder.text("context")
    if not context.strip():
        raise holder.error("'context' is empty")
    identifier = row.value("id")
    if not isinstance(identifier, (str, int)) or not str(identifier):
        raise row.error(f"'id' must be text, not {identifier!r}")
    identifier = seen.add(str(identifier), row.where)
    impossible = row.fields.get("is_impossible")
    if impossible not in (None, True, False):
        raise row.error(f"'is_impossible' must be true or false, not {impossible!r}")
    answers: tuple[Answer, ...] = ()
    if "answers" in row.fields:
        answers = tuple(_answer(part, context, identifier) for part in _answer_rows(row))
        if impossible is None:
            impossible = not answers
        elif impossible == bool(answers):
            found = f"{len(answers)} answer(s) and is_impossible = {json.dumps(impossible)}"
            raise row.error(f"question id {identifier!r}: {found} contradict one another")
    question = row.text("question")
    if labelled and impossible is None:
        raise row.error(f"question id {identifier!r}: no 'answers'")
    return Question(identifier, question, context, answers, bool(impossible), row.where)


def _answer_rows(row: Row) -> list[Row]:
    """The answers as SQuAD writes them, or as two lists."""
    answers = row.value("answers")
    if not isinstance(answers, dict):
        return _objects(row, "answers")
    own = Row(f"{row.where}.answers", answers)
    texts, starts = own.texts("text"), own.value("answer_start")
    if not isinstance(starts, list) or len(starts) != len(texts):
        raise own.error("'text' and 'answer_start' must be lists of the same length")
    return [
        Row(f"{own.where}[{index}]", {"text": text, "answer_start": start})
        for index, (text, start) in enumerate(zip(texts, starts, strict=True))
    ]


def _answer(row: Row, context: str, identifier: str) -> Answer:
    text, start = row.text("text"), row.value("answer_start")
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise row.error(f"'answer_start' must be a number from 0, not {start!r}")
    stands = context[start : start + len(text)]
    if not text or stands != text:
        raise row.error(
            f"question id {identifier!r}: the answer {text!r} does not stand at answer_start = "
            f"{start} of the context, which has {stands!r} there"
        )
    return Answer(text, start)
