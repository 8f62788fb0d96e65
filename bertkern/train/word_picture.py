"""A picture of words: each at its place on the plane in which they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bertkern.data.files import replacing
from bertkern.models.word_vectors import WordVectors

_DOT, _LABEL = "#c0392b", "#2c3e50"
_POINTS = 7.0  # height of a label
_INCHES = (9.6, 7.2)


def draw_words(vectors: WordVectors, words: Sequence[str], path: str | Path) -> None:
    """Draw words by their first two principal components, as a PNG file.

    A dot for each word; the labels of the first words are placed first, and one that would cover an
    earlier label is left out.

    Args:
        vectors: of the words, and of others.
        words: which, the most important ones first.
        path: where to; written whole or not at all.

    Raises:
        ValueError: fewer than two words, or one that has no vector.
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a picture of words needs the package matplotlib ({error}): "
            "pip install 'bertkern[train]'"
        ) from error
    places = vectors.plane(words)
    figure = Figure(figsize=_INCHES, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("first principal component")
    axis.set_ylabel("second principal component")
    axis.plot(*places.T, ".", color=_DOT, markersize=3)
    axis.autoscale_view()
    # points of the page for one unit of the axes; the axes take most of the page
    spans = np.ptp(places, axis=0).clip(min=1e-12)
    points = places * (0.85 * 72 * np.array(_INCHES) / spans)
    for row in uncovered(points, [len(word) for word in words]):
        axis.annotate(
            words[row],
            places[row],
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=_POINTS,
            color=_LABEL,
            parse_math=False,  # a word may hold a $
        )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def uncovered(points: NDArray[np.float64], letters: Sequence[int]) -> list[int]:
    """Which labels cover none of those before them.

    Args:
        points: [N, 2], the lower left corner of each label, in points.
        letters: [N], the length of each.
    """
    widths = 0.62 * _POINTS * np.array(letters, dtype=np.float64)
    kept: list[int] = []
    for row, (x, y) in enumerate(points):
        others = points[kept]
        covers = (np.abs(others[:, 1] - y) < 1.15 * _POINTS) & (
            (others[:, 0] < x + widths[row]) & (x < others[:, 0] + widths[kept])
        )
        if not covers.any():
            kept.append(row)
    return kept
