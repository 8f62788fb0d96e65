"""Corpora: in memory and on disk the same, split by documents, and damaged files named."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from data.numbered_documents import numbered_documents

from bertkern.data import Corpus, train_tokenizer
from bertkern.data.corpus import META

DOCUMENTS = [*numbered_documents(12, 6), ["alone"], [], ["d1", " ", "s2 d3"]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([s for d in DOCUMENTS for s in d], 400, min_frequency=1)


@pytest.fixture
def folder(tokenizer, tmp_path):
    Corpus.build(DOCUMENTS, tokenizer, tmp_path / "corpus")
    return tmp_path / "corpus"


def kept(tokenizer):
    """The token ids of each sentence, by document, one text at a time."""
    ids = [[tokenizer.encode(s, add_special_tokens=False).ids for s in d] for d in DOCUMENTS]
    ids = [[s for s in d if s] for d in ids]
    return [d for d in ids if len(d) > 1]


def as_lists(corpus):
    return [[s.tolist() for s in corpus.document(i)] for i in range(corpus.documents)]


@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
def test_in_memory_and_on_disk(tokenizer, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("bertkern.data.corpus._CHUNK_CHARACTERS", chunk)
    expected = kept(tokenizer)
    seen = []
    built = Corpus.build(
        iter(DOCUMENTS), tokenizer, tmp_path / "c", on_document=lambda: seen.append(1)
    )
    for corpus in (Corpus.from_documents(DOCUMENTS, tokenizer), built):
        assert as_lists(corpus) == expected
        assert corpus.documents == len(expected) == 13
        assert corpus.left_out == 2
        assert corpus.sentences == sum(map(len, expected))
        assert corpus.tokens == sum(len(s) for d in expected for s in d)
        assert corpus.ids.dtype == np.uint16
        corpus.verify()
        counts = np.bincount([i for d in expected for s in d for i in s], minlength=400)
        assert (corpus.unigram_counts() == counts[: corpus.vocab_size]).all()
    assert len(seen) == len(DOCUMENTS)
    assert Corpus.from_documents(DOCUMENTS, tokenizer).fingerprint == built.fingerprint


def test_fingerprints(tokenizer):
    first = Corpus.from_documents(DOCUMENTS, tokenizer).fingerprint
    joined = [[" ".join(DOCUMENTS[0][:2]), *DOCUMENTS[0][2:]], *DOCUMENTS[1:]]
    merged = [[*DOCUMENTS[0], *DOCUMENTS[1]], *DOCUMENTS[2:]]
    changed = [["s1 d2", *DOCUMENTS[0][1:]], *DOCUMENTS[1:]]
    for other in (joined, merged, changed, DOCUMENTS[1:]):
        assert Corpus.from_documents(other, tokenizer).fingerprint != first
    fewer_words = train_tokenizer([s for d in DOCUMENTS for s in d], 50, min_frequency=1)
    assert Corpus.from_documents(DOCUMENTS, fewer_words).fingerprint != first


def test_a_large_vocabulary_takes_four_bytes(tokenizer, tmp_path):
    """Ids beyond 65,535 survive."""
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.add_tokens([f"extra{i}" for i in range(70_000)])
    documents = [["extra69999 d1", "extra3"], ["d2", "extra65536"]]
    corpus = Corpus.build(documents, tokenizer, tmp_path / "c")
    assert corpus.ids.dtype == np.uint32
    assert corpus.document(0)[0][0] == tokenizer.token_to_id("extra69999")


def test_offsets_beyond_two_to_the_31(tokenizer, tmp_path):
    """A sparse file stands for a text of 2^31 + 1000 tokens."""
    folder = tmp_path / "c"
    Corpus.build([["d1", "s1"], ["d2", "s2"]], tokenizer, folder)
    tokens = (1 << 31) + 1000
    starts = np.array([0, 1 << 30, (1 << 31) + 10, tokens - 1, tokens])
    starts.astype("<i8").tofile(folder / "sentences.bin")
    with (folder / "ids.bin").open("r+b") as file:
        file.truncate(2 * tokens)
        file.seek(2 * (tokens - 1))
        file.write(np.array([7], dtype="<u2").tobytes())
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "tokens": tokens}))
    corpus = Corpus.open(folder)
    assert corpus.tokens == tokens
    assert corpus.document(1)[1].tolist() == [7]
    assert corpus.tokens_of_documents().tolist() == [(1 << 31) + 10, 990]


def test_split(tokenizer):
    corpus = Corpus.from_documents(DOCUMENTS, tokenizer)
    train, held_out = corpus.split(0.3, seed=3)
    assert (train.documents, held_out.documents) == (9, 4)
    assert sorted(as_lists(train) + as_lists(held_out)) == sorted(as_lists(corpus))
    assert train.tokens + held_out.tokens == corpus.tokens
    total = train.unigram_counts() + held_out.unigram_counts()
    assert (total == corpus.unigram_counts()).all()
    assert len({c.fingerprint for c in (corpus, train, held_out)}) == 3
    assert corpus.split(0.3, seed=3)[1].fingerprint == held_out.fingerprint
    assert corpus.split(0.3, seed=4)[1].fingerprint != held_out.fingerprint
    assert [part.documents for part in corpus.split(0.01)] == [11, 2]
    again = train.split(0.5)
    assert sorted(as_lists(again[0]) + as_lists(again[1])) == sorted(as_lists(train))


def test_refused_splits(tokenizer):
    corpus = Corpus.from_documents(DOCUMENTS[:3], tokenizer)
    with pytest.raises(ValueError, match=r"3 document\(s\).*at least 4"):
        corpus.split()
    with pytest.raises(ValueError, match=r"held_out must be between 0 and 1, not 1\.5"):
        corpus.split(1.5)
    with pytest.raises(ValueError, match=r"none of 2 document\(s\) has two sentences"):
        Corpus.from_documents([["one"], ["two"]], tokenizer)


def test_another_process_maps_the_files_itself(folder, tokenizer):
    part, _ = Corpus.open(folder).split(0.3)
    message = pickle.dumps(part)
    assert len(message) < 2000
    assert as_lists(pickle.loads(message)) == as_lists(part)
    in_memory, _ = Corpus.from_documents(DOCUMENTS, tokenizer).split(0.3)
    assert as_lists(pickle.loads(pickle.dumps(in_memory))) == as_lists(part)


def test_what_is_there_is_not_replaced_unasked(folder, tokenizer, tmp_path):
    with pytest.raises(FileExistsError, match="exists: choose another folder, or allow"):
        Corpus.build(DOCUMENTS, tokenizer, folder)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError, match=r"other exists: choose another folder$"):
        Corpus.build(DOCUMENTS, tokenizer, tmp_path / "other", overwrite=True)
    assert Corpus.build(DOCUMENTS[:4], tokenizer, folder, overwrite=True).documents == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "other"]


@pytest.mark.parametrize("error", [ValueError("line 7"), KeyboardInterrupt()])
def test_an_ended_build_leaves_nothing(folder, tokenizer, tmp_path, error):
    def documents():
        yield from DOCUMENTS[:5]
        raise error

    with pytest.raises(type(error)):
        Corpus.build(documents(), tokenizer, tmp_path / "new")
    with pytest.raises(type(error)):
        Corpus.build(documents(), tokenizer, folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]
    Corpus.open(folder).verify()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_build_leaves_nothing_that_opens(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program = (
        "import sys, time\n"
        "from bertkern.data import Corpus, load_tokenizer\n"
        "from bertkern.data import corpus\n"
        "corpus._CHUNK_CHARACTERS = 1\n"
        "def documents():\n"
        "    for _ in range(50): yield ['d1 s1', 'd1 s2']\n"
        "    print('going', flush=True); time.sleep(60)\n"
        "Corpus.build(documents(), load_tokenizer(sys.argv[1]), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "tokenizer.json", tmp_path / "c"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "going\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "c").exists()
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert len(left) == 1
    with pytest.raises(FileNotFoundError, match=r"not a corpus: there is no meta.json"):
        Corpus.open(left[0])


def test_a_full_disk_names_the_place(tokenizer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bertkern.data.corpus.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*new") as caught:
        Corpus.build(DOCUMENTS, tokenizer, tmp_path / "new")
    assert caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ids.bin", "sentences.bin", "documents.bin"])
def test_damaged_files_are_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name}: damaged: {len(content) - 1} bytes, not the"):
        Corpus.open(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing"):
        Corpus.open(folder)
    broken = bytearray(content)
    broken[len(broken) // 2 // 8 * 8 + 1] ^= 0x40
    path.write_bytes(broken)
    if name == "ids.bin":
        corpus = Corpus.open(folder)
        with pytest.raises(ValueError, match=r"damaged: id \d+ in a vocabulary of"):
            corpus.unigram_counts()
        with pytest.raises(ValueError, match="damaged: the text is not the one"):
            corpus.verify()
    else:
        with pytest.raises(ValueError, match=f"{name}: damaged: its numbers do not rise"):
            Corpus.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, where 1 is known"),
        ({"tokens": "many"}, "tokens is 'many'"),
        ({"fingerprint": None}, "fingerprint is None"),
    ],
)
def test_damaged_meta(folder, change, message):
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, **change}))
    with pytest.raises(ValueError, match=f"meta.json: damaged, or not of a corpus .{message}"):
        Corpus.open(folder)
    (folder / META).write_text('{"format": 1,')
    with pytest.raises(ValueError, match=r"meta.json: damaged"):
        Corpus.open(folder)


def test_an_interrupted_overwrite_keeps_the_old_corpus(tokenizer, tmp_path, monkeypatch):
    """Stopped between putting the old one aside and the new one in its place."""
    folder = tmp_path / "corpus"
    before = Corpus.build(DOCUMENTS, tokenizer, folder).fingerprint
    replace, calls = os.replace, []

    def stopped(source, target):
        if str(source).endswith(".tmp") and str(target) == str(folder):
            calls.append(target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("bertkern.data.corpus.os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        Corpus.build(DOCUMENTS[:4], tokenizer, folder, overwrite=True)
    assert calls
    assert Corpus.open(folder).fingerprint == before
    assert list(tmp_path.iterdir()) == [folder]
