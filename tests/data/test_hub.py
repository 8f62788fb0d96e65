"""Datasets of the hub, read by HTTP from a hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data.hub_server import (
    GATED,
    NOT_FOUND,
    HubServer,
    hub_documents,
    hub_environment,
    hub_pairs,
    hub_reader,
)

from bertkern.data import Corpus, read_documents, save_tokenizer

pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

README = """---
configs:
- config_name: news
  data_files:
  - split: train
    path: news/train-*.jsonl
  - split: test
    path: news/test.jsonl
  default: true
- config_name: letters
  data_files:
  - split: train
    path: letters.jsonl
---
# Some texts
"""
LOST = r"cannot be read after 0 rows \(.+\); without a network, give files"
# what the client may sleep for a lost connection, and how often ask, before the user has his error
SECONDS, REQUESTS = 60, 30
HURRY = 0.4  # seconds for an answer, in place of ten


def texts(name, rows=400):
    return [f"Row {n} of {name} begins. It goes on, and ends." for n in range(rows)]


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        corpus = server.folder("datasets", "user/corpus")
        (corpus / "README.md").write_text(README)
        for part in ("train-0", "train-1", "test"):
            write_lines(corpus / "news" / f"{part}.jsonl", [{"text": t} for t in texts(part)])
        write_lines(corpus / "letters.jsonl", [{"text": t} for t in texts("letters")])
        yield server


@pytest.fixture(scope="module")
def run(hub, home):
    with hub_reader(hub.address, home) as call:
        yield call


@pytest.fixture
def faults(hub):
    """The server, whose faults end with the test."""
    yield hub
    hub.heal()


def parquet_set(hub, name):
    """A dataset of two tables, of four groups of rows each."""
    folder = hub.folder("datasets", name)
    for part in ("train-0", "train-1"):
        table = pyarrow.table({"text": texts(f"{name} {part}")})
        parquet.write_table(table, folder / f"{part}.parquet", row_group_size=100)
    return folder


def test_documents_are_those_of_the_files(hub, run):
    corpus = hub.root / "datasets" / "user/corpus"
    expected = read_documents([corpus / "news" / f"train-{n}.jsonl" for n in range(2)])
    assert len(expected) == 800
    assert run(hub_documents, "hub:user/corpus").value == expected
    folder = parquet_set(hub, "user/tables")
    expected = read_documents([folder / f"train-{n}.parquet" for n in range(2)])
    assert len(expected) == 800
    assert run(hub_documents, "hub:user/tables").value == expected


def test_rows_are_streamed(hub, run):
    """The first documents come before the second file is asked for."""
    parquet_set(hub, "user/streamed")
    read = run(hub_documents, "hub:user/streamed", 3)
    assert read.value == [
        [f"Row {n} of user/streamed train-0 begins.", "It goes on, and ends."] for n in range(3)
    ]
    assert hub.asked("user/streamed/resolve", "train-0.parquet")
    assert not hub.asked("user/streamed/resolve", "train-1.parquet")


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("hub:user/corpus:letters", "letters.jsonl"),
        ("hub:user/corpus::test", "news/test.jsonl"),
        ("hub:user/corpus:news:test", "news/test.jsonl"),
    ],
)
def test_config_and_split(hub, run, place, path):
    read = run(hub_documents, place)
    assert read.value == read_documents([hub.root / "datasets" / "user/corpus" / path])


def test_parallel_text(hub, run):
    pairs = [{"en": f"House number {n}.", "de": f"Haus Nummer {n}, größer."} for n in range(50)]
    folder = hub.folder("datasets", "user/pairs")
    write_lines(folder / "train.jsonl", [{"translation": pair} for pair in pairs])
    found = run(hub_pairs, "hub:user/pairs", "en", "de").value
    assert [(p.source, p.target) for p in found] == [(p["en"], p["de"]) for p in pairs]
    assert found[9].where == "hub:user/pairs: row 10: translation"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hub:user/none", r"after 0 rows \(Dataset 'user/none' doesn't exist on the Hub"),
        ("hub:user/corpus::dev", r"after 0 rows \(Bad split: dev\. .*'train', 'test'\]\)$"),
        ("hub:user/corpus:poems", r"after 0 rows \(BuilderConfig 'poems' .*'news', 'letters'\]\)$"),
    ],
)
def test_wrong_names(run, place, message):
    read = run(hub_documents, place)
    assert isinstance(read.error, ConnectionError)
    with pytest.raises(ConnectionError, match=f"^{place}: cannot be read {message}"):
        raise read.error
    assert (read.value, read.slept) == ([], 0)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("user/secret", NOT_FOUND, "Dataset 'user/secret' doesn't exist on the Hub or cannot be"),
        ("user/corpus", NOT_FOUND, "Repository Not Found for url: http.*user/corpus"),
        ("user/gated", GATED, "Dataset 'user/gated' is a gated dataset on the Hub"),
    ],
)
def test_private_and_gated(faults, run, name, answer, message):
    """Also one that was public when it was read before, of which the client has a part."""
    assert run(hub_documents, "hub:user/corpus", 1).error is None
    faults.refused[name] = answer
    read = run(hub_documents, f"hub:{name}")
    with pytest.raises(ConnectionError, match=rf"{name}: .*after 0 rows \({message}[^;]*\)$"):
        raise read.error
    assert read.slept == 0


@pytest.mark.parametrize("way", ["dropped", "silent"])
@pytest.mark.parametrize("step", ["README.md", "/revision/", "/tree/"])
def test_hub_that_fails_at_the_start(faults, run, step, way):
    """Whichever request has no answer, the error is the same; the client's own had no common
    base."""
    name = f"user/start-{way}-{step.strip('/')}"
    parquet_set(faults, name)
    getattr(faults, way).add(step)
    before = len(faults.requests)
    read = run(hub_documents, f"hub:{name}", None, HURRY if way == "silent" else 10)
    with pytest.raises(ConnectionError, match=LOST):
        raise read.error
    assert read.slept <= SECONDS
    assert len(faults.requests) - before <= REQUESTS


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("jsonl", "cut"),
        ("jsonl", "dropped"),
        ("parquet", "cut"),
        ("parquet", "dropped"),
    ],
)
def test_hub_that_fails_in_the_middle(faults, run, kind, way):
    """The rows until then have come; datasets would have gone on asking for ten minutes."""
    name = f"user/middle-{way}-{kind}"
    folder = parquet_set(faults, name)
    if kind == "jsonl":
        for path in sorted(folder.iterdir()):
            write_lines(path.with_suffix(".jsonl"), parquet.read_table(path).to_pylist())
            path.unlink()
    last = f"train-1.{kind}"
    if way == "cut":
        faults.cut[last] = 3000
    else:
        getattr(faults, way).add(last)
    before = len(faults.requests)
    read = run(hub_documents, f"hub:{name}")
    with pytest.raises(ConnectionError, match=LOST.replace("after 0", "after 400")):
        raise read.error
    assert read.value == read_documents([folder / f"train-0.{kind}"])
    assert read.slept <= SECONDS
    assert len(faults.requests) - before <= REQUESTS


def test_interruption_that_ends_is_survived(faults, run):
    folder = parquet_set(faults, "user/back")
    faults.dropped.add("train-1.parquet")
    faults.heals_after = 8  # more than the six requests of one try
    read = run(hub_documents, "hub:user/back")
    assert read.error is None
    assert read.value == read_documents([folder / f"train-{n}.parquet" for n in range(2)])
    assert 23 <= read.slept <= SECONDS


def test_the_libraries_settings_stay(run):
    assert run(hub_documents, "hub:user/corpus", 1).settings_stay
    assert run(hub_documents, "hub:user/none").settings_stay


@pytest.mark.parametrize(("name", "seconds"), [("user/new", 60), ("user/corpus", 130)])
def test_hub_that_is_not_there(hub, run, name, seconds):
    """Nor is what was read before of any use: rows are not kept, and of it more is asked for."""
    assert run(hub_documents, "hub:user/corpus", 1).error is None
    with hub.away():
        read = run(hub_documents, f"hub:{name}")
    with pytest.raises(ConnectionError, match=LOST):
        raise read.error
    assert read.slept <= seconds


def test_command_line(hub, home, words, tmp_path):
    save_tokenizer(words, tmp_path / "words")
    command = [
        *(str(Path(sys.executable).with_name("bertkern")), "data", "prepare"),
        *("hub:user/corpus:news:test", "--tokenizer", str(tmp_path / "words")),
        *("--out", str(tmp_path / "corpus")),
    ]
    environment = os.environ | hub_environment(hub.address, home)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "400 documents, 800 sentences" in done.stdout
    from_hub = Corpus.open(tmp_path / "corpus")
    path = hub.root / "datasets" / "user/corpus" / "news/test.jsonl"
    from_file = Corpus.from_documents(read_documents([path]), words)
    assert from_hub.fingerprint == from_file.fingerprint
