"""Sources of documents: every format gives the same text, and bad lines are named."""

import gc
import json
import sys
import tracemalloc

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from bertkern.data import read_documents, stream_documents

TEXTS = ["First line\ngoes on. Next.", "Über uns. Ein Satz.", "Other file."]
DOCUMENTS = [["First line goes on.", "Next."], ["Über uns.", "Ein Satz."], ["Other file."]]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def write_text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text(tmp_path):
    one = write_text(
        tmp_path / "one.txt",
        "\ufeffFirst line\r\ngoes on. Next.\r\n\r\n \r\nÜber uns. Ein Satz.\n\n\n",
    )
    two = write_text(tmp_path / "notes", "Other file.")
    assert list(stream_documents([one, str(two)])) == DOCUMENTS
    assert read_documents([one, two]) == DOCUMENTS
    old_mac = write_text(tmp_path / "mac.txt", "First line\rgoes on. Next.\r\rOther file.\r")
    assert read_documents([old_mac]) == [DOCUMENTS[0], DOCUMENTS[2]]


def test_one_sentence_per_line(tmp_path):
    """Lines are neither joined nor split, whatever stands in them, from every kind of file."""
    lines = ["no full stop here", "Two. In one line!", "a third"]
    text = write_text(tmp_path / "a.txt", "\ufeff" + "\r\n".join(lines) + "\r\n\r\nalone\r\n")
    assert read_documents([text], one_sentence_per_line=True) == [lines, ["alone"]]
    assert read_documents([text])[0] == ["no full stop here Two.", "In one line! a third"]
    rows = write_lines(tmp_path / "b.jsonl", [{"text": "\n".join(lines)}, {"text": [lines[1]]}])
    table = write_table(tmp_path / "c.parquet", text=["\r".join(lines), " alone\n\n"])
    for path, last in ((rows, lines[1:2]), (table, ["alone"])):
        assert list(stream_documents([path], one_sentence_per_line=True)) == [lines, last]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_lines(tmp_path, suffix):
    rows = [{"body": TEXTS[0], "id": 1}, {"body": ["Über\nuns.", " ", "Ein  Satz."]}, {"body": ""}]
    path = write_lines(tmp_path / f"file{suffix}", [*rows, {"body": TEXTS[2]}])
    with path.open("a") as file:
        file.write(" \n")
    assert list(stream_documents([path], "body")) == DOCUMENTS


def test_parquet(tmp_path):
    path = write_table(tmp_path / "strings.parquet", text=TEXTS, other=[1, 2, 3])
    assert list(stream_documents([path])) == DOCUMENTS
    path = write_table(tmp_path / "lists.parquet", text=DOCUMENTS)
    assert list(stream_documents([path])) == DOCUMENTS


def test_folders_and_patterns(tmp_path):
    folder = tmp_path / "news"
    (folder / "deep").mkdir(parents=True)
    write_text(folder / "b.txt", TEXTS[2])
    write_lines(folder / "a.jsonl", [{"text": TEXTS[0]}])
    write_table(folder / "deep" / "a.parquet", text=[TEXTS[1]])
    write_text(folder / "picture.png", b"\xff\xd8")
    assert list(stream_documents([folder])) == [DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[1]]
    assert list(stream_documents([f"{folder}/*.txt"])) == [DOCUMENTS[2]]
    assert list(stream_documents([f"{folder}/**/*.parquet"])) == [DOCUMENTS[1]]
    odd = write_text(tmp_path / "a[1].txt", TEXTS[2])  # a file, though it looks like a pattern
    assert list(stream_documents([odd])) == [DOCUMENTS[2]]


def test_hub(tmp_path):
    """`datasets` reads a folder as it reads a repository of the hub."""
    write_lines(tmp_path / "train.jsonl", [{"text": t} for t in TEXTS])
    write_lines(tmp_path / "validation.jsonl", [{"text": TEXTS[2]}])
    assert list(stream_documents([f"hub:{tmp_path}"])) == DOCUMENTS
    assert list(stream_documents([f"hub:{tmp_path}:default:validation"])) == [DOCUMENTS[2]]
    assert list(stream_documents([f"hub:{tmp_path}::validation"])) == [DOCUMENTS[2]]
    with pytest.raises(ValueError, match=r"row 1: no column 'body'; there are text"):
        list(stream_documents([f"hub:{tmp_path}"], "body"))
    with pytest.raises(ConnectionError, match=r"cannot be read after 0 rows .*test"):
        list(stream_documents([f"hub:{tmp_path}::test"]))


def test_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"hub:no/such: cannot be read .*network, give files"):
        list(stream_documents(["hub:no/such"]))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", text=TEXTS)
    for package, source in (("pyarrow", path), ("datasets", "hub:name")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=rf"{package}: pip install 'bertkern.data.'"):
            list(stream_documents([source]))


def test_missing_files(tmp_path):
    for source, message in (
        (tmp_path / "none.txt", r"none.txt: no such file"),
        (f"{tmp_path}/*.txt", r"\*.txt: no file matches"),
        (tmp_path, r"no .txt, .jsonl, .ndjson, .json, .parquet files in this folder"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            stream_documents([source])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 3: not JSON, one object a line .Unterminated string"),
        ('["A list."]', "line 3: an object with the column 'text' is needed, not a list of str"),
        ('{"body": "x", "id": 1}', "line 3: no column 'text'; there are body, id"),
        ("{}", "line 3: no column 'text'; there are none"),
        ('{"text": null}', "line 3: the column 'text' must hold .* not null"),
        ('{"text": 7}', "line 3: the column 'text' must hold a string or .* not int"),
        ('{"text": ["a", 7]}', "line 3: the column 'text' must hold .* not a list of int"),
        (b'{"text": "caf\xe9"}', "not UTF-8 text: line 3 has the byte 0xe9 at offset 13"),
    ],
)
def test_malformed_json_lines(tmp_path, line, message):
    good = b'{"text": "Good."}\n\n'
    bad = line if isinstance(line, bytes) else line.encode()
    path = write_text(tmp_path / "bad.jsonl", good + bad + b"\n")
    documents = stream_documents([path])
    assert next(documents) == ["Good."]
    with pytest.raises(ValueError, match=f"bad.jsonl: {message}"):
        next(documents)


def test_malformed_text_and_tables(tmp_path):
    path = write_text(tmp_path / "text.txt", b"Fine.\nOr caf\xe9.")
    with pytest.raises(ValueError, match=r"text.txt: not UTF-8 text: line 2 has the byte 0xe9"):
        read_documents([path])
    table = write_table(tmp_path / "a.parquet", text=["Good.", None], n=[1, 2])
    with pytest.raises(ValueError, match=r"a.parquet: row 2: the column 'text' must .* not null"):
        read_documents([table])
    with pytest.raises(ValueError, match=r"a.parquet: no column 'body'; there are text, n"):
        read_documents([table], "body")
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.parquet: damaged, or not a parquet file"):
        read_documents([table])


def test_no_text(tmp_path):
    path = write_text(tmp_path / "text.txt", " \n\n ")
    with pytest.raises(ValueError, match=r"no text in .*text.txt"):
        read_documents([path])
    with pytest.raises(ValueError, match="no text in an empty list of files"):
        read_documents([])


def test_files_are_not_held_in_memory(tmp_path):
    """6 MB pass by; a small part of them is in memory at a time."""
    line = json.dumps({"text": "A sentence of a document. " * 40}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * 3_000)
    (tmp_path / "big.txt").write_text(("A sentence of a document. " * 40 + "\n\n") * 3_000)
    gc.collect()
    tracemalloc.start()
    count = sum(1 for _ in stream_documents([tmp_path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6_000
    assert peak < 1_000_000


@pytest.mark.parametrize("value", [r'"\ud83d"', r'["fine", "\ud83d"]'])
def test_half_a_surrogate_pair_is_named(tmp_path, value):
    path = tmp_path / "half.jsonl"
    path.write_text(f'{{"text": "Fine."}}\n{{"text": {value}}}\n')
    with pytest.raises(ValueError, match=r"half.jsonl: line 2: .*'text' holds half of a surrogate"):
        list(stream_documents([str(path)]))
