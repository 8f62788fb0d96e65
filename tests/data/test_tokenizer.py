"""Tokenizers: the same vocabulary in every process, files that transformers reads, bad files."""

import subprocess
import sys

import pytest
import transformers

from bertkern.data import load_tokenizer, save_tokenizer, train_tokenizer
from bertkern.data.tokenizer import SPECIAL_TOKENS, SpecialIds

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


def test_training_is_deterministic():
    """Ties of frequency are broken alike in every process."""
    program = (
        f"from bertkern.data import train_tokenizer; t = train_tokenizer({TEXTS!r}, 60);"
        "print(sorted(t.get_vocab().items()))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert other.decode() == str(sorted(train_tokenizer(TEXTS, 60).get_vocab().items())) + "\n"


def test_small_and_empty():
    assert train_tokenizer(TEXTS, 35).get_vocab_size() == 35
    with pytest.raises(ValueError, match=r"vocab_size = 34 does not hold .* they are 35"):
        train_tokenizer(TEXTS, 34)
    with pytest.raises(ValueError, match="the texts are empty"):
        train_tokenizer(["", " "], 60)


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
