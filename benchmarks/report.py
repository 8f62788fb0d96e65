"""Result files as something to read: a page with pictures, a table in the terminal, the README's.

python -m bertkern.benchmarks.report [FILE ...] [--out FOLDER] [--readme FILE]

The page (report.html) is one file: pictures and style stand in it. It has a section per result file
and device, and no ratio is taken across sections. Each row carries the number of its line in the
result file. Where a group has several rows of bertkern's, "ours" is the one named "bertkern", which
is what a user gets who chooses nothing. Wrong outputs are red, have no figures, and are nobody's
best peer. Without matplotlib the page has tables only.
"""

import argparse
import base64
import html
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertkern.data.files import write_text

from . import plots
from .compare import (
    Group,
    amount,
    columns,
    duration,
    groups_of,
    is_measured,
    is_wrong,
    once,
    pass_of,
    percent,
    problem,
    times,
)
from .row import RESULTS, Row, geometric_mean, read_rows

OUT = Path("benchmarks", "report")
BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
MOST_HEADLINES = 20
FACTS_FIRST = ("threads", "date", "commit", "bertkern", "torch")


def giga(row: Row, count: float) -> str:
    """GFLOP/s and GB/s."""
    return amount(count / row.median_s / 1e9) if row.median_s else ""


def rate(row: Row) -> str:
    """12,345 tokens/s."""
    return f"{amount(row.rate)} {row.unit or 'items'}/s" if row.rate else ""


HEADINGS = (
    *("case", "dtype", "pass", "who", "median", "20 %", "80 %"),
    *("rate", "GFLOP/s", "% of floor", "time / ours"),
)


def _head(row: Row) -> tuple[str, str, str]:
    return (f"{row.op} {row.shape_text}".strip(), row.dtype, pass_of(row))


def _times(row: Row) -> tuple[str, str, str]:
    return (duration(row.median_s), duration(row.p20_s), duration(row.p80_s))


def table_of(rows: Sequence[Row]) -> str:
    """A line per row in plain text, peers together; headings of a group stand in its first line."""
    lines: list[Sequence[str]] = [HEADINGS]
    reasons: dict[int, str] = {}
    for group in groups_of(rows):
        head: Sequence[str] = _head(group.first)
        for row in group.rows:
            if is_measured(row):
                figures = (rate(row), giga(row, row.flops), percent(row.of_floor))
                lines.append((*head, row.peer, *_times(row), *figures, group.over_own(row)))
            else:
                # A long reason follows the line: it does not widen a column.
                reasons[len(lines)] = problem(row)
                lines.append((*head, row.peer, *[""] * 7))
            head = ("", "", "")
    text = enumerate(columns(lines, left=4).split("\n"))
    return "\n".join(f"{line}: {reasons[i]}" if i in reasons else line for i, line in text)


@dataclass
class Section:
    """The rows of one device in one file."""

    path: Path
    device: str
    rows: list[Row]
    lines: dict[int, int]  # id of a row -> its line in the file
    name: str  # short and unique: of anchors and pictures

    def groups(self, suite: str = "") -> list[Group]:
        """Peers together; of one suite, or of all."""
        return groups_of(row for row in self.rows if suite in ("", row.suite))

    def facts(self) -> dict[str, str]:
        """Provenance: what matters most first; several values where rows differ."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows:
            for key, value in row.provenance.items():
                found.setdefault(key, {})[str(value)] = None
        order = sorted(found, key=lambda k: FACTS_FIRST.index(k) if k in FACTS_FIRST else 99)
        return {key: " / ".join(found[key]) for key in order if key != "device"}


def sections_of(paths: Iterable[Path]) -> list[Section]:
    """Read the files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is not a row.
    """
    sections: list[Section] = []
    for path in paths:
        rows, text = read_rows([path]), path.read_text(encoding="utf-8").splitlines()
        numbers = [number for number, line in enumerate(text, 1) if line.strip()]
        lines = {id(row): number for row, number in zip(rows, numbers, strict=True)}
        by_device: dict[str, list[Row]] = {}
        for row in rows:
            by_device.setdefault(str(row.provenance.get("device", "unknown")), []).append(row)
        for device, of_device in by_device.items():
            stem = re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-")
            name = f"report-{len(sections) + 1}-{stem}"
            sections.append(Section(path, device, of_device, lines, name))
    return sections


def summary(section: Section) -> str:
    """Plain text: a line per group, and the geometric mean of each suite."""
    facts = section.facts()
    about = [f"{key} {facts[key]}" for key in FACTS_FIRST if key in facts]
    parts = [f"{section.device} · {' · '.join(about)} · {section.path.name}"]
    lines: list[Sequence[str]] = [
        ("case", "dtype", "pass", "best other", "its time", "bertkern", "ratio", "% of floor")
    ]
    speedups: dict[str, list[float]] = {}
    for group in once(section.groups()):
        row, own, best = group.first, group.own, group.best
        if row.suite in ("limits", "overhead") or own is None:
            continue
        good = is_measured(own)
        lines.append(
            (
                *_head(row),
                *((best.peer, duration(best.median_s)) if best else ("-", "")),
                duration(own.median_s) if good else problem(own).split(":")[0],
                times(group.speedup),
                percent(own.of_floor) if good else "",
            )
        )
        if group.speedup:
            speedups.setdefault(row.suite, []).append(group.speedup)
    if len(lines) > 1:
        parts.append(columns(lines, left=4))
    parts += [
        f"{suite}: geometric mean {geometric_mean(found):.2f}x over {len(found)} cases"
        for suite, found in speedups.items()
    ]
    parts += [
        f"{' '.join(_head(row))} {row.peer}: {problem(row)}"
        for row in filter(is_wrong, section.rows)
    ]
    return "\n".join(parts)


# The page.

STYLE = """
:root { color-scheme: light dark; --line: #8885; --quiet: #6b7280; --head: #8881 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 3rem;
  border-top: 2px solid var(--line); padding-top: 1rem; overflow-wrap: anywhere }
h3 { font-size: 1.05rem; margin-top: 2rem }
.box { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums }
td, th { padding: .18rem .6rem; white-space: nowrap; text-align: left; vertical-align: top }
th { border-bottom: 1px solid var(--line) } td.n, th.n { text-align: right }
tr.group td { padding-top: .8rem; font-weight: 600; border-bottom: 1px solid var(--line) }
tr.own td { font-weight: 600; background: #1f6feb1c }
tr.wrong td { color: #cf222e; font-weight: 600 } tr.none td { color: var(--quiet) }
tr:target td { outline: 2px solid #d9730d }
.wrong-box { border: 2px solid #cf222e; border-radius: 6px; padding: .6rem 1rem; color: #cf222e }
img { max-width: 100%; background: #fff; border-radius: 6px; margin: .5rem 0; display: block }
.quiet { color: var(--quiet) } summary { cursor: pointer; font-weight: 600; padding: .3rem 0 }
a { color: inherit } ul { padding-left: 1.2rem; overflow-wrap: anywhere }
"""
ROW_HEADINGS = (
    *("line", "who", "median", "20 %", "80 %", "time / ours", "rate", "GFLOP/s", "GB/s"),
    *("MFLOP", "MB", "floor", "% of floor", "peak MB", "max error", "note"),
)
WORDS = ("who", "note", "op", "shape", "dtype", "pass", "peer", "reason", "what", "value")


def _cells(tag: str, cells: Sequence[str], headings: Sequence[str]) -> str:
    """Cells of escaped text; numbers to the right."""
    return "".join(
        f"<{tag}{'' if heading in WORDS else ' class=n'}>{html.escape(cell)}</{tag}>"
        for cell, heading in zip(cells, headings, strict=True)
    )


def _box(headings: Sequence[str], body: Iterable[str]) -> str:
    lines = "\n".join(body)
    head = _cells("th", headings, headings)
    return f'<div class="box"><table>\n<tr>{head}</tr>\n{lines}\n</table></div>\n'


def _plain_box(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _box(headings, (f"<tr>{_cells('td', row, headings)}</tr>" for row in rows))


def _anchor(section: Section, row: Row) -> str:
    return f"{section.name}-line-{section.lines[id(row)]}"


def _row_line(section: Section, row: Row, group: Group) -> str:
    number = section.lines[id(row)]
    anchor = _anchor(section, row)
    where = html.escape(f"{section.path.name}:{number}")
    line = f'<td class=n><a href="#{anchor}" title="{where}">{number}</a></td>'
    if not is_measured(row):
        kind = "wrong" if is_wrong(row) else "none"
        text = f"<td>{html.escape(row.peer)}</td><td colspan=14>{html.escape(problem(row))}</td>"
        return f'<tr id="{anchor}" class={kind}>{line}{text}</tr>'
    cells = (
        *(row.peer, *_times(row), group.over_own(row), rate(row)),
        *(giga(row, row.flops), giga(row, row.bytes)),
        *(amount(row.flops / 1e6), amount(row.bytes / 1e6)),
        *(duration(row.floor_s), percent(row.of_floor)),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
        "" if row.max_error is None else f"{row.max_error:.1e}",
        row.note,
    )
    kind = " class=own" if row.own else ""
    return f'<tr id="{anchor}"{kind}>{line}{_cells("td", cells, ROW_HEADINGS[1:])}</tr>'


def _full_table(section: Section, groups: Sequence[Group]) -> str:
    """Every row of a suite; absent peers stand in their own list."""

    def body() -> Iterable[str]:
        for group in groups:
            row = group.first
            shown = [r for r in group.rows if not r.error.startswith("absent")]
            if not shown:
                continue
            text = " · ".join(_head(row))
            if row.curve:
                text += f" · curve over {row.curve}"
            yield f"<tr class=group><td colspan={len(ROW_HEADINGS)}>{html.escape(text)}</td></tr>"
            for r in shown:
                yield _row_line(section, r, group)

    return _box(ROW_HEADINGS, body())


def _absent(section: Section) -> str:
    absent = [row for row in section.rows if row.error.startswith("absent")]
    counts = Counter((row.peer, row.error.partition(":")[2].strip()) for row in absent)
    items = "".join(
        f"<li>absent: <b>{html.escape(peer)}</b> ({html.escape(reason or 'no reason given')}), "
        f"rows: {count}</li>"
        for (peer, reason), count in counts.items()
    )
    return f"<h3>Absent peers</h3>\n<ul class=quiet>{items}</ul>\n" if items else ""


def _wrong(section: Section) -> str:
    items = "".join(
        f'<li><a href="#{_anchor(section, row)}">'
        f"{html.escape(' '.join(_head(row)))}</a>: "
        f"<b>{html.escape(row.peer)}</b> {html.escape(problem(row))}</li>"
        for row in section.rows
        if is_wrong(row)
    )
    return f'<div class="wrong-box"><b>Wrong outputs</b><ul>{items}</ul></div>\n' if items else ""


def _limits(section: Section) -> str:
    headings = ("op", "shape", "dtype", "who", "median", "20 %", "80 %", "GB/s", "GFLOP/s")
    rows = [
        (
            *(row.op, row.shape_text, row.dtype, row.peer),
            *_times(row),
            *(giga(row, row.bytes), giga(row, row.flops)),
        )
        for row in section.rows
        if row.suite == "limits" and row.median_s
    ]
    if not rows:
        return ""
    about = "The ceilings that floors come from, measured in the same run."
    return f"<h3>What the machine can do</h3>\n<p>{about}</p>\n{_plain_box(headings, rows)}"


def _overhead(section: Section) -> str:
    headings = ("op", "pass", "who", "median", "20 %", "80 %", "ours adds")
    rows = []
    for group in section.groups("overhead"):
        own = group.own
        for row in filter(is_measured, group.rows):
            added = ""
            if own is not None and own is not row and is_measured(own):
                added = duration((own.median_s or 0.0) - (row.median_s or 0.0))
            case, _, direction = _head(row)
            rows.append((case, direction, row.peer, *_times(row), added))
    if not rows:
        return ""
    about = "Host time of a call, and how much ours takes beyond each of the others."
    return f"<h3>Overhead on the host</h3>\n<p>{about}</p>\n{_plain_box(headings, rows)}"


def _pictures(pictures: Sequence[plots.Picture], kind: str, heading: str) -> str:
    images = "".join(
        f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.path.read_bytes()).decode("ascii")}">\n'
        for picture in pictures
        if picture.kind == kind
    )
    return f"<h3>{heading}</h3>\n{images}" if images else ""


def page(sections: Sequence[Section], pictures: dict[str, list[plots.Picture]]) -> str:
    """The whole page. `pictures`: of each section, by its name."""
    links = "".join(
        f'<li><a href="#{s.name}">{html.escape(s.device)}</a> '
        f"<span class=quiet>{html.escape(s.path.name)}</span></li>\n"
        for s in sections
    )
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>bertkern benchmarks</title><style>{STYLE}</style></head><body>\n"
        f"<h1>bertkern benchmarks</h1>\n<ul>{links}</ul>\n"
        "<p>Medians of interleaved samples, with the 20 % and 80 % quantiles. The floor is the "
        "larger of bytes / bandwidth and operations / rate, with the ceilings that the same run "
        "measured; % of floor is floor / median, and 100 % is all that the machine can do. "
        "A ratio compares rows of one run only; above 1, bertkern is faster. The number before "
        "a row is its line in the result file.</p>\n"
    ]
    for s in sections:
        found = pictures.get(s.name, [])
        suites = dict.fromkeys(row.suite for row in s.rows if row.suite != "limits")
        parts += [
            f'<h2 id="{s.name}">{html.escape(s.device)}</h2>\n'
            f"<p class=quiet>{html.escape(s.path.name)}, {len(s.rows)} rows</p>\n",
            _wrong(s),
            _plain_box(("what", "value"), list(s.facts().items())),
            _absent(s),
            _limits(s),
            _pictures(found, "speed-up", "Against the best other"),
            _pictures(found, "throughput", "Throughput"),
            _pictures(found, "curves", "Scaling"),
            _overhead(s),
            "<h3>All rows</h3>\n",
            *(
                f"<details open><summary>{html.escape(suite)}</summary>\n"
                f"{_full_table(s, s.groups(suite))}</details>\n"
                for suite in suites
            ),
        ]
    return "".join([*parts, "</body></html>\n"])


def write(sections: Sequence[Section], out: Path) -> list[Path]:
    """Write the page and its pictures; without matplotlib the page alone, and say so."""
    for old in out.glob("report-*.png"):  # would not belong to this page
        old.unlink()
    styles = plots.styles_of(row for section in sections for row in section.rows)
    pictures: dict[str, list[plots.Picture]] = {}
    try:
        for section in sections:
            pictures[section.name] = plots.draw(section.groups(), styles, out, section.name)
    except ImportError:
        print("no pictures without matplotlib: pip install matplotlib", file=sys.stderr)
    target = out / "report.html"
    write_text(target, page(sections, pictures))
    return [target, *(picture.path for found in pictures.values() for picture in found)]


# The README's table.


def headline(section: Section) -> list[Group]:
    """Models and training, then each op and pass at its largest: at most MOST_HEADLINES.

    Points of scaling curves are left to the page where the same op has cases of its own.
    """
    groups = [group for group in once(section.groups()) if group.own is not None]

    def largest(groups: Iterable[Group], key: Callable[[Row], Any]) -> list[Group]:
        found: dict[Any, Group] = {}
        for group in groups:
            kept = found.setdefault(key(group.first), group)
            if group.first.items > kept.first.items:
                found[key(group.first)] = group
        return list(found.values())

    whole = [group for group in groups if group.first.suite in ("models", "training")]
    cases = {(g.first.suite, g.first.op) for g in whole if not g.first.curve}
    whole = [g for g in whole if not g.first.curve or (g.first.suite, g.first.op) not in cases]
    ops = [group for group in groups if group.first.suite == "ops"]
    ops = largest(ops, lambda row: (row.op, row.direction))
    if len(whole) + len(ops) > MOST_HEADLINES:
        whole = largest(whole, lambda row: (row.suite, row.op, row.dtype, row.direction))
    return [*whole, *ops][:MOST_HEADLINES]


def readme_table(sections: Sequence[Section]) -> str:
    """Markdown: where it was measured, and the headlines.

    Raises:
        ValueError: there is no row that could be a headline.
    """
    parts = []
    for section in sections:
        groups = headline(section)
        if not groups:
            continue
        facts = section.facts()
        about = (
            f"{section.device}, {facts.get('threads', '?')} threads, "
            f"{facts.get('date', '?')[:10]}, commit {facts.get('commit', '?')}, "
            f"torch {facts.get('torch', '?')}; all rows: `{section.path.name}`"
        )
        lines = ["| what | bertkern | best other | ratio | % of floor |", "|---|--:|--:|--:|--:|"]
        for group in groups:
            row, own, best = group.first, group.own, group.best
            assert own is not None, "headline() takes groups of ours only"
            good = is_measured(own)
            cells = (
                ", ".join(_head(row)),
                duration(own.median_s) if good else problem(own).split(":")[0],
                f"{duration(best.median_s)} ({best.peer})" if best else "-",
                times(group.speedup) or "-",
                (percent(own.of_floor) if good else "") or "-",
            )
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append(f"{about}\n\n" + "\n".join(lines))
    if not parts:
        raise ValueError("no rows of models, training or ops for the README's table")
    return "\n\n".join(parts)


def with_table(path: Path, table: str) -> str:
    """The file's text with the table between the markers, in place of what stood there.

    Raises:
        OSError: the file cannot be read.
        ValueError: the markers are not there, once each and in order.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    begins, ends = ([i for i, x in enumerate(lines) if x.strip() == m] for m in (BEGIN, END))
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, once each and in this order")
    kept = [*lines[: begins[0] + 1], "", *table.splitlines(), "", *lines[ends[0] :]]
    return "\n".join(kept) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report. Exit code 1 when a file cannot be read or the README has no markers."""
    parser = argparse.ArgumentParser(
        prog="report", description="Result files as a page with pictures."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all results")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder (default {OUT})")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="replace the table in it")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        print(f"no result files in {RESULTS}", file=sys.stderr)
        return 1
    try:
        sections = sections_of(files)
        if not sections:
            raise ValueError("the result files hold no rows")
        if options.readme:
            table = readme_table(sections)
            write_text(options.readme, with_table(options.readme, table))
    except (OSError, ValueError) as wrong:
        print(f"no report: {wrong}", file=sys.stderr)
        return 1
    page_file, *pictures = write(sections, options.out)
    print("\n\n".join(map(summary, sections)), f"\n\n{page_file}, {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
