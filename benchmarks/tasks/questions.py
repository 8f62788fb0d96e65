"""SQuAD-style questions: the answer is a span of a passage of a few sentences.

A question is made from one sentence of the passage by a rule of grammar; the answer is the phrase
of the sentence that it asks for:

    If A, B.                   What happens if A?         B
    Return X if A.             What is returned if A?     X
    Return X for Y.            What is returned for Y?    X
    S is a X.                  What is S?                 a X
    S is called when A.        When is S called?          when A
    S must be X.               What must S be?            X
    S contains X, ...          What does S contain?       X

So the question has words of its sentence, but not in its order or form; the sentence stands among
its neighbours, which speak of the same things, and mostly goes on after the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bertkern.data.text import Document
from bertkern.train.squad import normalize_answer, word_f1

from .entailment import as_inside

_OPENING = r"^(?:Note that |Otherwise, |However, |Also, |So, |But |And |Then |In addition, )?"
_CONDITION_FIRST = re.compile(
    rf"{_OPENING}(If|When|Whenever) ([^,;:()?!]{{8,110}}), (?:then )?([^;:()?!]{{8,110}})\.$"
)
_CONDITION_LAST = re.compile(
    rf"{_OPENING}([^;:()?!]{{8,120}}?),? (if|when|whenever) ([^,;:()?!]{{8,110}})\.$"
)
_TIED_END = re.compile(r"\b(?:even|only|just|except|especially|same as|as|and|or|but|useful)$")
_IMPERATIVE = re.compile(r"^(Return|Raise)s? (.+)$")
_RETURN = re.compile(
    r"^Returns? ([^,;:()]{8,90}?) ((?:for|from|in|as|by|with|on|at) [^,;:()]{8,80})[.:;(]"
)
_SUBJECT = rf"{_OPENING}([A-Z\"'_][^,;:()?!]{{2,60}}?)"
_REST = r"([^,;:()?!]{8,90})[.,;:(]"
_IS = re.compile(rf"{_SUBJECT} (is|are|was|were) {_REST}")
_MODAL = re.compile(rf"{_SUBJECT} (must|may|can|should|will|cannot|would|could|might) {_REST}")
_VERBS = (
    *(
        "accept",
        "add",
        "affect",
        "allow",
        "call",
        "cause",
        "check",
        "contain",
        "control",
        "convert",
    ),
    *(
        "create",
        "define",
        "describe",
        "determine",
        "expect",
        "follow",
        "generate",
        "give",
        "handle",
    ),
    *("hold", "implement", "include", "indicate", "make", "mean", "produce", "provide", "raise"),
    *("read", "remove", "represent", "require", "return", "set", "specify", "store", "support"),
    *("take", "use", "write"),
)
_FINITE = {verb: verb for verb in _VERBS} | {f"{verb}s": verb for verb in _VERBS}
_FINITE["specifies"] = _FINITE.pop("specifys")
_DOES = re.compile(rf"{_SUBJECT} ({'|'.join(_FINITE)}) {_REST}")
# Subjects with these words are clauses, or point to what the passage may not hold.
_NO_SUBJECT = re.compile(
    r"\b(?:if|when|that|which|who|where|and|or|but|to|is|are|because|it|this|they|these|there|you"
    r"|we|he|she|only|returns?|do|don't|optionally|optional)\b",
    re.IGNORECASE,
)
_PARTICIPLE = re.compile(
    r"((?:\w+ly )?\w+(?:ed|en|own|lt|nt|ut|et|ad)) "
    r"(by|when|before|after|to|in|as|if|on|at|with|from|for|into|until|using) (.+)$"
)
# How one asks for a phrase that begins with the preposition, and whether the answer has it.
_ASKED = {
    **dict.fromkeys(("when", "before", "after", "if"), ("When", True)),
    **dict.fromkeys(("in", "on", "at"), ("Where", True)),
    **dict.fromkeys(("by", "using"), ("How", True)),
    **{"as": ("As what", False), "with": ("With what", False), "from": ("From what", False)},
    **{"for": ("For what", False), "into": ("Into what", False), "to": ("To what", False)},
    "until": ("Until when", False),
}
_SENTENCE_WORDS = range(6, 33)
_ANSWER_WORDS = 15
_PASSAGE_SENTENCES = 3
_PASSAGE_WORDS = 70
_FITTED = 500  # questions that the rule of position is fitted to
_SENTENCE_END = re.compile(r"(?<=[.:?!]) ")


@dataclass(frozen=True)
class Question:
    """A passage, a question, and the answer, which begins at the passage's character `start`."""

    passage: str
    question: str
    answer: str
    start: int
    kind: str  # which rule made it


def questions(document: Document, random: np.random.Generator) -> Iterator[Question]:
    """Every question that the rules find in the document, each with a passage around it."""
    for index, sentence in enumerate(document):
        if len(sentence.split()) not in _SENTENCE_WORDS:
            continue
        for kind, question, answer in asked(sentence):
            if len(answer.split()) > _ANSWER_WORDS or sentence.count(answer) != 1:
                continue
            before, passage = passage_around(document, index, random)
            start = before + sentence.index(answer)
            yield Question(passage, question, answer, start, kind)


def passage_around(document: Document, index: int, random: np.random.Generator) -> tuple[int, str]:
    """(where the sentence begins in it, the passage): neighbouring sentences, this one anywhere."""
    first = max(0, index - int(random.integers(_PASSAGE_SENTENCES)))
    last = min(len(document), first + _PASSAGE_SENTENCES)
    first = max(0, last - _PASSAGE_SENTENCES)
    while sum(len(sentence.split()) for sentence in document[first:last]) > _PASSAGE_WORDS:
        first, last = (first + 1, last) if index - first > last - 1 - index else (first, last - 1)
    before = sum(len(sentence) + 1 for sentence in document[first:index])
    return before, " ".join(document[first:last])


def asked(sentence: str) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) for each rule that fits the sentence."""
    if match := _CONDITION_FIRST.match(sentence):
        word, condition, consequence = match.groups()
        yield "happens", f"What happens {word.lower()} {as_inside(condition)}?", consequence
    if match := _CONDITION_LAST.match(sentence):
        consequence, word, condition = match.groups()
        if imperative := _IMPERATIVE.match(consequence):
            verb = "returned" if imperative[1] == "Return" else "raised"
            yield "result", f"What is {verb} {word} {condition}?", imperative[2]
        elif not _TIED_END.search(consequence):
            yield "happens", f"What happens {word} {condition}?", consequence
    elif match := _RETURN.match(sentence):
        yield "returned", f"What is returned {match[2]}?", match[1]
    for kind, rule in (("is", _IS), ("modal", _MODAL), ("does", _DOES)):
        match = rule.match(sentence)
        if match and len(match[1].split()) <= 8 and not _NO_SUBJECT.search(match[1]):
            subject = as_inside(match[1])
            yield from _about(kind, subject, match[2], match[3])


def _about(kind: str, subject: str, verb: str, rest: str) -> Iterator[tuple[str, str, str]]:
    """Questions about a subject of which a verb says the rest."""
    if kind == "is":
        if re.match(r"(?:an?|the|one|any|some|either)\b", rest):
            yield "is", f"What {verb} {subject}?", rest
        elif (match := _PARTICIPLE.match(rest)) and match[1] not in ("not", "present"):
            words, with_preposition = _ASKED.get(match[2], ("", False))
            answer = f"{match[2]} {match[3]}" if with_preposition else match[3]
            yield "done", f"{words} {verb} {subject} {match[1]}?", answer
    elif kind == "modal":
        first, _, others = rest.partition(" ")
        if first == "be" and others:
            yield "modal", f"What {verb} {subject} be?", others
        elif first not in ("not", "be", "also", "only", "have", "never", "always"):
            yield "modal", f"What {verb} {subject} do?", rest
    else:
        does = "does" if verb not in _VERBS else "do"
        yield "does", f"What {does} {subject} {_FINITE[verb]}?", rest


def baselines(train: Sequence[Question], held_out: Sequence[Question]) -> dict[str, list[str]]:
    """The answers to the held-out questions of rules that were fitted to `train`.

    position        words a to b of the k-th sentence of the passage, the k, a, b with the best F1
    words           the sentence that has most words of the question, without those words at its two
                    ends: a strong form of the sliding window of Rajpurkar et al. (2016)
    """
    places = [(k, a, b) for k in (0, 1, 2, -1) for a in (0, 1, 2, 3, 4) for b in (4, 8, 12, 99)]
    sample = train[:: max(1, len(train) // _FITTED)]
    best = max(
        (place for place in places if place[1] < place[2]),
        key=lambda place: sum(word_f1(q.answer, _by_position(q, *place)) for q in sample),
    )
    return {
        "position": [_by_position(question, *best) for question in held_out],
        "words in common": [_by_words(question) for question in held_out],
    }


def _by_position(question: Question, sentence: int, first: int, last: int) -> str:
    sentences = _SENTENCE_END.split(question.passage)
    chosen = sentences[min(sentence, len(sentences) - 1)]
    return " ".join(chosen.split()[first:last]).rstrip(".,;:")


def _by_words(question: Question) -> str:
    asked_for = {"if", "when", *_words(question.question)}
    sentences = _SENTENCE_END.split(question.passage)
    rest = max(sentences, key=lambda sentence: len(asked_for & _words(sentence))).split()
    while rest and not _words(rest[0]) - asked_for:
        rest.pop(0)
    while rest and not _words(rest[-1]) - asked_for:
        rest.pop()
    return " ".join(rest).rstrip(".,;:")


def _words(text: str) -> set[str]:
    return set(normalize_answer(text).split())
