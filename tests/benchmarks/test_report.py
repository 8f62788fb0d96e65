"""The report: every figure is there, wrong outputs are never fast, and it needs no network."""

import base64
import html.parser
import re
import sys

import pytest
from bertkern.benchmarks import report
from bertkern.benchmarks.row import Row, write_rows

VOID = ("meta", "img", "br")
PNG = b"\x89PNG\r\n\x1a\n"
FACTS = {
    **{"device": "CPU <A&B>", "threads": 4, "commit": "c0ffee", "torch": "2.13.0"},
    **{"date": "2026-01-02T03:04:05+00:00"},
}


def row(peer, median=None, *, error="", **changes):
    values = {
        **{"suite": "ops", "op": "attention", "direction": "forward", "dtype": "float32"},
        **{"shape": {"B": 8, "S": 128}, "samples": 25, "flops": 1e9, "bytes": 1e6},
        **{"items": 1024.0, "unit": "tokens", "floor_s": 5e-4, "provenance": FACTS},
    }
    return Row(
        **(values | changes),
        peer=peer,
        median_s=median,
        p20_s=median and median * 0.99,
        p80_s=median and median * 1.01,
        correct=not error,
        error=error,
    )


def all_rows():
    rows = [
        row("torch", 5e-3, suite="limits", op="copy", shape={"bytes": 4096}, flops=0.0, items=0.0),
        row("bertkern", 1.11e-3),
        row("torch", 2.22e-3, note="a <note>"),
        row("cheat", 1.7e-5, error="wrong: output 0 differs by 0.5 <b>"),
        row("FlashAttention", error="absent: needs a <GPU>"),
        row("slow", error="not run: out of memory"),
    ]
    for i, S in enumerate((64, 256, 1024)):
        shape = {"B": 2048 // S, "S": S}
        rows.append(row("bertkern", 1.01e-4 * 2**i, shape=shape, curve="S"))
        rows.append(row("torch", 3.03e-4 * 2**i, shape=shape, curve="S"))
    model = {"suite": "models", "op": "BERT", "shape": {"B": 1}}
    rows += [row("bertkern", 7.77e-2, **model), row("transformers", 6.66e-2, **model)]
    host = {"suite": "overhead", "op": "layer_norm", "shape": {}, "flops": 0.0, "bytes": 0.0}
    return [*rows, row("stub", 4.04e-6, **host), row("bertkern on a stub", 9.09e-6, **host)]


class Page(html.parser.HTMLParser):
    """Checks that tags close; keeps the links, the text, and the rows of class wrong."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.wrong = [], [], "", []
        self.ids = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[key] for key in ("src", "href") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append((tag, found.get("class")))
        if tag == "tr" and found.get("class") == "wrong":
            self.wrong.append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if ("tr", "wrong") in self.open:
            self.wrong[-1] += data + " "


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "ops.jsonl"
    write_rows(all_rows(), path)
    return path


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def made(results, *arguments):
    out = results.parent / "out"
    assert report.main([str(results), "--out", str(out), *arguments]) == 0
    return out, (out / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_every_row(results, without_matplotlib):
    text = made(results)[1]
    page = Page(text)
    for measured in all_rows():
        if measured.median_s and measured.correct:
            assert report.duration(measured.median_s) in page.text
    assert len(page.ids) == len(set(page.ids))
    assert 'title="ops.jsonl:3"' in text  # the line of torch's attention
    assert report.duration(9.09e-6 - 4.04e-6) in page.text  # what ours adds over the stub
    assert "c0ffee" in page.text
    assert "2.13.0" in page.text
    for link in page.links:
        assert not link.startswith("#") or link[1:] in page.ids


def test_a_wrong_output_is_wrong_and_nobodys_best(results, without_matplotlib, capsys):
    text = made(results)[1]
    page = Page(text)
    assert len(page.wrong) == 1
    assert "cheat" in page.wrong[0]
    assert "WRONG: output 0 differs" in page.wrong[0]
    assert report.duration(1.7e-5) not in page.text
    assert "Wrong outputs" in page.text
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("attention B=8"))
    assert re.split(r"\s{2,}", line)[3:] == ["torch", "2.22 ms", "1.11 ms", "2.00x", "45 %"]
    assert "cheat: WRONG" in out


def test_absent_peers_have_one_line(results, without_matplotlib):
    text = made(results)[1]
    assert Page(text).text.count("absent: FlashAttention (needs a <GPU>), rows: 1") == 1
    assert "not run: out of memory" in text


def test_text_is_escaped(results, without_matplotlib):
    text = made(results)[1]
    assert "CPU &lt;A&amp;B&gt;" in text
    assert "CPU <A" not in text
    assert "0.5 &lt;b&gt;" in text
    assert "a &lt;note&gt;" in text


def test_pictures_are_there_and_inlined(results):
    pytest.importorskip("matplotlib")
    out, text = made(results)
    pictures = sorted(out.glob("*.png"))
    kinds = {re.sub(r".*-(speed-up|throughput|curves)-\d+.png", r"\1", p.name) for p in pictures}
    assert kinds == {"speed-up", "throughput", "curves"}
    inlined = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", text)]
    assert sorted(inlined) == sorted(picture.read_bytes() for picture in pictures)
    for data in inlined:
        assert data.startswith(PNG)
        assert data.endswith(b"IEND\xaeB`\x82")
        assert len(data) > 5000
    assert not any("http" in link for link in Page(text).links if not link.startswith("data:"))
    # again, to the byte
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    made(results)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_without_matplotlib_there_are_tables(results, without_matplotlib, capsys):
    out = results.parent / "out"
    out.mkdir()
    (out / "report-1-old.png").write_bytes(PNG)
    made(results)
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert "pip install matplotlib" in capsys.readouterr().err


def test_devices_and_files_are_not_mixed(tmp_path, without_matplotlib, capsys):
    other = FACTS | {"device": "GPU"}
    write_rows([row("bertkern", 1e-3), row("torch", 1e-6, provenance=other)], tmp_path / "a.jsonl")
    write_rows([row("torch", 1e-6)], tmp_path / "b.jsonl")
    sections = report.sections_of([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [(s.device, s.path.name) for s in sections] == [
        *(("CPU <A&B>", "a.jsonl"), ("GPU", "a.jsonl"), ("CPU <A&B>", "b.jsonl")),
    ]
    assert [group.speedup for s in sections for group in s.groups()] == [None] * 3


README = f"# Title\n\nbefore\n{report.BEGIN}\nold table\n{report.END}\nafter\n"


def test_the_readmes_table_is_replaced(results, tmp_path, without_matplotlib):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    made(results, "--readme", str(readme))
    first = readme.read_text()
    assert first.startswith(f"# Title\n\nbefore\n{report.BEGIN}\n\n")
    assert first.endswith(f"\n\n{report.END}\nafter\n")
    assert "old table" not in first
    assert "CPU <A&B>, 4 threads, 2026-01-02, commit c0ffee, torch 2.13.0; all rows: " in first
    assert (
        "| BERT B=1, float32, forward | 77.7 ms | 66.6 ms (transformers) | 0.86x | 1 % |" in first
    )
    # of the attention cases the one with the most tokens; the first of equals
    assert "| attention B=8 S=128, float32, forward | 1.11 ms | 2.22 ms (torch) | 2.00x |" in first
    assert first.count("| attention") == 1
    made(results, "--readme", str(readme))
    assert readme.read_text() == first


@pytest.mark.parametrize(
    "text",
    ["# Title\n", f"{report.BEGIN}\n", f"{report.END}\n{report.BEGIN}\n", README + README],
    ids=["none", "no end", "turned", "twice"],
)
def test_a_readme_without_markers_is_left_alone(results, tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main([str(results), "--out", str(tmp_path), "--readme", str(readme)]) == 1
    assert readme.read_text() == text
    err = capsys.readouterr().err
    assert "benchmark table: begin" in err
    assert len(err.splitlines()) == 1


def test_the_headlines_are_few():
    rows = [
        row(peer, 1e-3, suite="models", op="BERT", shape={"B": B}, items=float(B), dtype=dtype)
        for B in range(1, 30)
        for dtype in ("float32", "bfloat16")
        for peer in ("bertkern", "torch")
    ]
    rows += [row("bertkern", 1e-3, op=f"op{i}") for i in range(30)]
    section = report.Section(report.Path("x.jsonl"), "cpu", rows, {}, "x")
    found = report.headline(section)
    assert len(found) == report.MOST_HEADLINES
    models = [group.first for group in found if group.first.suite == "models"]
    assert [(r.dtype, r.shape["B"]) for r in models] == [("float32", 29), ("bfloat16", 29)]


@pytest.mark.parametrize("content", ["{", "", None], ids=["broken", "empty", "missing"])
def test_files_that_cannot_be_read(tmp_path, capsys, content):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_table_of_a_terminal():
    lines = report.table_of(all_rows()[1:6]).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip())[:5] == ["case", "dtype", "pass", "who", "median"]
    first = re.split(r"\s{2,}", lines[1])
    assert first[:5] == ["attention B=8 S=128", "float32", "forward", "bertkern", "1.11 ms"]
    assert first[5:] == ["1.10 ms", "1.12 ms", "922,523 tokens/s", "901", "45 %", "1.00"]
    assert re.split(r"\s{2,}", lines[2].strip())[::10] == ["torch"]
    assert lines[2].endswith("2.00")
    assert lines[2].startswith(" ")  # the group's heading is not repeated
    assert lines[3].strip() == "cheat: WRONG: output 0 differs by 0.5 <b>"
    assert lines[4].strip() == "FlashAttention: absent: needs a <GPU>"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((1.234e-3, "1.23 ms"), (45.64e-6, "45.6 us"), (2.1, "2.10 s"), (123.4e-3, "123 ms")),
        *((999.96e-6, "1.00 ms"), (1234.0, "1,234 s"), (5e-9, "5.00 ns"), (None, "")),
    ],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text
