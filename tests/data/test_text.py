"""Sentences, documents held out, and the standard library's English."""

import pytest

from bertkern.data import (
    split_documents,
    split_lines,
    split_sentences,
    standard_library_text,
)


def test_sentences():
    text = 'Dr. Who saw\n it, e.g. the box.  "Where?" he asked! See 3.5 volts. It works'
    assert split_sentences(text) == [
        "Dr. Who saw it, e.g. the box.",
        '"Where?" he asked!',
        "See 3.5 volts.",
        "It works",
    ]
    assert split_sentences("  \n") == []


def test_lines():
    assert split_lines("one. Two\r\n  \n three\t four\rfive\u2028still five\n") == [
        "one. Two",
        "three four",
        "five still five",
    ]
    assert split_lines(" \r\n") == []


def test_split():
    documents = [[f"{i}."] for i in range(100)]
    train, held_out = split_documents(documents, 0.1, seed=3)
    assert (len(train), len(held_out)) == (90, 10)
    assert sorted(train + held_out) == sorted(documents)
    assert split_documents(documents, 0.1, seed=3)[1] == held_out
    assert split_documents(documents, 0.1, seed=4)[1] != held_out
    assert [len(part) for part in split_documents(documents[:4], 0.01)] == [2, 2]
    with pytest.raises(ValueError, match=r"3 document\(s\).*at least 4"):
        split_documents(documents[:3])
    with pytest.raises(ValueError, match="held_out must be between 0 and 1, not 1"):
        split_documents(documents, 1)


def test_standard_library_text():
    documents = standard_library_text()
    assert documents == standard_library_text()
    sentences = [s for document in documents for s in document]
    assert len(documents) > 100
    assert sum(map(len, sentences)) > 500_000
    letters = sum(c.isalpha() or c == " " for s in sentences for c in s)
    assert letters > 0.9 * sum(map(len, sentences))


def test_closing_quotes_stay_with_their_sentence():
    text = 'He said "Go now." Then (at last!) he went. [Or not?] Who knows.'
    assert split_sentences(text) == [
        'He said "Go now."',
        "Then (at last!) he went.",
        "[Or not?]",
        "Who knows.",
    ]


def test_chinese_sentences_need_no_space():
    assert split_sentences("第一句话。\n第二句话\uff01第三\uff1f") == [
        "第一句话。",
        "第二句话\uff01",
        "第三\uff1f",
    ]
