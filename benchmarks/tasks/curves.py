"""Pictures of loss curves: two that should be one, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bertkern.data.files import replacing

from ..plots import BLUE, DPI, FONT, GREY, ORANGE

ROUNDING = 1e-7  # of fp32: differences below it are drawn there


def draw(
    path: Path,
    title: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    apart: Mapping[str, Sequence[float]],
) -> None:
    """Write a PNG: a column for each name, losses above, their relative difference below.

    Args:
        path: the file.
        title: of the whole.
        curves: for each name the losses of bertkern and of transformers, step by step.
        apart: for each name the relative difference of each step's losses.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(curves) + 0.4, 5.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(curves), squeeze=False, height_ratios=(3, 2), sharex="col")
    for (name, (ours, theirs)), above, below in zip(curves.items(), *axes, strict=True):
        steps = range(1, len(ours) + 1)
        above.plot(steps, theirs, color=ORANGE, linewidth=2.6, label="transformers")
        above.plot(steps, ours, color=BLUE, linewidth=1.0, label="bertkern")
        above.set_title(name, fontsize=FONT, loc="left")
        above.set_ylabel("training loss", fontsize=FONT - 1)
        above.legend(fontsize=FONT - 1, frameon=False)
        differences = [max(value, ROUNDING) for value in apart[name]]
        below.plot(steps, differences, color=GREY, linewidth=1.0)
        below.set(yscale="log", ylim=(ROUNDING, 10))
        below.set_ylabel("relative difference", fontsize=FONT - 1)
        below.set_xlabel("step", fontsize=FONT - 1)
        for axis in (above, below):
            axis.tick_params(labelsize=FONT - 1)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize=FONT + 1, x=0.01, ha="left")
    with replacing(path) as temporary:
        # without the name of matplotlib's version: the same input gives the same file
        figure.savefig(temporary, format="png", metadata={"Software": None})
