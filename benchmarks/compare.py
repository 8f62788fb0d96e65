"""Has bertkern become slower? Two result files, compared by ratios and not by times.

python -m bertkern.benchmarks.compare OLD NEW [--threshold X]

    ratio   time of a peer / time of bertkern, both of one run: higher is better
    noise   sqrt(sum of ((p80 - p20) / (2 median))^2) over bertkern and the peer, old and new
    drift   from run to run: of all pairs of peers of a case, 95 % changed their ratio by less
    falls   new ratio < old ratio * (1 - max(noise, drift, threshold))

The samples of one run say little about the next one, where memory lies elsewhere; nobody changed
the ratio of two peers, so what it moved by is noise, too (it is not known with fewer than
LEAST_PAIRS of them).

A machine that is slower today is slower for both sides of a ratio, so two days compare. But a
ratio also falls when the peer's new version is faster. Therefore a case is a regression when its
ratio falls against every peer that both files measured; where it falls against some of them only,
these are named as "peer changed" and the exit code does not count them. (With a single peer the
two cannot be told apart: a regression.) Improvements are judged by the same rule. A case whose
output was correct and is now wrong or not measured is a regression, whatever the peers do.

Each of bertkern's own rows ("bertkern", "bertkern [triton]") is a case of its own. Cases that stand
in one file only are counted, not judged. Rows of the suite "limits" are the machine's, not ours.

Where 5 % of a hundred cases move by chance, a fall is believed when it comes again: `bertkern bench
--only CASE`, and compare once more.

Exit code: 0 without regressions, 1 with, 2 when the files cannot be read or have nothing in common.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .row import OWN, Row, quantile, read_rows

LEAST_PAIRS = 20
DRIFT_SHARE = 0.95
THRESHOLD = 0.05  # a ratio that falls by less is no finding, however quiet the machine was

What = tuple[str, ...]


def what_of(row: Row) -> What:
    """As row.what, whatever the order in which a file has the keys of the shape."""
    suite, op, _, *kind = row.what
    return (suite, op, *sorted(row.shape_text.split(" ")), *kind)


def is_wrong(row: Row) -> bool:
    """An output that failed the check (and not one that was never computed)."""
    return row.error.startswith("wrong") or not (row.correct or row.error)


def is_measured(row: Row) -> bool:
    """There is a time, and it is that of a correct output."""
    return bool(row.median_s) and row.correct and not is_wrong(row)


def case_text(row: Row) -> str:
    """attention B=8 S=128 float32 forward, cold."""
    return " ".join(filter(None, (row.op, row.shape_text, row.dtype, pass_of(row))))


def pass_of(row: Row) -> str:
    """forward, cold."""
    return row.direction if row.cache == "warm" else f"{row.direction}, {row.cache}"


def problem(row: Row) -> str:
    """Why a row has no figures."""
    if is_wrong(row):
        return f"WRONG: {row.error.removeprefix('wrong').lstrip(': ') or 'output'}"
    return row.error or "not measured"


@dataclass
class Group:
    """The rows of one measurement: the same thing, computed by several peers in turns."""

    rows: list[Row] = field(default_factory=list)

    @property
    def first(self) -> Row:
        """Any row: for what they have in common."""
        return self.rows[0]

    @property
    def own(self) -> Row | None:
        """What a user gets who chooses nothing: "bertkern", else the fastest of ours."""
        own = [row for row in self.rows if row.own]
        default = [row for row in own if row.peer == OWN]
        candidates = default or sorted(filter(is_measured, own), key=_median) or own
        return candidates[0] if candidates else None

    @property
    def best(self) -> Row | None:
        """The fastest correct row that is not ours."""
        return min(filter(is_measured, self.others), key=_median, default=None)

    @property
    def others(self) -> list[Row]:
        """Rows that are not ours."""
        return [row for row in self.rows if not row.own]

    @property
    def speedup(self) -> float | None:
        """Time of the best peer over ours; above 1, bertkern is faster."""
        own, best = self.own, self.best
        if own is None or best is None or not is_measured(own):
            return None
        return _median(best) / _median(own)

    def over_own(self, row: Row) -> str:
        """Time over ours: above 1, bertkern is faster; nothing where one of them is missing."""
        own = self.own
        if own is None or not is_measured(own) or not is_measured(row):
            return ""
        return f"{_median(row) / _median(own):.2f}"


def _median(row: Row) -> float:
    return row.median_s or math.inf


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """Peers together, in the order of measurement.

    What was measured twice, on two curves or by two runs into one file, makes two groups: a ratio
    is never taken between samples that were not interleaved.
    """
    groups: dict[tuple[What, str, int], Group] = {}
    seen: dict[tuple[What, str, str], int] = {}
    for row in rows:
        what = what_of(row)
        times = seen.get((what, row.curve, row.peer), 0)
        seen[what, row.curve, row.peer] = times + 1
        groups.setdefault((what, row.curve, times), Group()).rows.append(row)
    return list(groups.values())


def once(groups: Iterable[Group]) -> list[Group]:
    """The first group of each thing that was measured."""
    first: dict[What, Group] = {}
    for group in groups:
        first.setdefault(what_of(group.first), group)
    return list(first.values())


def half_width(row: Row) -> float:
    """Half the distance of the 20 % and 80 % quantiles, relative to the median."""
    if not row.median_s or row.p20_s is None or row.p80_s is None:
        return 0.0
    return (row.p80_s - row.p20_s) / (2 * row.median_s)


@dataclass
class Change:
    """One of our rows against one peer, then and now."""

    peer: str
    old: float
    new: float
    noise: float
    threshold: float

    @property
    def direction(self) -> int:
        """-1 falls, +1 rises, 0 neither: by more than the noise and the threshold."""
        allowed = max(self.noise, self.threshold)
        if self.new < self.old * (1 - allowed):
            return -1
        return 1 if self.new > self.old * (1 + allowed) else 0


@dataclass
class Verdict:
    """One of our rows against every peer that both files measured, or why it is lost."""

    case: str
    own: str
    changes: list[Change]
    lost: str = ""

    @property
    def kind(self) -> str:
        """regression, improvement, peer changed, same; alone without a peer in both files."""
        if self.lost:
            return "regression"
        directions = {change.direction for change in self.changes}
        if not directions:
            return "alone"
        if len(directions) > 1:
            return "peer changed"
        return {-1: "regression", 1: "improvement", 0: "same"}[directions.pop()]


def common_groups(old: Sequence[Row], new: Sequence[Row]) -> list[tuple[Group, dict[str, Row]]]:
    """The groups of the old file that the new one has, with its rows by peer."""
    after = _numbered(groups_of(new))
    return [
        (before, {row.peer: row for row in after[key].rows})
        for key, before in _numbered(groups_of(old)).items()
        if key in after and before.first.suite != "limits"
    ]


def peers_in_both(before: Group, new_rows: dict[str, Row]) -> list[tuple[Row, Row]]:
    """Each peer's row then and now, where both were measured."""
    return [
        (row, new_rows[row.peer])
        for row in before.others
        if row.peer in new_rows and is_measured(row) and is_measured(new_rows[row.peer])
    ]


def drift_of(old: Sequence[Row], new: Sequence[Row]) -> float:
    """By how much, relatively, ratios that nobody changed move from run to run; 0 if not known."""
    moved = []
    for before, new_rows in common_groups(old, new):
        changes = [
            math.log(_median(now) / _median(then)) for then, now in peers_in_both(before, new_rows)
        ]
        moved += [abs(one - other) for one, other in itertools.combinations(changes, 2)]
    return 1 - math.exp(-quantile(moved, DRIFT_SHARE)) if len(moved) >= LEAST_PAIRS else 0.0


def judge(old: Sequence[Row], new: Sequence[Row], threshold: float = THRESHOLD) -> list[Verdict]:
    """A verdict for each of our rows that the old file measured and whose group the new one has."""
    verdicts = []
    threshold = max(threshold, drift_of(old, new))
    for before, new_rows in common_groups(old, new):
        pairs = peers_in_both(before, new_rows)
        for own in (row for row in before.rows if row.own):
            if not is_measured(own):
                continue
            case = case_text(own)
            mine = new_rows.get(own.peer)
            if mine is None or not is_measured(mine):
                lost = "no row" if mine is None else mine.error or "wrong, or no time"
                verdicts.append(Verdict(case, own.peer, [], lost))
                continue
            changes = [
                Change(
                    peer=then.peer,
                    old=_median(then) / _median(own),
                    new=_median(today) / _median(mine),
                    noise=math.hypot(*map(half_width, (own, then, mine, today))),
                    threshold=threshold,
                )
                for then, today in pairs
            ]
            verdicts.append(Verdict(case, own.peer, changes))
    return verdicts


def _numbered(groups: Iterable[Group]) -> dict[tuple[What, int], Group]:
    numbered: dict[tuple[What, int], Group] = {}
    for group in groups:
        what, times = what_of(group.first), 0
        while (what, times) in numbered:
            times += 1
        numbered[what, times] = group
    return numbered


def duration(seconds: float | None) -> str:
    """Three digits: 1.23 ms, 45.6 us, 2.10 s; nothing for None."""
    if seconds is None:
        return ""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if abs(seconds) >= 0.9995 * scale or unit == "ns":
            value = seconds / scale
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:,.{digits}f} {unit}"
    raise AssertionError("the last unit takes all")


def amount(value: float | None) -> str:
    """Three digits, or all before the point: 0.0123, 4.56, 12,345; nothing for None and 0."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """87 %; nothing for None."""
    return "" if share is None else f"{share:.0%}".replace("%", " %")


def times(ratio: float | None) -> str:
    """1.23x; nothing for None."""
    return "" if ratio is None else f"{ratio:.2f}x"


def columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells, aligned: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def table(verdicts: Iterable[Verdict], moved_only: bool = False) -> str:
    """One line per case and peer; the case is not repeated."""
    lines: list[Sequence[str]] = [("case", "who", "against", "old", "new", "change", "noise")]
    for verdict in verdicts:
        head = (verdict.case, verdict.own)
        if verdict.lost:
            lines.append((*head, verdict.lost, *[""] * 4))
        for change in verdict.changes:
            if moved_only and not change.direction:
                continue
            ratios = (f"{change.old:.2f}x", f"{change.new:.2f}x")
            share = (f"{change.new / change.old - 1:+.1%}", f"{change.noise:.1%}")
            lines.append((*head, change.peer, *ratios, *share))
            head = ("", "")
    return columns(lines, left=3)


def _origin(rows: Sequence[Row]) -> str:
    """Device, commit, date of the rows."""
    values = []
    for key in ("device", "threads", "commit", "date"):
        found = dict.fromkeys(str(row.provenance[key]) for row in rows if key in row.provenance)
        values.append(f"{key} {' / '.join(found) or 'unknown'}")
    return " · ".join(values)


def devices(rows: Iterable[Row]) -> list[str]:
    """Devices of our own rows."""
    return sorted({str(row.provenance.get("device", "unknown")) for row in rows if row.own})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two result files. Exit code 1 with regressions, 2 when nothing can be compared."""
    parser = argparse.ArgumentParser(
        prog="compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help=f"least relative fall of a ratio that counts (default {THRESHOLD})",
    )
    options = parser.parse_args(arguments)
    try:
        old, new = read_rows([options.old]), read_rows([options.new])
    except (OSError, ValueError) as problem:
        print(f"cannot compare: {problem}", file=sys.stderr)
        return 2
    verdicts = judge(old, new, options.threshold)
    kinds: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        kinds.setdefault(verdict.kind, []).append(verdict)
    judged = [verdict for verdict in verdicts if verdict.kind != "alone"]
    if not judged:
        print(
            f"nothing to compare: {options.old} and {options.new} have no case in common that "
            "bertkern and the same peer were measured on",
            file=sys.stderr,
        )
        return 2

    for name, path, rows in (("old", options.old, old), ("new", options.new, new)):
        print(f"{name}: {path.name} · {_origin(rows)}")
    if devices(old) != devices(new):
        print(
            f"warning: different devices, {', '.join(devices(old))} and {', '.join(devices(new))}: "
            "the ratios tell of the machines, too"
        )
    for kind in ("regression", "improvement"):
        if kind in kinds:
            print(f"\n{kind}s (time of the peer / time of bertkern)\n{table(kinds[kind])}")
    if "peer changed" in kinds:
        print("\npeer changed: only against these, not against the case's other peers")
        print(table(kinds["peer changed"], moved_only=True))
    ratios = sum(len(verdict.changes) for verdict in judged)
    peers = {change.peer for verdict in judged for change in verdict.changes}
    regressions = kinds.get("regression", [])
    lost = sum(bool(verdict.lost) for verdict in regressions)
    print(
        f"\n{_count(len(judged), 'case')} compared, {_count(ratios, 'ratio')} to "
        f"{_count(len(peers), 'peer')}: {_count(len(regressions), 'regression')}"
        f"{f' ({lost} no longer measured correctly)' if lost else ''}, "
        f"{_count(len(kinds.get('improvement', [])), 'improvement')}, "
        f"{len(kinds.get('peer changed', []))} where a peer changed, "
        f"{len(kinds.get('same', []))} the same within noise, drift ({drift_of(old, new):.0%}) or "
        f"{options.threshold:.0%}; "
        f"{len(kinds.get('alone', []))} without a common peer, {_single(old, new)} in one file only"
    )
    return 1 if regressions else 0


def _single(old: Sequence[Row], new: Sequence[Row]) -> int:
    """How many of our measured cases have their group in one file only."""
    groups = [_numbered(groups_of(rows)) for rows in (old, new)]
    return sum(
        any(row.own and is_measured(row) for row in group.rows) and group.first.suite != "limits"
        for here, there in (groups, groups[::-1])
        for key, group in here.items()
        if key not in there
    )


if __name__ == "__main__":
    sys.exit(main())
