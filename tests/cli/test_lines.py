"""Reading lines and records, and pairing them with results."""

import io
import json

import pytest

from bertkern.cli import lines
from bertkern.cli.console import CommandError
from bertkern.models import InputError


class Length:
    def __init__(self, text):
        self.length, self.truncated = len(text), False


def items(*texts):
    for number, text in enumerate(texts, start=1):
        yield lines.Item(lines.Line(f"f: line {number}", {"line": number}, text), {}, text)


def test_lines_and_their_places(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\n  two \n\0\nthrée".encode())
    found = list(lines.read_lines([str(path)]))
    assert [line.text for line in found] == ["one", "two", "\0", "thrée"]
    assert [line.place["line"] for line in found] == [1, 3, 4, 5]
    assert found[1].where == f"{path}: line 3"


def test_empty_lines_are_kept_where_they_are_asked_for(tmp_path):
    path, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    path.write_text("one\n\n \ntwo\n")
    found = [(line.text, record) for line, record in lines.read_records([str(path)], None, True)]
    assert found == [(text, {"text": text}) for text in ("one", "", "", "two")]
    records.write_text('{"text": "one"}\n\n{"text": ""}\n')
    found = [record["text"] for _, record in lines.read_records([str(records)], None, True)]
    assert found == ["one", ""]


def test_json_is_read_by_name_or_wish(tmp_path):
    path, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    for file in (path, plain):
        file.write_text('{"text": "a\\nb", "id": 3}\n')
    ((_, record),) = lines.read_records([str(path)], None)
    assert record == {"text": "a\nb", "id": 3}
    assert lines.identity(record) == {"id": 3}
    ((_, record),) = lines.read_records([str(plain)], None)
    assert record == {"text": '{"text": "a\\nb", "id": 3}'}
    ((_, record),) = lines.read_records([str(plain)], lines.Input.jsonl)
    assert record["id"] == 3
    ((_, record),) = lines.read_records([str(path)], lines.Input.text)
    assert record["text"].startswith("{")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', "line 2: not JSON"),
        ('["a"]', "line 2: a JSON object was expected"),
        ('{"txt": "a"}', "line 2: no 'text'; found: 'txt'"),
        ('{"text": ["a"]}', "line 2: 'text' must be text, not"),
    ],
)
def test_bad_records_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": ""}}\n{line}\n')

    def read():
        for found, record in lines.read_records([str(path)], None):
            lines.text_field(found, record, "text")

    with pytest.raises(CommandError) as caught:
        read()
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_results_find_their_inputs_although_the_stream_reads_ahead():
    def stream(values):
        while window := [v for _, v in zip(range(3), values, strict=False)]:
            yield from map(Length, window)

    found = list(lines.results(items("a", "bb", "ccc", "dddd"), stream))
    assert [(item.value, result.length) for item, result in found] == [
        ("a", 1),
        ("bb", 2),
        ("ccc", 3),
        ("dddd", 4),
    ]


def test_an_input_that_cannot_be_computed_is_named_by_its_line():
    def stream(values):
        read = list(values)
        yield Length(read[0])
        raise InputError(2, "is wrong")

    found = lines.results(items("a", "b", "c"), stream)
    next(found)
    with pytest.raises(CommandError, match="f: line 3: is wrong"):
        next(found)


def test_formats(monkeypatch, tmp_path):
    assert lines.choose_format(None, tmp_path / "a.tsv") is lines.Format.tsv
    assert lines.choose_format(None, tmp_path / "a.CSV") is lines.Format.csv
    assert lines.choose_format(None, tmp_path / "a.out") is lines.Format.jsonl
    assert lines.choose_format(lines.Format.csv, tmp_path / "a.tsv") is lines.Format.csv
    assert lines.choose_format(None, None) is lines.Format.jsonl
    assert lines.choose_format(None, None, few=True) is lines.Format.table
    assert lines.choose_format(None, tmp_path / "a.txt", plain=True) is lines.Format.text
    assert lines.choose_format(None, tmp_path / "a.tsv", plain=True) is lines.Format.tsv
    for name in ("a.jsonl", "a.json"):
        assert lines.choose_format(None, tmp_path / name, plain=True) is lines.Format.jsonl
    assert lines.choose_format(None, None, plain=True) is lines.Format.text
    with pytest.raises(CommandError, match="for the terminal"):
        lines.choose_format(lines.Format.table, tmp_path / "a")
    with pytest.raises(CommandError, match="--format text: the results of this command"):
        lines.choose_format(lines.Format.text, None)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    assert lines.choose_format(None, None) is lines.Format.table


def output(path, format):
    return lines.Output(path, format, ["n", "text"], lambda record: [record], None)


def test_rows_in_each_format(tmp_path):
    record = {"n": 1, "text": 'tab\tcomma,"quote"\nnew', "more": [1]}
    found = {}
    for format in ("jsonl", "tsv", "csv"):
        path = tmp_path / "new" / format
        results = [(next(items("x")), Length("x"))]
        to = output(path, lines.Format(format))
        lines.write_results(results, lambda _: record, to, "texts", 9)
        found[format] = path.read_text()
    assert json.loads(found["jsonl"]) == record
    assert found["tsv"] == 'n\ttext\n1\t"tab\tcomma,""quote""\nnew"\n'
    assert found["csv"] == 'n,text\n1,"tab\tcomma,""quote""\nnew"\n'


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")

    def results():
        yield next(items("x")), Length("x")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        lines.write_results(results(), lambda _: {}, output(path, lines.Format.jsonl), "texts", 9)
    with pytest.raises(CommandError, match="no texts"):
        lines.write_results([], lambda _: {}, output(path, lines.Format.jsonl), "texts", 9)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
