"""Tagged sentences: files, word pieces and their tags; no word is lost."""

import json

import numpy as np
import pytest
import transformers

from bertkern.data import save_tokenizer
from bertkern.data.token_classification import (
    TokenClassificationData,
    read_token_classification,
)

CONLL = (
    "-DOCSTART- -X- O O\n\nAnn NNP I-NP B-PER\nLee NNP I-NP I-PER\nsat VBD I-VP O\n\n\n"
    "New NNP I-NP B-LOC\nYork NNP I-NP I-LOC\n"
)
SENTENCES = [["Ann", "Lee", "sat"], ["New", "York"]]
TAGS = [["B-PER", "I-PER", "O"], ["B-LOC", "I-LOC"]]


def test_conll_and_json_lines(write):
    rows = [{"tokens": s, "tags": t} for s, t in zip(SENTENCES, TAGS, strict=True)]
    two = "Ann\tB-PER\r\nLee\tI-PER\r\nsat\tO\r\n\r\nNew\tB-LOC\r\nYork\tI-LOC"
    for path in (
        write("eng.train", CONLL),
        write("two.conll", two),
        write("a.jsonl", "\n".join(map(json.dumps, rows))),
    ):
        read = read_token_classification(path, labelled=True)
        assert (read.sentences, read.tags) == (SENTENCES, TAGS), path
        assert read.tag_names == ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]
    assert read_token_classification(write("eng.train", CONLL)).notes == [
        "1 -DOCSTART- line(s) passed over"
    ]
    assert read.subset([1]).sentences == [["New", "York"]]


def test_a_file_of_words_alone(write):
    path = write("test.txt", "Ann\nLee\n\nsat\n")
    read = read_token_classification(path)
    assert (read.sentences, read.tags, read.tag_names) == ([["Ann", "Lee"], ["sat"]], None, [])
    with pytest.raises(ValueError, match=r"test.txt: no tags; a word and its tag"):
        read_token_classification(path, labelled=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "Ann B-PER\nLee\n", r"a.conll: line 2: 1 column\(s\), .* have 2"),
        ("a.conll", "Ann B-PER\nLee I-PER x\n", r"line 2: 3 column\(s\)"),
        ("a.conll", "Ann\tB-PER\nLee\t\n", r"line 2: 2 column\(s\)"),
        ("a.conll", "-DOCSTART- O\n\n", r"a.conll: no sentence"),
        ("a.conll", b"Ann B\n\xff O\n", r"a.conll: line 2: not UTF-8"),
        ("a.conll", "Ann B-XYZ\n", r"sentence at line 1: tag 'B-XYZ' of word 1 is not .*'O'"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', r"line 1: 1 'tags', but 2 'tokens'"),
        ("a.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', r"line 1: 'tokens' must be"),
        ("a.jsonl", '{"words": ["a"]}', r"no column 'tokens' for the words; found: 'words'"),
    ],
)  # fmt: skip
def test_refusals(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_token_classification(write(name, content), tag_names=["O", "B-PER", "I-PER", "B"])


def test_first_pieces_carry_the_tags_as_in_transformers(write, words, tmp_path):
    save_tokenizer(words, tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    sentences = [["Ann", "zzqx's", "Café"], ["qqqq", "1895,"]]
    rows = [{"tokens": s, "tags": [f"T{i}" for i in range(len(s))]} for s in sentences]
    read = read_token_classification(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    data = TokenClassificationData(read, words, max_length=32)
    features = data.features
    for r, sentence in enumerate(sentences):
        expected = theirs(sentence, is_split_into_words=True)
        part = slice(features.starts[r], features.starts[r + 1])
        assert features.input_ids[part].tolist() == expected["input_ids"]
        of_word, tags = expected.word_ids(), []
        for i, word in enumerate(of_word):
            first = word is not None and word != of_word[i - 1]
            tags.append(word if first else -100)
        assert features.token_labels["labels"][part].tolist() == tags
    assert data.first_pieces.sum() == 5
    assert data.by_sentence(list("abcde")) == [["a", "b", "c"], ["d", "e"]]


def test_long_sentences_are_divided_and_no_word_is_lost(write, words):
    rng = np.random.default_rng(0)
    vocabulary = ["cat", "zzqx", "\u200b", "mat", "q" * 40]  # the third one has no pieces
    sentences = [list(rng.choice(vocabulary, n)) for n in (1, 30, 7, 60)]
    rows = [{"tokens": s, "tags": [f"T{vocabulary.index(word)}" for word in s]} for s in sentences]
    read = read_token_classification(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    data = TokenClassificationData(read, words, max_length=10)
    lengths = np.diff(data.features.starts)
    assert lengths.max() <= 10
    labels = data.features.token_labels["labels"]
    firsts = [data.examples.tag_names[i] for i in labels[data.first_pieces]]
    assert data.by_sentence(firsts) == read.tags
    assert (labels[~data.first_pieces] == -100).all()
    counts = {word: sum(s.count(word) for s in sentences) for word in vocabulary}
    assert any("sentence(s) divided" in note for note in data.notes)
    assert f"{counts['q' * 40]} word(s) of more than 8 pieces cut" in data.notes
    unknown = f"{counts[chr(0x200B)]} word(s) of which the tokenizer leaves nothing read as [UNK]"
    assert unknown in data.notes
