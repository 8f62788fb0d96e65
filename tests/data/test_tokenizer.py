"""Tokenizers: the same vocabulary in every process, files that transformers reads, bad files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import transformers

from bertkern.data import load_tokenizer, save_tokenizer, train_tokenizer
from bertkern.data.tokenizer import (
    SPECIAL_TOKENS,
    SpecialIds,
    continuation_ids,
    vocabulary_digest,
)

TEXTS = ["The cat sat on the mat.", "A dog saw the cats sitting; naïve dogs!", "日本 mats"] * 3


def test_training():
    tokenizer = train_tokenizer(TEXTS, 50)
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() == 50
    encoding = tokenizer.encode("The CAT", "naive [MASK]")
    assert encoding.tokens[:2] == ["[CLS]", "the"]
    assert encoding.tokens[-2:] == ["[MASK]", "[SEP]"]
    assert encoding.type_ids == [0] * (encoding.tokens.index("[SEP]") + 1) + [1] * (
        len(encoding) - encoding.tokens.index("[SEP]") - 1
    )
    assert tokenizer.decode(tokenizer.encode("the cats sat").ids) == "the cats sat"


def test_bpe():
    tokenizer = train_tokenizer(TEXTS, 300, kind="bpe")
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert 261 < tokenizer.get_vocab_size() <= 300
    encoding = tokenizer.encode("The CAT [MASK]", "naïve")
    assert encoding.tokens[:2] == ["[CLS]", "Ġthe"]
    assert encoding.ids.count(tokenizer.token_to_id("[MASK]")) == 1
    assert set(encoding.type_ids) == {0, 1}
    unseen = "the q\u00fcick \u65e5\u672c \U0001f600"  # nothing is unknown
    assert tokenizer.token_to_id("[UNK]") not in tokenizer.encode(unseen).ids
    assert tokenizer.decode(tokenizer.encode(unseen).ids).strip() == unseen
    upper = train_tokenizer(TEXTS, 300, lowercase=False, kind="bpe")
    assert upper.decode(upper.encode("The CAT").ids).strip() == "The CAT"


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 60), ("bpe", 300)])
def test_training_is_deterministic(kind, size):
    """Ties of frequency are broken alike in every process."""
    program = (
        "from bertkern.data import train_tokenizer;"
        f"t = train_tokenizer({TEXTS!r}, {size}, kind={kind!r});"
        "print(sorted(t.get_vocab().items()))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    vocabulary = train_tokenizer(TEXTS, size, kind=kind).get_vocab()
    assert other.decode() == str(sorted(vocabulary.items())) + "\n"


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 60), ("bpe", 300)])
def test_streamed_texts(kind, size, monkeypatch):
    """A list, an iterator and a function that reads anew give the same vocabulary."""
    monkeypatch.setattr("bertkern.data.tokenizer._CHUNK_TEXTS", 2)
    expected = train_tokenizer(TEXTS, size, kind=kind).get_vocab()
    assert train_tokenizer(iter(TEXTS), size, kind=kind).get_vocab() == expected
    alive = 0

    class Text(str):
        def __del__(self):
            nonlocal alive
            alive -= 1

    most = 0

    def read():
        nonlocal alive, most
        for text in TEXTS:
            alive += 1
            most = max(most, alive)
            yield Text(text)

    assert train_tokenizer(read, size, kind=kind).get_vocab() == expected
    assert most <= (4 if kind == "wordpiece" else len(TEXTS))  # `tokenizers` reads 256 at a time


def test_small_and_empty():
    assert train_tokenizer(TEXTS, 35).get_vocab_size() == 35
    with pytest.raises(ValueError, match=r"vocab_size = 34 does not hold .* they are 35"):
        train_tokenizer(TEXTS, 34)
    for kind, size in (("wordpiece", 60), ("bpe", 300)):
        with pytest.raises(ValueError, match="the texts are empty"):
            train_tokenizer(["", " "], size, kind=kind)
    with pytest.raises(ValueError, match=r"vocab_size = 260 does not hold .* 256 bytes: 261"):
        train_tokenizer(TEXTS, 260, kind="bpe")
    with pytest.raises(ValueError, match="kind must be one of wordpiece, bpe, not 'unigram'"):
        train_tokenizer(TEXTS, 60, kind="unigram")


@pytest.mark.parametrize("lowercase", [True, False])
def test_files(tmp_path, lowercase):
    tokenizer = train_tokenizer(TEXTS, 80, lowercase)
    save_tokenizer(tokenizer, tmp_path)
    text = "The cat and naïve [MASK] Dogs"
    expected = tokenizer.encode(text).ids
    assert load_tokenizer(tmp_path).encode(text).ids == expected
    assert load_tokenizer(tmp_path / "vocab.txt").encode(text).ids == expected
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == expected
    slow_files = tmp_path / "slow"
    slow_files.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (slow_files / name).write_bytes((tmp_path / name).read_bytes())
    assert transformers.BertTokenizer.from_pretrained(slow_files)(text)["input_ids"] == expected


@pytest.mark.parametrize("lowercase", [True, False])
def test_files_of_bpe(tmp_path, lowercase):
    tokenizer = train_tokenizer(TEXTS, 300, lowercase, kind="bpe")
    save_tokenizer(tokenizer, tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    texts = ("The cat and naïve [MASK] Dogs", "sat")
    expected = tokenizer.encode(*texts)
    assert load_tokenizer(tmp_path).encode(*texts).ids == expected.ids
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert read(*texts)["input_ids"] == expected.ids
    assert read(*texts)["token_type_ids"] == expected.type_ids
    assert (read.mask_token_id, read.pad_token_id) == (4, 0)


def test_continuations():
    wordpieces = train_tokenizer(TEXTS, 50)
    found = {wordpieces.id_to_token(int(i)) for i in np.flatnonzero(continuation_ids(wordpieces))}
    assert found == {token for token in wordpieces.get_vocab() if token.startswith("##")}
    bpe = train_tokenizer(TEXTS, 300, kind="bpe")
    flags = continuation_ids(bpe)
    text = "the catsx, naïve dogs!"
    cut = bpe.pre_tokenizer.pre_tokenize_str(text)
    words = [[0 if i == 0 else 1 for i in range(len(pieces(bpe, word)))] for word, _ in cut]
    ids = [i for word, _ in cut for i in pieces(bpe, word)]
    assert flags[ids].astype(int).tolist() == [flag for word in words for flag in word]
    assert not flags[:5].any()
    level = wordpieces.__class__.from_str(EMPTY)
    with pytest.raises(ValueError, match="byte-level BPE, not WordLevel after no pre"):
        continuation_ids(level)


def pieces(tokenizer, word):
    """The ids of a pre-token."""
    return [token.id for token in tokenizer.model.tokenize(word)]


def test_vocabulary_digest():
    first, other = train_tokenizer(TEXTS, 60), train_tokenizer(TEXTS, 50)
    assert vocabulary_digest(first) == vocabulary_digest(train_tokenizer(TEXTS, 60))
    assert vocabulary_digest(first) != vocabulary_digest(other)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 60)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert [len(e) for e in loaded.encode_batch(["the", "the cat sat on the mat"])] == [3, 8]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no vocab.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json: damaged, or not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("the\ncat\n")
    with pytest.raises(ValueError, match=r"vocab.txt: .*no \[PAD\], \[UNK\]"):
        load_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=r"no \[PAD\]"):
        SpecialIds.of(train_tokenizer(TEXTS, 60).__class__.from_str(EMPTY))


EMPTY = (
    '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
    '"pre_tokenizer":null,"post_processor":null,"decoder":null,'
    '"model":{"type":"WordLevel","vocab":{},"unk_token":"[UNK]"}}'
)


@pytest.mark.parametrize("settings", [{}, {"strip_accents": False}, {"do_lower_case": False}])
def test_a_vocabulary_is_read_as_transformers_reads_it(tmp_path, settings):
    """Its settings, and tokens that are line breaks of Unicode, which end no line of the file."""
    tokens = [
        *SPECIAL_TOKENS,
        "\u2028",
        "\x85",
        "über",
        "uber",
        "Über",
        "中",
        "国",
        "中国",
        "hello",
    ]
    (tmp_path / "vocab.txt").write_bytes("".join(f"{t}\n" for t in tokens).encode())
    for chinese in (True, False):
        entries = {
            "tokenizer_class": "BertTokenizer",
            "tokenize_chinese_chars": chinese,
            **settings,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
        text = "Über 中国 hello"
        theirs = transformers.BertTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
        assert load_tokenizer(tmp_path).encode(text).ids == theirs
        assert theirs[-2] == tokens.index("hello")
