"""The report's pictures: speed-ups, throughput and scaling curves, as PNG by matplotlib.

A peer has one colour and one marker in all pictures of a report; bertkern alone is strong blue. A
picture holds no more than MOST_BARS bars or PANELS curves; the rest goes to the next. Wrong outputs
are named in red and have neither bar nor line.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertkern.data.files import replacing

from .compare import Group, is_measured, is_wrong, once
from .row import Row, geometric_mean

TABLES_ONLY = ("limits", "overhead")  # suites without pictures
MOST_BARS = 25
PANELS = 6
FONT = 9
DPI = 110
BLUE, GREEN, ORANGE, RED, GREY = "#1f6feb", "#2da44e", "#d9730d", "#cf222e", "#6b7280"
OWN_COLOURS = (BLUE, "#79b8ff", "#0a3069", "#54aeff")
# Dark and light in turns, without the blues that are bertkern's and the red that says wrong.
COLOURS = (
    *("#d9730d", "#1a7f5a", "#8250df", "#9a6700", "#bf3989", "#57606a", "#f2b01e", "#6cc644"),
    *("#c297ff", "#7a3e12", "#ff8fc7", "#17a2a2", "#b5a642", "#4b0082", "#9fd3a8", "#000000"),
)
MARKERS = "osD^vP*X<>ph"
TICKS = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16),
    *(24, 32, 64, 128, 256),
)
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "forward": "fwd"}
SHORT |= {"forward+backward": "fwd+bwd"}


@dataclass
class Style:
    """How a peer is drawn."""

    colour: str
    marker: str
    line: str = "-"


@dataclass
class Picture:
    """A file that was drawn, and what it shows."""

    kind: str  # speed-up, throughput, curves
    title: str
    path: Path


def styles_of(rows: Iterable[Row]) -> dict[str, Style]:
    """A colour and a marker for each peer: the same names get the same."""
    drawn = (row for row in rows if row.suite not in TABLES_ONLY)
    rows = [row for row in drawn if is_measured(row) or is_wrong(row)]
    own = sorted({row.peer for row in rows if row.own})
    others = sorted({row.peer for row in rows if not row.own})
    styles = {}
    for names, colours in ((own, OWN_COLOURS), (others, COLOURS)):
        for i, name in enumerate(names):
            turn, place = divmod(i, len(colours))  # colours repeat with other markers and lines
            marker = MARKERS[(i + turn) % len(MARKERS)]
            styles[name] = Style(colours[place], marker, "-." if turn % 2 else "-")
    return styles


def draw(
    groups: Sequence[Group], styles: dict[str, Style], folder: Path, prefix: str
) -> list[Picture]:
    """Draw everything that one run's groups have to show; files `prefix`-*.png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures: list[Picture] = []
    shown = [group for group in groups if group.first.suite not in TABLES_ONLY]
    for suite in dict.fromkeys(group.first.suite for group in shown):
        of_suite = [group for group in shown if group.first.suite == suite]
        canvas = _Canvas(folder, f"{prefix}-{suite}", pictures)
        _draw_speedups(suite, once(of_suite), canvas)
        if suite in ("models", "training"):
            plain = [group for group in once(of_suite) if not group.first.curve]
            _draw_throughput(suite, plain, styles, canvas)
        _draw_curves(suite, curves_of(of_suite), styles, canvas)
    return pictures


@dataclass
class _Canvas:
    """Where pictures go, and the figures they are drawn on."""

    folder: Path
    prefix: str
    pictures: list[Picture]

    def figure(self, width: float, height: float) -> Any:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        return figure

    def save(self, figure: Any, kind: str, title: str) -> None:
        stem = f"{self.prefix}-{kind}-"
        number = 1 + sum(picture.path.name.startswith(stem) for picture in self.pictures)
        path = self.folder / f"{stem}{number}.png"
        with replacing(path) as temporary:
            # without the name of matplotlib's version: the same input gives the same file
            figure.savefig(temporary, format="png", metadata={"Software": None})
        self.pictures.append(Picture(kind, title, path))


def parts(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """As few parts as possible, none above `most`, all about as large."""
    count = -(-len(items) // most)
    bounds = [-(-len(items) * i // count) for i in range(count + 1)] if count else [0]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def short(text: str) -> str:
    """float32 is fp32, forward+backward is fwd+bwd."""
    return SHORT.get(text, text)


def _kind(row: Row) -> tuple[str, str, str]:
    return (row.dtype, row.direction, row.cache)


def _common(rows: Sequence[Row]) -> list[bool]:
    """Which of dtype, direction and cache is the same in all rows."""
    return [len(set(values)) == 1 for values in zip(*map(_kind, rows), strict=True)]


def _kind_text(row: Row, wanted: Sequence[bool]) -> str:
    return " · ".join(short(v) for v, want in zip(_kind(row), wanted, strict=True) if want)


def _draw_speedups(suite: str, groups: Sequence[Group], canvas: _Canvas) -> None:
    """Horizontal bars, one per group: our speed-up over the best peer."""
    groups = [
        group
        for group in groups
        if group.speedup or (group.best and group.own is not None and is_wrong(group.own))
    ]
    if not groups:
        return
    for of_kind in _by_kind(groups, (2, 0, 1)):
        ratios = [group.speedup for group in of_kind if group.speedup]
        count = f"{len(ratios)} case" if len(ratios) == 1 else f"{len(ratios)} cases"
        mean = f"geometric mean {geometric_mean(ratios):.2f}x of {count}" if ratios else "all wrong"
        pages = parts(of_kind, MOST_BARS)
        same = _common([group.first for group in of_kind])
        for number, page in enumerate(pages, 1):
            part = f"part {number} of {len(pages)}" if len(pages) > 1 else ""
            about = " · ".join(filter(None, (_kind_text(of_kind[0].first, same), part)))
            title = f"{suite}: speed-up over the best other, {mean}\n{about}"
            _draw_speedup_page(page, same, title, canvas)


def _by_kind(groups: Sequence[Group], keys: Sequence[int]) -> list[Sequence[Group]]:
    """What is too much for one picture is parted by the first of these places of _kind, then on."""
    if len(groups) <= MOST_BARS or not keys:
        return [groups]
    split: dict[str, list[Group]] = {}
    for group in groups:
        split.setdefault(_kind(group.first)[keys[0]], []).append(group)
    return [one for part in split.values() for one in _by_kind(part, keys[1:])]


def _draw_speedup_page(
    page: Sequence[Group], same: Sequence[bool], title: str, canvas: _Canvas
) -> None:
    figure = canvas.figure(10.5, 1.3 + 0.27 * len(page))
    axis = figure.subplots()
    ratios = [group.speedup or 1.0 for group in page]
    colours = [GREEN if ratio >= 1 else ORANGE for ratio in ratios]
    axis.barh(range(len(page)), [r - 1 for r in ratios], left=1, color=colours, height=0.68)
    axis.set_yticks(range(len(page)), [_bar_label(group.first, same) for group in page])
    low, high = min(0.8, *ratios) / 1.06, max(1.25, *ratios) * 1.06
    axis.set(xscale="log", xlim=(low, high), ylim=(len(page) - 0.4, -0.6))
    _ticks(axis.xaxis, [t for t in TICKS if low <= t <= high], low, high, "{:g}x".format)
    axis.axvline(1, color="black", linewidth=1)
    for i, group in enumerate(page):
        best = group.best.peer if group.best else ""
        found = f"{group.speedup:.2f}x" if group.speedup else "WRONG"
        # beside the axes, so that no bar is in the way
        shared = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": FONT - 1}
        colour = (GREEN if ratios[i] >= 1 else ORANGE) if group.speedup else RED
        axis.text(1.09, i, found, color=colour, ha="right", fontweight="bold", **shared)
        axis.text(1.10, i, best, color=GREY, ha="left", **shared)
    axis.set_xlabel("time of the best other / time of bertkern (right of the line: faster)")
    _tidy(axis)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    figure.suptitle(title, fontsize=FONT + 1, x=0.01, ha="left")
    canvas.save(figure, "speed-up", title)


def _bar_label(row: Row, same: Sequence[bool]) -> str:
    kind = _kind_text(row, [not one for one in same])
    return "  ".join(filter(None, (f"{row.op} {row.shape_text}".strip(), kind)))


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=FONT - 1)
    axis.xaxis.label.set_size(FONT - 1)
    axis.yaxis.label.set_size(FONT - 1)
    axis.set_axisbelow(True)


def _ticks(
    of: Any, values: Sequence[float], low: float, high: float, text: Any, least: float = 0.07
) -> None:
    """Ticks at these values, those left out that would touch their neighbour."""
    from matplotlib.ticker import NullLocator

    scale = of.get_transform().transform
    start, end = scale([low, high])
    kept: list[float] = []
    for value in sorted(values, key=lambda value: (value != 1, value)):  # 1 always stays
        at = [(scale([v])[0] - start) / (end - start) for v in (value, *kept)]
        if all(abs(at[0] - other) >= least for other in at[1:]):
            kept.append(value)
    of.set_ticks(sorted(kept), [text(value) for value in sorted(kept)])
    of.set_minor_locator(NullLocator())


def rounded(value: float) -> str:
    """Three digits: 0.12, 4.56, 123, 12.3k, 4.56M."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if value >= 0.9995 * scale or scale == 1.0:
            value /= scale
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f}{letter}"
    raise AssertionError("the last scale takes all")


def _round_place(value: float) -> str:
    """A tick: 2k, not 2.00k."""
    text = rounded(value)
    digits = text.rstrip("kMG")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + text[len(digits) :]


def _draw_throughput(
    suite: str, groups: Sequence[Group], styles: dict[str, Style], canvas: _Canvas
) -> None:
    """A panel per group, in it a bar per peer, the fastest first."""
    panels = []
    for group in groups:
        good = [row for row in group.rows if is_measured(row) and row.rate]
        good.sort(key=lambda row: -(row.rate or 0.0))
        if good:
            panels.append([*good, *filter(is_wrong, group.rows)])
    pages: list[list[list[Row]]] = []
    for panel in panels:
        if not pages or sum(map(len, pages[-1])) + len(panel) > MOST_BARS:
            pages.append([])
        pages[-1].append(panel)
    for number, page in enumerate(pages, 1):
        count = -(-len(page) // 2) if len(page) > 1 else 1
        across = min(2, len(page))
        heights = [max(map(len, page[2 * i : 2 * i + 2])) + 2.6 for i in range(count)]
        figure = canvas.figure(5.4 * across + 0.6, 0.5 + 0.27 * sum(heights))
        axes = figure.subplots(count, across, squeeze=False, height_ratios=heights).flat
        for axis, panel in itertools.zip_longest(axes, page):
            if panel is None:
                axis.set_axis_off()
            else:
                _draw_bars(axis, panel, styles)
        title = f"{suite}: throughput"
        if len(pages) > 1:
            title += f", part {number} of {len(pages)}"
        figure.suptitle(title, fontsize=FONT + 1, x=0.01, ha="left")
        canvas.save(figure, "throughput", title)


def _draw_bars(axis: Any, panel: Sequence[Row], styles: dict[str, Style]) -> None:
    rates = [row.rate or 0.0 if is_measured(row) else 0.0 for row in panel]
    places = range(len(panel))
    axis.barh(places, rates, color=[styles[row.peer].colour for row in panel], height=0.68)
    right = rates[0]
    for i, (row, rate) in enumerate(zip(panel, rates, strict=True)):
        end = rate
        if rate and row.p20_s and row.p80_s:
            ends = [row.items / row.p80_s, row.items / row.p20_s]
            axis.plot(ends, [i, i], color="#222222", linewidth=1)
            end = max(rate, *ends)
            right = max(right, end)
        axis.annotate(
            *(rounded(rate) if rate else "WRONG", (end, i)),
            **{"xytext": (4, 0), "textcoords": "offset points", "va": "center"},
            **{"fontsize": FONT - 1, "color": "black" if rate else RED},
            fontweight="bold" if row.own or not rate else "normal",
        )
    axis.set_yticks(places, [row.peer for row in panel])
    axis.set(xlim=(0, 1.16 * right), ylim=(len(panel) - 0.4, -0.6))
    axis.xaxis.set_major_formatter(lambda value, _: _round_place(value))
    axis.locator_params(axis="x", nbins=5)
    row = panel[0]
    axis.set_xlabel(f"{row.unit or 'items'} per second (line: 20 % to 80 %)")
    axis.set_title(_panel_title(row, row.shape), fontsize=FONT, loc="left")
    _tidy(axis)
    axis.tick_params(axis="y", length=0)


def _panel_title(row: Row, shape: dict[str, int | str]) -> str:
    """Two lines: the op and its shape; dtype, direction and cache."""
    text = " ".join([row.op, *(f"{key}={value}" for key, value in shape.items())])
    return f"{text}\n{_kind_text(row, (True,) * 3)}"


@dataclass
class Curve:
    """One panel: a line per peer over one key of the shape."""

    first: Row
    fixed: dict[str, int | str]
    lines: dict[str, list[tuple[float, Row]]] = field(default_factory=dict)
    per_item: bool = False  # the rows differ in their number of tokens by more than x

    def points(self) -> list[float]:
        """Every x that was measured, rising."""
        return sorted({x for line in self.lines.values() for x, _ in line})

    def seconds(self, row: Row, value: float) -> float:
        """What is drawn for a time."""
        return value / row.items if self.per_item else value


FOLLOWERS = ("B", "T")  # may change together with a curve's key: B falls as S rises


def curves_of(groups: Sequence[Group]) -> list[Curve]:
    """The scaling curves: two points or more; at each point the first of a peer's rows.

    Rows belong to one curve when all other keys of their shape agree. Batch and tokens need not,
    where they follow the curve's key (as many tokens at every length); where they do not follow it,
    because some x was measured with several, there is one curve for each.
    """
    loose: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        row = group.first
        if row.curve in row.shape and isinstance(row.shape[row.curve], (int, float)):
            keys = [(k, v) for k, v in row.shape.items() if k not in (row.curve, *FOLLOWERS)]
            loose.setdefault((row.op, *_kind(row), row.curve, *keys), []).append(group)
    curves = []
    for together in loose.values():
        key = together[0].first.curve
        unique = once(together)
        places = [group.first.shape[key] for group in unique]
        if len(set(places)) == len(places):
            split = [unique]
        else:
            by_rest: dict[tuple[Any, ...], list[Group]] = {}
            for group in unique:
                rest = tuple((k, v) for k, v in group.first.shape.items() if k != key)
                by_rest.setdefault(rest, []).append(group)
            split = list(by_rest.values())
        curves += [_curve(part, key) for part in split if len(part) > 1]
    return [curve for curve in curves if len(curve.points()) > 1]


def _curve(groups: Sequence[Group], key: str) -> Curve:
    first = groups[0].first
    fixed = {
        k: v
        for k, v in first.shape.items()
        if k != key and all(group.first.shape.get(k) == v for group in groups)
    }
    curve = Curve(first, fixed)
    ordered = sorted(groups, key=lambda group: group.first.shape[key])
    for group in ordered:
        for row in filter(is_measured, group.rows):
            line = curve.lines.setdefault(row.peer, [])
            line.append((float(group.first.shape[key]), row))
    follows = any(k in FOLLOWERS and k != key and k not in fixed for k in first.shape)
    items = {group.first.items for group in groups}
    curve.per_item = follows and len(items) > 1 and 0.0 not in items
    return curve


def _draw_curves(
    suite: str, curves: Sequence[Curve], styles: dict[str, Style], canvas: _Canvas
) -> None:
    """Small panels in a grid, with one legend below them."""
    pages = parts(curves, PANELS)
    for number, page in enumerate(pages, 1):
        across = min(2, len(page))
        down = -(-len(page) // across)
        names = sorted({name for curve in page for name in curve.lines}, key=list(styles).index)
        figure = canvas.figure(5.2 * across, 3.1 * down + 0.6 + 0.2 * (len(names) // 4 + 1))
        axes = figure.subplots(down, across, squeeze=False).flat
        handles: dict[str, Any] = {}
        for axis, curve in itertools.zip_longest(axes, page):
            if curve is None:
                axis.set_axis_off()
            else:
                handles |= _draw_curve(axis, curve, styles)
        ordered = [name for name in (*names, "floor") if name in handles]
        figure.legend(
            *([handles[name] for name in ordered], ordered),
            **{"loc": "outside lower center", "ncols": 4 if across > 1 else 2},
            **{"frameon": False, "fontsize": FONT - 1},
        )
        title = f"{suite}: scaling"
        if len(pages) > 1:
            title += f", part {number} of {len(pages)}"
        figure.suptitle(title, fontsize=FONT + 1, x=0.01, ha="left")
        canvas.save(figure, "curves", title)


def _draw_curve(axis: Any, curve: Curve, styles: dict[str, Style]) -> dict[str, Any]:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    handles = {}
    floor: dict[float, float] = {}
    for name in sorted(curve.lines, key=lambda name: curve.lines[name][0][1].own):  # ours on top
        style, line = styles[name], curve.lines[name]
        xs = [x for x, _ in line]
        own = line[0][1].own
        (handles[name],) = axis.plot(
            *(xs, [curve.seconds(row, row.median_s or 0.0) for _, row in line]),
            **{"color": style.colour, "marker": style.marker, "markersize": 5 if own else 4},
            **{"linewidth": 2.2 if own else 1.2, "linestyle": style.line},
        )
        spread = [
            [curve.seconds(row, getattr(row, edge) or row.median_s or 0.0) for _, row in line]
            for edge in ("p20_s", "p80_s")
        ]
        axis.fill_between(xs, *spread, color=style.colour, alpha=0.12, linewidth=0)
        floor |= {x: curve.seconds(row, row.floor_s) for x, row in line if row.floor_s}
    if floor:
        xs = sorted(floor)
        drawn = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
        (handles["floor"],) = axis.plot(xs, [floor[x] for x in xs], **drawn)
    points = curve.points()
    low, high = points[0], points[-1]
    wide = high > 8 * low > 0
    axis.set_ylabel(f"time per {_singular(curve.first.unit)}" if curve.per_item else "time")
    if wide:
        axis.set(xscale="log", yscale="log")
        bottom, top = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if top > 300 * bottom else (1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(unit="s"))
    _ticks(axis.xaxis, points, low, high, _place)
    axis.set_xlabel(curve.first.curve)
    axis.set_title(_panel_title(curve.first, curve.fixed), fontsize=FONT, loc="left")
    _tidy(axis)
    axis.grid(alpha=0.2)
    return handles


def _singular(unit: str) -> str:
    return unit.removesuffix("s") or "item"


def _place(value: float) -> str:
    """4096 is 4k, as sequence lengths are written."""
    whole = int(value)
    if value == whole and whole >= 4096 and whole % 1024 == 0:
        return f"{whole // 1024}k"
    return f"{value:g}"
