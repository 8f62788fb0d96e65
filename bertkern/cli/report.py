"""What the demo writes: curve.png, report.html (one file, the picture inside) and results.json."""

import base64
import dataclasses
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertkern.data.files import replacing, write_text

if TYPE_CHECKING:
    from .demo_embeddings import EmbeddingResult

_BLUE, _ORANGE, _GREY = "#1f6feb", "#d9730d", "#6b7280"


@dataclass
class PretrainingSummary:
    """What the demo's second half found. Losses are cross-entropies in nats a masked token."""

    documents: int
    parameters: int
    steps: int
    tokens: int
    seconds: float
    unigram_loss: float
    next_sentence_accuracy: float = 0.0
    resumed: bool = False
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    training: list[tuple[int, float]] = field(default_factory=list)
    fills: list[tuple[str, list[tuple[str, float]]]] = field(default_factory=list)


@dataclass
class Report:
    """Everything that one run of the demo shows."""

    machine: str
    info: str
    date: str
    embeddings: "EmbeddingResult | None" = None
    pretraining: PretrainingSummary | None = None
    absent: list[str] = field(default_factory=list)


def smoothed(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Mean of the last `window` values at every point."""
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1))
        for i, (step, _) in enumerate(points)
    ]


def draw(report: Report, path: Path) -> None:
    """Draw the loss curve and, when there is one, the comparison of speeds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [part for part in (report.pretraining, report.embeddings) if part is not None]
    widths = [1.6, 1.0] if len(panels) == 2 else [1.0]
    figure = Figure(figsize=(6.4 * sum(widths) / 1.6, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    remaining = list(axes)
    if report.pretraining is not None:
        _draw_losses(remaining.pop(0), report.pretraining)
    if report.embeddings is not None:
        _draw_speeds(remaining.pop(0), report.embeddings)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_losses(axis: Any, result: PretrainingSummary) -> None:
    steps, losses = zip(*result.training, strict=True)
    axis.plot(steps, losses, color=_BLUE, alpha=0.18, linewidth=0.8)
    steps, losses = zip(*smoothed(result.training, 20), strict=True)
    axis.plot(steps, losses, color=_BLUE, linewidth=1.6, label="training (mean of 20 steps)")
    steps, losses = zip(*result.held_out, strict=True)
    axis.plot(steps, losses, "o-", color=_ORANGE, markersize=4, label="held-out text")
    axis.axhline(result.unigram_loss, color=_GREY, linestyle="--", linewidth=1.2)
    axis.annotate(
        f"unigram baseline {result.unigram_loss:.2f}",
        (1.0, result.unigram_loss),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=_GREY,
        fontsize=9,
    )
    last_step, last_loss = result.held_out[-1]
    axis.annotate(
        f"{last_loss:.2f}",
        (last_step, last_loss),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color=_ORANGE,
        fontsize=9,
        fontweight="bold",
    )
    axis.set_title("Pre-training a small BERT: masked-word loss", fontsize=11, loc="left")
    axis.set_xlabel("training step")
    axis.set_ylabel("cross-entropy (nats per masked token)")
    axis.set_xlim(left=0)
    axis.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1.0, 0.93))
    axis.grid(axis="y", alpha=0.2)


def _draw_speeds(axis: Any, result: "EmbeddingResult") -> None:
    names = [contender.name.replace(" + ", "\n+ ") for contender in result.contenders]
    speeds = [contender.sentences_per_second for contender in result.contenders]
    colors = [_BLUE if "bertkern" in name else _GREY for name in names]
    bars = axis.barh(names, speeds, color=colors, height=0.55)
    axis.bar_label(bars, [f"{speed:.0f}" for speed in speeds], padding=4, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(right=1.15 * max(speeds))
    axis.set_xlabel(f"sentences per second ({result.device})")
    axis.set_title("Embedding with MiniLM", fontsize=11, loc="left")
    axis.tick_params(axis="y", length=0, labelsize=9)


_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .8rem 0 } td, th { padding: .25rem .9rem .25rem 0 }
th { text-align: left; border-bottom: 1px solid #8886 } td.n, th.n { text-align: right }
img { max-width: 100%; background: #fff; border-radius: 6px } .quiet { opacity: .7 }
pre { overflow-x: auto; background: #8881; padding: .8rem; border-radius: 6px; font-size: .85rem }
"""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numbers else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table><tr>{cells('th', headings)}</tr>\n{body}</table>\n"


def contender_rows(result: "EmbeddingResult") -> list[tuple[str, str, str, str]]:
    """(who, median time, sentences/s, largest difference) as text."""
    return [
        (
            contender.name,
            f"{contender.seconds:.2f} s",
            f"{contender.sentences_per_second:.0f}",
            "baseline" if i == 0 else f"{contender.max_difference:.1e}",
        )
        for i, contender in enumerate(result.contenders)
    ]


CONTENDER_HEADINGS = ("", "median time", "sentences/s", "largest difference")


def write(report: Report, folder: Path) -> list[Path]:
    """Write the report's files into a folder.

    Returns:
        The files; without matplotlib there is no picture.
    """
    written = []
    picture = folder / "curve.png"
    if report.embeddings is not None or report.pretraining is not None:
        try:
            draw(report, picture)
            written.append(picture)
        except ImportError:
            picture.unlink(missing_ok=True)  # one of an earlier run would not belong to this report
    image = ""
    if written:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        image = f'<p><img alt="loss curve and speeds" src="data:image/png;base64,{data}"></p>\n'
    page = folder / "report.html"
    write_text(page, _page(report, image))
    numbers = folder / "results.json"
    write_text(numbers, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return [*written, page, numbers]


def _page(report: Report, image: str) -> str:
    escape = html.escape
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>bertkern demo</title>'
        f"<style>{_STYLE}</style>\n<h1>bertkern demo</h1>\n"
        f'<p class="quiet">{escape(report.machine)} · {escape(report.date)}</p>\n{image}'
    ]
    if report.embeddings is not None:
        found = report.embeddings
        parts.append(
            f"<h2>Embedding {found.sentences} sentences on {escape(found.device)}</h2>\n"
            "<p>One model (MiniLM, 6 layers, fp32), the same texts, tokenizer and batches of "
            "sentences sorted by length; tokenisation included; medians of interleaved repeats. "
            "The difference is the largest of any vector component from the first row's.</p>\n"
        )
        parts.append(_table(CONTENDER_HEADINGS, contender_rows(found), (1, 2, 3)))
        parts.append("<h2>Semantic search</h2>\n")
        for query in found.searches:
            rows = [(f"{similarity:.2f}", text) for similarity, text in query.hits]
            parts.append(f"<p><b>{escape(query.query)}</b></p>\n")
            parts.append(_table(("cosine", "sentence"), rows, (0,)))
    if report.pretraining is not None:
        trained = report.pretraining
        last = trained.held_out[-1][1]
        parts.append(
            f"<h2>Pre-training from raw text</h2>\n<p>A BERT of {trained.parameters:,} parameters "
            f"learned from {trained.documents} documents of Python's own documentation: masked "
            f"words and next sentences, {trained.steps} steps, {trained.tokens:,} tokens, "
            f"{trained.seconds:.0f} s. On text it never saw, its loss on masked words ends "
            f"at <b>{last:.2f}</b> nats; guessing by word frequency gives "
            f"{trained.unigram_loss:.2f}. "
            f"Next sentences told from random ones: {trained.next_sentence_accuracy:.0%}.</p>\n"
        )
        for text, words in trained.fills:
            rows = [(word, f"{probability:.1%}") for word, probability in words]
            parts.append(
                f"<p><b>{escape(text)}</b></p>\n" + _table(("word", "probability"), rows, (1,))
            )
    for line in report.absent:
        parts.append(f'<p class="quiet">{escape(line)}</p>\n')
    parts.append(f"<h2>This machine</h2>\n<pre>{escape(report.info)}</pre>\n</html>\n")
    return "".join(parts)
