"""Documents of sentences, and the English that every Python carries.

A document is a list of sentences in order; next-sentence pairs come from within a document, random
ones from two. Held-out text is split off by whole documents, so that nothing of it is seen in
training.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Document = list[str]

# a sentence ends at . ! or ? and closing quotes, before a space and what can open a sentence, and
# at the full stops of Chinese and Japanese
_SENTENCE_END = re.compile(
    r"""[.!?]["')\]]*\s+(?=["'(\[]?[A-Z0-9])|[\u3002\uff01\uff1f]["')\]」』”]*"""
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:e\.g|i\.e|etc|cf|vs|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Sec|Vol|pp|[A-Z])\.$"
)

# a triple-quoted string that opens a file, or the block of a class or function (parsing each file
# for its syntax tree takes ten times as long)
_DOCSTRING = re.compile(
    r'''\A(?:\s*\#[^\n]*\n|\s)*[rR]?"""(.*?)"""|:[ \t]*\n\s*[rR]?"""(.*?)"""''', re.DOTALL
)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")
_RST_MARK = re.compile(
    r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`|``([^`]*)``|`([^`]*)`_*|\*\*?(\S[^*]*)\*\*?"
)


HALF_PAIR = "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"


def has_half_pair(text: object) -> bool:
    """Whether a text, as from JSON's escapes, has what UTF-8 and tokenizers cannot hold."""
    return (
        isinstance(text, str)
        and not text.isascii()
        and any("\ud800" <= character <= "\udfff" for character in text)
    )


def split_sentences(text: str) -> list[str]:
    """The sentences of a running text, white space normalised."""
    text = " ".join(text.split())
    sentences: list[str] = []
    first = 0
    for end in [*(found.end() for found in _SENTENCE_END.finditer(text)), len(text)]:
        piece = text[first:end].strip()
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += " " + piece
        elif piece:
            sentences.append(piece)
        first = end
    return sentences


def split_lines(text: str) -> list[str]:
    """The lines of a text that has one sentence on each, white space normalised, empty ones not.

    A line ends at a line feed, a carriage return or both, and nowhere else.
    """
    return [
        line for part in text.replace("\r", "\n").split("\n") if (line := " ".join(part.split()))
    ]


def split_documents(
    documents: Sequence[Document], held_out: float = 0.05, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: a random part of them, at least two, is held out.

    Raises:
        ValueError: held_out is not in 0..1, or there are fewer than four documents: pairs of
            unrelated sentences need two documents on either side.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, not {held_out}")
    if len(documents) < 4:
        raise ValueError(
            f"{len(documents)} document(s): sentence pairs and a held-out part need at least 4; "
            "separate documents by empty lines"
        )
    count = min(max(2, round(held_out * len(documents))), len(documents) - 2)
    chosen = set(np.random.default_rng(seed).permutation(len(documents))[:count].tolist())
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def standard_library_text() -> list[Document]:
    """Real English without a download: Python's own documentation, some 1.3 MB.

    One document per topic of `pydoc_data.topics` and per module of the standard library (its
    docstrings in order of the source, which is read, not imported). Only paragraphs of prose are
    kept, each once. The same Python version gives the same text.
    """
    sources: list[list[str]] = []
    topics = {}
    with contextlib.suppress(ImportError):  # some distributions leave it out
        topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        sources.append(_PARAGRAPH_BREAK.split(topics[name]))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if parts[0] in ("site-packages", "dist-packages", "pydoc_data", "lib2to3") or any(
            part in ("test", "tests", "idlelib", "__pycache__") for part in parts
        ):
            continue
        sources.append(_docstring_paragraphs(path))
    seen: set[str] = set()
    documents = []
    for paragraphs in sources:
        document: Document = []
        for paragraph in paragraphs:
            prose = _prose(paragraph)
            if prose and prose not in seen:
                seen.add(prose)
                document += split_sentences(prose)
        if len(document) >= 2:
            documents.append(document)
    if not documents:
        raise ValueError(f"no documentation found: neither pydoc_data.topics nor sources in {root}")
    return documents


def _docstring_paragraphs(path: Path) -> list[str]:
    """Paragraphs of the docstrings of a module, its classes and functions, in order."""
    source = path.read_bytes().decode("utf-8", errors="replace")
    docstrings = (module or inner for module, inner in _DOCSTRING.findall(source))
    return [p for d in docstrings for p in _PARAGRAPH_BREAK.split(inspect.cleandoc(d))]


def _prose(paragraph: str) -> str:
    """The paragraph without markup when it is English prose, else an empty string."""
    text = " ".join(paragraph.split())
    if any(mark in text for mark in (">>>", "::=", "...  ", "==", "--", "->")):
        return ""
    text = _RST_MARK.sub(lambda m: next(g for g in m.groups() if g is not None), text)
    text = text.replace("::", ":").lstrip("*-•# ")
    words = text.split()
    letters = sum(c.isalpha() or c == " " for c in text)
    if (
        len(words) < 6
        or letters < 0.88 * len(text)
        or not text.rstrip("\"')").endswith((".", ":", "?", "!"))
    ):
        return ""
    return text
