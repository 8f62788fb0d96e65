"""Pairs of texts: every form gives the same pairs, and what is wrong is named with its place."""

import io
import json

import datasets
import pyarrow
import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import write_po
from pyarrow import parquet

from bertkern.data.parallel_text import Pair, read_line_files, read_parallel

PAIRS = [("A cat.", "Eine Katze."), ("OK", "OK"), ('Say "hi", you', "Sag „hi“, du")]


def texts(pairs):
    return [(pair.source, pair.target) for pair in pairs]


def tsv(rows):
    return "".join("\t".join(row) + "\n" for row in rows)


def csv(rows):
    return "".join(",".join('"' + f.replace('"', '""') + '"' for f in row) + "\r\n" for row in rows)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def catalogue(pairs, write):
    found = Catalog()
    for source, target in pairs:
        found.add(source, target)
    file = io.BytesIO()
    write(file, found)
    return file.getvalue()


NAMED = [{"target": target, "id": 1, "source": source} for source, target in PAIRS]
WMT = [{"translation": {"en": source, "de": target}} for source, target in PAIRS]
WITH_HEADER = [("target", "source"), *((target, source) for source, target in PAIRS)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("two.tsv", tsv(PAIRS)),
        ("two.txt", tsv(PAIRS)),
        ("mark.tsv", "\ufeff\n" + tsv(PAIRS)),
        ("windows.tsv", tsv(PAIRS).replace("\n", "\r\n")),
        ("languages.tsv", tsv([("en", "de-CH"), *PAIRS])),
        ("header.tsv", tsv(WITH_HEADER)),
        ("two.csv", csv(PAIRS)),
        ("blank.csv", " \r\n\r\n" + csv(PAIRS)),
        ("breaks.csv", csv([("A\ncat.", "Eine\nKatze."), *PAIRS[1:]])),
        ("header.csv", csv(WITH_HEADER)),
        ("rows.jsonl", json_lines(NAMED)),
        ("rows.json", json.dumps(NAMED)),
    ],
)
def test_tables(write, name, content):
    assert texts(read_parallel([write(name, content)])) == PAIRS


def test_same_texts_in_the_first_line_are_no_header(write):
    assert texts(read_parallel([write("a.tsv", "OK\tOK\nYes\tJa\n")])) == [
        ("OK", "OK"),
        ("Yes", "Ja"),
    ]


def test_named_columns(write):
    header = write("a.tsv", tsv([("en", "de", "by"), *((*pair, "x") for pair in PAIRS)]))
    assert texts(read_parallel([header], "en", "de")) == PAIRS
    assert texts(read_parallel([header], "de", "en")) == [(b, a) for a, b in PAIRS]
    wmt = write("wmt.jsonl", json_lines(WMT))
    assert texts(read_parallel([wmt], "en", "de")) == PAIRS
    numbered = write("tatoeba.tsv", tsv([(*pair, "by somebody") for pair in PAIRS]))
    assert texts(read_parallel([numbered], "2", "1")) == [(b, a) for a, b in PAIRS]


def test_parquet(tmp_path):
    plain, nested = tmp_path / "plain.parquet", tmp_path / "nested.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(NAMED), plain, row_group_size=2)
    parquet.write_table(pyarrow.Table.from_pylist(WMT), nested)
    pairs = read_parallel([plain])
    assert texts(pairs) == PAIRS
    assert pairs[2].where == f"{plain}: row 3"
    assert texts(read_parallel([nested], "en", "de")) == PAIRS
    with pytest.raises(ValueError, match=r"plain\.parquet: row 1: no 'en'; found: 'target', 'id'"):
        read_parallel([plain], "en", "de")
    plain.write_bytes(plain.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"plain\.parquet: damaged, or not a parquet file"):
        read_parallel([plain])


def test_catalogues_and_folders(write, tmp_path):
    (tmp_path / "de").mkdir()
    mo = write("de/a.mo", catalogue(PAIRS, write_mo))
    po = write("de/b.po", catalogue([("_New  one", "_Neu\nes")], write_po))
    write("de/README", "no pairs")
    expected = [*sorted(PAIRS), ("_New one", "_Neu es")]
    assert texts(read_parallel([tmp_path])) == expected
    assert texts(read_parallel([tmp_path / "de" / "*.?o"])) == expected
    assert texts(read_parallel([po], accelerators=False)) == [("New one", "Neu es")]
    assert read_parallel([mo])[0].where == f"{mo}: message 1"
    with pytest.raises(FileNotFoundError, match=r"none: no such file"):
        read_parallel([mo, tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no .*\.mo.* files in this folder"):
        read_parallel([tmp_path / "empty"])


def test_damaged_files_of_a_folder_can_be_left_out(write, tmp_path):
    (tmp_path / "de").mkdir()
    bad = write("de/a.mo", b"no catalogue")
    write("de/b.tsv", tsv(PAIRS))
    worse = write("de/c.tsv", "good\tgut\nbad\n")
    with pytest.raises(ValueError, match=r"a\.mo: not a \.mo catalogue"):
        read_parallel([tmp_path])
    notes: list[str] = []
    assert texts(read_parallel([tmp_path], skip_damaged=True, notes=notes)) == PAIRS
    assert [note.split(":")[1].strip() for note in notes] == [str(bad), str(worse)]
    with pytest.raises(FileNotFoundError, match="none"):
        read_parallel([tmp_path / "none"], skip_damaged=True)


def test_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter(WMT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = read_parallel(["hub:wmt14:de-en:test"], "en", "de")
    assert texts(pairs) == PAIRS
    assert pairs[1].where == "hub:wmt14:de-en:test: row 2: translation"
    assert asked == [(("wmt14", "de-en"), {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match=r"row 1: translation: no 'source'; found: 'en', 'de'"):
        read_parallel(["hub:wmt14"])

    def unreachable(*args, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"hub:wmt14: cannot be read after 0 rows \(no net"):
        read_parallel(["hub:wmt14"], "en", "de")


def test_line_files(write):
    en = write("text.en", "\ufeffA  cat.\r\nOK\n\nlast")
    de = write("text.de", "Eine Katze.\nOK\nleer\nzuletzt\n")
    notes: list[str] = []
    pairs = read_line_files(en, str(de), notes=notes)
    assert texts(pairs) == [*PAIRS[:2], ("last", "zuletzt")]
    assert pairs[2] == Pair("last", "zuletzt", f"{en}: line 4")
    assert notes == ["1 pair(s) with an empty side left out"]
    more = write("more.de", "1\n2\n3\n4\n5\n6\n")
    with pytest.raises(ValueError, match=r"text\.en has 4 lines, but .*more\.de has 6"):
        read_line_files(en, more)
    with pytest.raises(ValueError, match=r"more\.de has 6 lines, but .*text\.en has 4"):
        read_line_files(more, en)
    with pytest.raises(FileNotFoundError, match=r"none\.de: no such file"):
        read_line_files(en, en.with_name("none.de"))
    with pytest.raises(ValueError, match=r"latin\.de: not UTF-8 text: line 2 has the byte 0xe4"):
        read_line_files(en, write("latin.de", "a\nKäse\n".encode("latin-1")))


def test_line_ends_of_unicode_end_no_line(write):
    pairs = read_line_files(write("a", "one\u2028two\nthree\n"), write("b", "eins\x0czwei\ndrei\n"))
    assert texts(pairs) == [("one two", "eins zwei"), ("three", "drei")]


def test_empty_and_repeated_pairs(write):
    path = write("a.tsv", tsv([("a", "b"), ("a", " b "), ("a", "c"), ("", "x"), ("y", " ")]))
    notes: list[str] = []
    assert texts(read_parallel([path])) == [("a", "b"), ("a", "b"), ("a", "c")]
    pairs = read_parallel([path], unique=True, notes=notes)
    assert [(p.target, p.where) for p in pairs] == [
        ("b", f"{path}: line 1"),
        ("c", f"{path}: line 3"),
    ]
    assert notes == ["2 pair(s) with an empty side left out", "1 repeated pair(s) left out"]
    with pytest.raises(ValueError, match=r"no pairs in .*b\.tsv: 1 have an empty side"):
        read_parallel([write("b.tsv", "a\t \n")])
    with pytest.raises(ValueError, match="no pairs in an empty list of files"):
        read_parallel([])


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.tsv", "a\tb\nc\n", (), r"a\.tsv: line 2: 1 field\(s\), but there must be 2"),
        ("a.tsv", "a\tb\tc\n1\t2\t3\n", (), r"a\.tsv: no column 'source' for the source; found"),
        ("a.tsv", "x\ty\n1\t2\n", ("x", "z"), r"a\.tsv: no column 'z' for the target; found: 'x'"),
        ("a.tsv", "x\ty\n1\t2\n", ("1", "3"), r"line 1: no '3'; found: '1', '2'"),
        ("a.csv", 'a,b\n"c,d\n', (), r"a\.csv: line 2: not CSV"),
        ("a.jsonl", '{"source": "a", "target": 1}\n', (), r"line 1: 'target' must be text, not 1"),
        ("a.jsonl", '{"source": "\\ud800", "target": ""}\n', (), r"line 1: 'source' holds half of"),
        ("a.jsonl", '{"source"\n', (), r"a\.jsonl: line 1: not JSON"),
        ("a.xyz", "a\tb\n", (), r"a\.xyz: the file's name must end in one of \.tsv.*\.po, \.mo"),
        ("a.tsv", b"a\tb\n\xe4\tc\n", (), r"a\.tsv: line 2: not UTF-8"),
        ("a.csv", "", (), r"a\.csv: the file is empty"),
        ("a.csv", '""\r\n', (), r"a\.csv: no rows"),
    ],
)
def test_malformed(write, name, content, columns, message):
    with pytest.raises(ValueError, match=message):
        read_parallel([write(name, content)], *columns)
