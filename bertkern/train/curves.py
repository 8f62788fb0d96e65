"""Learning curves as a picture: the loss of every step, and what was measured on held-out data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bertkern.data.files import replacing

from .history import History

CURVES = "curves.png"
_TRAINING, _HELD_OUT = "#7f9fbf", "#c0392b"
_WINDOW = 25  # steps on either side that a shown loss is the mean of, in long runs


def check_matplotlib() -> None:
    """Be sure before a long run that its curves can be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"learning curves need the package matplotlib ({error}): pip install 'bertkern[train]'"
        ) from error


def draw_curves(history: History, metric: str, higher_is_better: bool, path: Path) -> None:
    """Draw the losses, and the metric with its best evaluation and its baseline, as a PNG file.

    Args:
        history: of the run; its evaluations have `metric` and, if it is not the metric, "loss".
        metric, higher_is_better: as of the Task.
        path: where to; written whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, metrics = figure.subplots(1, 2, sharex=True)
    for axis in (losses, metrics):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    steps = np.array([record.step for record in history.steps])
    values = np.array([record.loss for record in history.steps])
    losses.plot(steps, values, color=_TRAINING, alpha=0.35, linewidth=0.8)
    losses.plot(steps, smooth(values), color=_TRAINING, label="training")
    if history.evaluations and "loss" in history.evaluations[0].figures:
        losses.plot(*history.curve("loss"), "o-", color=_HELD_OUT, markersize=4, label="held out")
    names = list(history.steps[0].losses) if history.steps else []
    losses.set_ylabel(f"loss ({' + '.join(names)})" if len(names) > 1 else "loss")
    losses.legend(frameon=False)

    metrics.plot(*history.curve(metric), "o-", color=_HELD_OUT, markersize=4)
    best = history.best(metric, higher_is_better)
    if best is not None:
        value = best.figures[metric]
        metrics.plot(best.step, value, "o", color=_HELD_OUT, markersize=9, fillstyle="none")
        metrics.set_title(f"best {value:.4g} after {best.step} steps", fontsize="medium")
    if metric in history.baselines:
        baseline = history.baselines[metric]
        metrics.axhline(baseline, color="gray", linestyle="--", linewidth=1)
        metrics.annotate(
            f"baseline {baseline:.4g}",
            (0.99, baseline),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="gray",
        )
    metrics.set_ylabel(f"held-out {metric.replace('_', ' ')}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def smooth(values: np.ndarray) -> np.ndarray:
    """Each value's mean with its neighbours, a 20th of the run on either side, _WINDOW at most."""
    half = min(_WINDOW, len(values) // 20)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
