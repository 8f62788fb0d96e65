"""Tables: what they hold, and that everything malformed is named with file and line."""

import json

import pytest

from bertkern.data.tables import read_table

ROWS = [{"text": 'He said "no", then\u2028left', "label": "a"}, {"text": "Café 😀", "label": "b"}]


def test_every_form_holds_the_same(write):
    tab = "text\tlabel\r\n" + "".join(f"{r['text']}\t{r['label']}\r\n" for r in ROWS)
    quoted = ['"' + r["text"].replace('"', '""') + '",' + r["label"] for r in ROWS]
    files = [
        write("a.tsv", tab),
        write("a.csv", "\ufefftext,label\n" + "\n".join(quoted)),
        write("a.jsonl", "\n".join(json.dumps(r) for r in ROWS) + "\n"),
        write("a.json", json.dumps(ROWS, indent=1)),
        write("lines.json", "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)),
    ]
    for path in files:
        table = read_table(path)
        assert [row.fields for row in table.rows] == ROWS, path
        assert table.columns == ["text", "label"]
        assert table.blank_lines == 0
    assert read_table(files[0]).rows[1].where.endswith("a.tsv: line 3")
    assert read_table(files[2]).rows[1].where.endswith("a.jsonl: line 2")
    assert read_table(files[3]).rows[1].where.endswith("a.json: [1]")


def test_lines_are_counted_through_quoted_line_breaks_and_blank_lines(write):
    path = write("a.csv", 'text,label\n"one\ntwo",a\n\nthree,b\nfour\n')
    with pytest.raises(ValueError, match=r"a.csv: line 6: 1 field\(s\), but there must be 2: 'te"):
        read_table(path)
    path = write("b.csv", 'text,label\n"one\ntwo",a\n\nthree,b\n')
    table = read_table(path)
    assert table.blank_lines == 1
    assert [row.where[-6:] for row in table.rows] == ["line 2", "line 5"]


def test_names_for_a_file_without_header(write):
    table = read_table(write("a.tsv", "x\t1\ny\t2\n"), columns=("text", "label"))
    assert [row.fields["label"] for row in table.rows] == ["1", "2"]
    assert table.rows[0].where.endswith("line 1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\n1\t2\n3\n", r"a.tsv: line 3: 1 field\(s\), but there must be 2: 'a', 'b'"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"line 2: 3 field\(s\)"),
        ("a.tsv", "a\ta\n1\t2\n", r"line 1: the header names 'a' twice"),
        ("a.csv", 'a,b\n1,2\n"open,3\n4,5\n', r"line 3: not CSV .*not closed"),
        ("a.tsv", b"a\tb\nfine\t1\ncaf\xe9\t2\n", r"line 3: not UTF-8 \(byte 0xe9 at position 4\)"),
        ("a.jsonl", '{"a": 1}\n{"a": 2', r"a.jsonl: line 2: not JSON \(.* at column 8\)"),
        ("a.jsonl", '{"a": 1}\n[2]\n', r"line 2: a JSON object was expected, not \[2\]"),
        ("a.json", '[{"a": 1},\n{"a": }]', r"a.json: line 2: not JSON"),
        ("a.json", '[{"a": 1}, 7]', r"a.json: \[1\]: a JSON object was expected, not 7"),
        ("a.tsv", "a\tb\n", r"a.tsv: no rows"),
        ("a.csv", " \n", r"a.csv: the file is empty"),
        ("a.jsonl", b"", r"a.jsonl: the file is empty"),
        ("a.parquet", "x", r"must end in one of .tsv"),
    ],
)
def test_malformed(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_table(write(name, content))


def test_a_missing_file_and_fields_of_the_wrong_type(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.tsv: no such file"):
        read_table(tmp_path / "none.tsv")
    (row, other) = read_table(write("a.jsonl", '{"a": 3, "b": ["x"]}\n{"b": ["x", 1]}')).rows
    assert row.texts("b") == ["x"]
    with pytest.raises(ValueError, match=r"line 1: 'a' must be text, not 3"):
        row.text("a")
    with pytest.raises(ValueError, match=r"line 2: no 'a'; found: 'b'"):
        other.text("a")
    with pytest.raises(ValueError, match=r"line 2: 'b' must be a list of texts"):
        other.texts("b")


def test_a_passage_may_be_longer_than_the_csv_module_allows(tmp_path):
    path = tmp_path / "long.csv"
    passage = "word " * 40_000
    path.write_text(f'text,label\n"{passage}",1\n')
    (row,) = read_table(path).rows
    assert row.text("text") == passage


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "fine", "words": ["a"]}\n{"text": "\\ud83d", "words": ["\\ud83d"]}\n')
    _, row = read_table(path).rows
    for read in (lambda: row.text("text"), lambda: row.texts("words")):
        with pytest.raises(ValueError, match=r"half.jsonl: line 2: .* holds half of a surrogate"):
            read()
