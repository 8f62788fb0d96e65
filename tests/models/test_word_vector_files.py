"""The files of word2vec: bytes written by hand from the formats' description, and gensim's."""

import contextlib
import gzip
import struct

import numpy as np
import pytest

from bertkern.models.word_vector_files import read, write
from bertkern.models.word_vectors import WordVectors

WORDS = ["the", "naïve", "don't"]
VECTORS = np.array([[0.5, -1.0], [0.1, 1e-30], [3e38, -0.0]], dtype=np.float32)


def binary_bytes(separator=b"\n", count=3):
    """What word2vec.c writes (separator: line feed), or gensim and others (none)."""
    content = f"{count} 2\n".encode()
    for word, vector in zip(WORDS, VECTORS, strict=True):
        content += word.encode() + b" " + struct.pack("<2f", *vector) + separator
    return content


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    words = ["alpha", "βήτα", "δέλτα-x", *(f"w{i}" for i in range(200))]
    # of all sizes that float32 has, so that nine digits are needed
    scale = 10.0 ** generator.integers(-30, 30, size=(len(words), 1))
    return WordVectors(words, generator.standard_normal((len(words), 7)) * scale)


def test_text_is_written_as_described(tmp_path):
    write(tmp_path / "v.txt", ["a", "b"], np.array([[0.5, -1], [0.1, 2]], dtype=np.float32))
    lines = (tmp_path / "v.txt").read_bytes().split(b"\n")
    assert lines[0] == b"2 2"
    assert lines[1] == b"a 0.5 -1"
    assert lines[2].startswith(b"b 0.1")
    assert lines[3:] == [b""]


def test_binary_is_written_as_described(tmp_path):
    write(tmp_path / "v.bin", WORDS, VECTORS)
    assert (tmp_path / "v.bin").read_bytes() == binary_bytes()


@pytest.mark.parametrize("separator", [b"\n", b""])
def test_binary_files_of_others_are_read(tmp_path, separator):
    (tmp_path / "v.bin").write_bytes(binary_bytes(separator))
    words, vectors = read(tmp_path / "v.bin")
    assert words == WORDS
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, VECTORS)


def test_a_vector_may_begin_with_a_byte_that_is_a_space_or_a_line_feed(tmp_path):
    # 0x0a0a0a0a and 0x20202020 are small floats: lines and words cannot be found by them
    numbers = b"\n\n\n\n    "
    (tmp_path / "v.bin").write_bytes(b"2 2\na " + numbers + b"\nb " + numbers + b"\n")
    words, vectors = read(tmp_path / "v.bin")
    assert words == ["a", "b"]
    assert vectors.tobytes() == numbers * 2


@pytest.mark.parametrize(
    "text",
    [
        "2 2\na 0.5 -1 \nb 1e-3 2 \n",  # as word2vec.c: a space behind the last number
        "2 2\na 0.5 -1\nb 1e-3 2",  # no line feed at the end
        "2 2\r\na 0.5 -1\r\nb 1e-3 2\r\n",
        "a 0.5 -1\nb 1e-3 2\n",  # as GloVe: no first line
    ],
)
def test_text_files_of_others_are_read(tmp_path, text):
    (tmp_path / "v.vec").write_bytes(text.encode())
    words, vectors = read(tmp_path / "v.vec")
    assert words == ["a", "b"]
    np.testing.assert_array_equal(vectors, np.array([[0.5, -1], [1e-3, 2]], dtype=np.float32))


@pytest.mark.parametrize("name", ["v.txt", "v.bin", "v.vec", "v.txt.gz", "v.bin.gz"])
def test_what_is_written_is_read_bit_for_bit(tmp_path, vectors, name):
    vectors.save(tmp_path / name)
    again = WordVectors.load(tmp_path / name)
    assert again.words == vectors.words
    assert again.vectors.tobytes() == vectors.vectors.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == [name]
    first = WordVectors.load(tmp_path / name, limit=2)
    assert first.words == vectors.words[:2]
    assert first.vectors.tobytes() == vectors.vectors[:2].tobytes()


def test_a_large_binary_file_is_read_in_pieces(tmp_path):
    """Words and vectors lie across the pieces that are read at once."""
    rng = np.random.default_rng(0)
    large = WordVectors([f"word{i}" for i in range(3000)], rng.standard_normal((3000, 150)))
    large.save(tmp_path / "v.bin")
    assert (tmp_path / "v.bin").stat().st_size > 1_500_000
    assert np.array_equal(WordVectors.load(tmp_path / "v.bin").vectors, large.vectors)


def test_the_format_may_be_said(tmp_path, vectors):
    vectors.save(tmp_path / "vectors", format="binary")
    assert WordVectors.load(tmp_path / "vectors", format="binary").words == vectors.words
    with pytest.raises(ValueError, match=r"vectors.*\.txt, \.vec, \.bin.*text or binary"):
        vectors.save(tmp_path / "vectors")
    with pytest.raises(ValueError, match="text, binary, not 'parquet'"):
        vectors.save(tmp_path / "vectors", format="parquet")


def test_compressed_files_are_gzip(tmp_path, vectors):
    vectors.save(tmp_path / "v.txt.gz")
    vectors.save(tmp_path / "v.txt")
    assert (
        gzip.decompress((tmp_path / "v.txt.gz").read_bytes()) == (tmp_path / "v.txt").read_bytes()
    )


@pytest.mark.parametrize("binary", [False, True])
def test_gensim_reads_and_writes_the_same(tmp_path, vectors, binary):
    keyed_vectors = pytest.importorskip("gensim.models").KeyedVectors
    name = "v.bin" if binary else "v.txt"
    vectors.save(tmp_path / name)
    theirs = keyed_vectors.load_word2vec_format(str(tmp_path / name), binary=binary)
    assert theirs.index_to_key == vectors.words
    np.testing.assert_array_equal(theirs.vectors, vectors.vectors)
    theirs.save_word2vec_format(str(tmp_path / f"theirs-{name}"), binary=binary)
    ours = WordVectors.load(tmp_path / f"theirs-{name}")
    assert ours.words == vectors.words
    np.testing.assert_array_equal(ours.vectors, vectors.vectors)


def test_words_that_end_words_in_these_files_are_not_written(tmp_path):
    for word in ("new york", "", "line\nfeed"):
        with pytest.raises(ValueError, match="white space"):
            write(tmp_path / "v.txt", ["a", word], np.ones((2, 2), dtype=np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3 2\na 1 2\nb 1 2\n", "after 2 of 3 words"),
        ("1 2\na 1 2\nb 1 2\n", "line 3: more than the 1 words"),
        ("2 2\na 1 2\nb 1\n", "line 3: not a word and 2 numbers"),
        ("2 2\na 1 2\nb 1 x\n", "line 3: not a word and 2 numbers.*'x'"),
        ("0 2\n", "line 1: 0 words of 2 numbers"),
        ("2 2\na 1 2\na 3 4\n", "'a' has two vectors"),
        ("2 2\na 1 nan\nb 3 4\n", "'a' has NaN or Inf"),
        ("", "ends after 0"),
    ],
)
def test_damaged_text_is_named(tmp_path, text, message):
    path = tmp_path / "v.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        WordVectors.load(path)
    assert str(path) in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"1 2\n\xff 1 2\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read(tmp_path / "v.txt")


@pytest.mark.parametrize("numbers", ["1 99999999999999999999", "1 999999999999", "9" * 30 + " 2"])
@pytest.mark.parametrize("name", ["v.bin", "v.txt"])
def test_headers_that_no_file_can_hold(tmp_path, name, numbers):
    (tmp_path / name).write_bytes(numbers.encode() + b"\na 1 2\n")
    with pytest.raises(ValueError, match=rf"{name}: (damaged|line)"):
        read(tmp_path / name)


def test_flipped_bytes_of_a_compressed_file_are_named(tmp_path):
    path = tmp_path / "v.bin.gz"
    whole = gzip.compress(binary_bytes())
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):  # some flips, as of the time, change nothing
            read(path)


def test_damaged_binary_is_named(tmp_path):
    path = tmp_path / "v.bin"
    for length in range(len(binary_bytes()) - 1):
        path.write_bytes(binary_bytes()[:length])
        with pytest.raises(ValueError, match=r"v\.bin: damaged"):
            read(path)
    path.write_bytes(binary_bytes(count=2))
    with pytest.raises(ValueError, match="more than the 2 words"):
        read(path)
    path.write_bytes(b"1 2\n\xff " + bytes(8))
    with pytest.raises(ValueError, match="not UTF-8, at word 1 of 1"):
        read(path)
    path.write_bytes(b"9 2\n" + b"x" * 3_000_000)  # a word without an end
    with pytest.raises(ValueError, match="word 1 of 9"):
        read(path)
    path.write_bytes(b"1 1000000\na " + bytes(8))
    with pytest.raises(ValueError, match="word 1 of 1"):
        read(path)


def test_a_damaged_compressed_file_is_named(tmp_path, vectors):
    path = tmp_path / "v.bin.gz"
    vectors.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"v\.bin\.gz: damaged"):
        read(path)
    path.write_bytes(binary_bytes())
    with pytest.raises(ValueError, match="not compressed by gzip"):
        read(path)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        read(tmp_path / "none.txt")
    write(tmp_path / "v.txt", ["a"], np.ones((1, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="limit must be 1 or more, not 0"):
        read(tmp_path / "v.txt", limit=0)
