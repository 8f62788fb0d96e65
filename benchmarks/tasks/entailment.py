"""RTE-style pairs: does the second sentence follow from the first?

The first is a sentence of the text that is made of two clauses and a conjunction, "If A, B." or
"B if A.". The second says the same in the other order, or its converse:

    premise           If the file is missing, an error is raised.
    entailment        An error is raised if the file is missing.
    not_entailment    The file is missing if an error is raised.

Both have the same words, nearly all the premise's, so that counting words in common tells nothing,
as in the harder test sets of McCoy et al. (2019, HANS) and Zhang et al. (2019, PAWS): what has to
be read is which clause the conjunction governs. Every premise occurs with both labels, so that the
premise alone tells nothing either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bertkern.data.text import Document

LABELS = ("entailment", "not_entailment")  # 0 and 1 in GLUE's RTE

# Which clause is the condition, the cause or the earlier one must matter: "while" and "unless" say
# the same of both ("A unless B" is "B unless A").
_CONJUNCTION = "if|when|whenever|because|since|after|before|until"
_OPENING = r"^(?:Note that |Otherwise, |However, |Also, |So, |But |And |Then |In addition, )?"
_CLAUSE = r"[^;:()?!]{8,120}"
_CONDITION = r"[^,;:()?!]{8,110}"
_CONDITION_FIRST = re.compile(
    rf"{_OPENING}({_CONJUNCTION}) ({_CONDITION}), (?:then )?({_CLAUSE})[.:]$", re.IGNORECASE
)
_CONDITION_LAST = re.compile(rf"{_OPENING}({_CLAUSE}?),? ({_CONJUNCTION}) ({_CONDITION})[.:]$")
# What both hypotheses leave out: "(see below)", ", False otherwise", "; else None".
_ASIDE = re.compile(
    r" \([^()]*\)|[,;]? (?:and |or )?\w+ otherwise\b|[,;]? (?:or )?(?:else|otherwise) \w+(?=[.:]$)"
)
_FINITE_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|can|cannot|can't|may|might|must|should|will|would|does|do"
    r"|doesn't|don't|did|isn't|aren't|won't|becomes?|exists?|occurs?|contains?|returns?|raises?"
    r"|fails?|needs?|uses?|supports?|happens?|matches|takes?|means?|appears?|makes?|works?|gives?"
    r"|defaults?|calls?|holds?|comes?|follows?|succeeds?|stops?|begins?|starts?|ends?)\b"
)
# "Return X", the imperative of docstrings, becomes "X is returned", which may follow a conjunction.
_IMPERATIVE = re.compile(r"^(Return|Raise)s? (.+)$", re.IGNORECASE)
_MORE_THAN_A_NAME = re.compile(r"\b(?:and|or|but|which|that|otherwise)\b|,")
_OTHER_IMPERATIVE = re.compile(
    r"^(?:Add|Call|Check|Convert|Create|Delete|Do|Don't|Ensure|Get|Like|Make|Print|Read|Remove|See"
    r"|Set|Try|Use|Wait|Write)\b",
    re.IGNORECASE,
)
# Words that tie what follows or what went before to its place: "even if", "or else".
_TIED = re.compile(r"\b(?:if|when|whenever|unless|because|else|otherwise|then)\b", re.IGNORECASE)
_TIED_END = re.compile(
    r"\b(?:even|only|just|except|especially|both|shortly|immediately|right|and|or|but|whether|as"
    r"|long|ever|not)$",
    re.IGNORECASE,
)
# Words that a sentence opens with and that are no names.
_NO_NAME = re.compile(
    r"(?:A|An|The|This|That|These|Those|It|Its|In|No|All|Any|Each|Some|You|We|They|Your|For|Both"
    r"|Only|There|Such|One|Most|Every|Other|Two|Using|By|As|On|Passing|Parameters|Attributes)\b"
)
_FEWEST_WORDS = 3  # of a clause: "if necessary" is none


@dataclass(frozen=True)
class Pair:
    """A premise, a hypothesis, and the index in LABELS."""

    premise: str
    hypothesis: str
    label: int


def pairs(document: Document) -> Iterator[tuple[Pair, Pair]]:
    """For every sentence that can be turned round: the pair that follows, the one that does not."""
    for sentence in document:
        if found := clauses(sentence):
            conjunction, condition, consequence, condition_first = found
            right = _turned(conjunction, condition, consequence, condition_first)
            wrong = _turned(conjunction, consequence, condition, condition_first)
            yield Pair(sentence, right, 0), Pair(sentence, wrong, 1)


def _turned(conjunction: str, governed: str, other: str, condition_first: bool) -> str:
    """The sentence of two clauses, in the order that the premise does not have."""
    if condition_first:
        hypothesis = f"{other} {conjunction} {governed}."
    else:
        hypothesis = f"{conjunction} {governed}, {other}."
    return hypothesis[0].upper() + hypothesis[1:]


def clauses(sentence: str) -> tuple[str, str, str, bool] | None:
    """(conjunction, condition, consequence, whether the condition stands first), or None."""
    sentence = _ASIDE.sub("", sentence)
    if match := _CONDITION_FIRST.match(sentence):
        conjunction, condition, consequence = match.groups()
    elif match := _CONDITION_LAST.match(sentence):
        consequence, conjunction, condition = match.groups()
    else:
        return None
    statement = _as_statement(consequence)
    if statement is None or _TIED.search(f"{condition} {statement}"):
        return None
    opening = statement.partition(",")[0]  # "for example", "au, wav or aiff" open no clause
    for clause in (condition, opening):
        if len(clause.split()) < _FEWEST_WORDS or not _FINITE_VERB.search(clause):
            return None
    if _OTHER_IMPERATIVE.match(statement) or _TIED_END.search(statement):
        return None
    first = match.group(1) == conjunction
    return conjunction.lower(), as_inside(condition), as_inside(statement), first


def _as_statement(clause: str) -> str | None:
    """The clause, an imperative "Return X" as "X is returned"; None where that takes grammar."""
    match = _IMPERATIVE.match(clause)
    if match is None:
        return clause
    verb, thing = match.groups()
    if _MORE_THAN_A_NAME.search(thing):
        return None
    plural = re.match(r"(?:all|both|two|the \w+[^s\W]s)\b", thing, re.IGNORECASE) is not None
    return f"{thing} {'are' if plural else 'is'} {verb.lower()}{'d' if verb[-1] == 'e' else 'ed'}"


def as_inside(clause: str) -> str:
    """The clause as it stands inside a sentence: without the capital, unless it is a name's."""
    return clause[0].lower() + clause[1:] if _NO_NAME.match(clause) else clause


def overlap(pair: Pair) -> float:
    """The part of the hypothesis' words that the premise has."""
    premise, hypothesis = (_words(text) for text in (pair.premise, pair.hypothesis))
    return len(hypothesis & premise) / len(hypothesis)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def baselines(train: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, list[float]]:
    """Points on the held-out pairs (1 where right) of rules that were fitted to `train`.

    majority        the label that is most frequent
    word overlap    entailment at or above (or: below) a threshold of overlap, the threshold and the
                    side with the highest accuracy
    hypothesis      a logistic regression on words, pairs and triples of words of the hypothesis
                    alone: what can be told without reading the premise
    """
    ones = sum(pair.label for pair in train)
    majority = int(2 * ones > len(train))
    values = sorted({overlap(pair) for pair in train})
    rules = [(threshold, above) for threshold in values for above in (0, 1)]
    best = max(rules, key=lambda rule: sum(_by_rule(train, *rule)))
    return {
        "majority": [float(pair.label == majority) for pair in held_out],
        "word overlap": _by_rule(held_out, *best),
        "hypothesis alone": _by_hypothesis(train, held_out),
    }


def _by_rule(pairs: Sequence[Pair], threshold: float, above: int) -> list[float]:
    return [float((above if overlap(p) >= threshold else 1 - above) == p.label) for p in pairs]


def _by_hypothesis(train: Sequence[Pair], held_out: Sequence[Pair]) -> list[float]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = CountVectorizer(ngram_range=(1, 3), token_pattern=r"\w+")
    rule = make_pipeline(words, LogisticRegression(max_iter=1000))
    rule.fit([pair.hypothesis for pair in train], [pair.label for pair in train])
    found = rule.predict([pair.hypothesis for pair in held_out])
    return [float(label == pair.label) for label, pair in zip(found, held_out, strict=True)]
