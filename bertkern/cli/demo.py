"""bertkern demo: what the package does, on this machine, in minutes."""

import platform
import textwrap
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bertkern

from . import report
from .console import CommandError, err, out, packaged_minilm, pick_device, writable_folder
from .fill_mask import print_guesses
from .info import print_info

if TYPE_CHECKING:
    import torch

    from .demo_embeddings import EmbeddingResult

_SHOWN_WIDTH = 90  # columns of a found sentence in the terminal; the report has it whole


def demo(
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the report and the trained model.")
    ] = Path("demo-output"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Show on this machine what bertkern does, in about 3 minutes: embed, search, pre-train.

    Embeds real sentences with a pretrained MiniLM on bertkern's kernels and through transformers,
    and compares results and speed. Then pre-trains a small BERT from the documentation that every
    Python carries. Writes curve.png, report.html and results.json. Ctrl-C while it trains leaves a
    checkpoint, from which the next run goes on.
    """
    chosen = pick_device(device)
    writable_folder(folder)
    _heading("This machine")
    info = str(bertkern.info())
    print_info(info)

    from bertkern.data import standard_library_text

    documents = standard_library_text()
    found = report.Report(
        machine=_machine(chosen),
        info=info,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )

    _heading("Embeddings: one pretrained model, three ways")
    try:
        found.embeddings = _embeddings(documents, chosen)
        found.absent += found.embeddings.absent
    except CommandError as error:
        _absent(found, f"left out: {error}")

    _heading("Pre-training: a small BERT from raw text")
    found.pretraining = _pretraining(documents, folder / "model", chosen)

    written = report.write(found, folder)
    if not any(path.suffix == ".png" for path in written):
        _absent(found, "left out: the picture needs matplotlib: pip install 'bertkern[demo]'")
    _heading("Written")
    for path in written:
        out.print(f"  {path}", markup=False, soft_wrap=True)
    out.print(
        f"  {folder / 'model'}  (try: bertkern fill-mask 'a [MASK] of strings' "
        f"--model {folder / 'model'})",
        markup=False,
        soft_wrap=True,
    )


def _heading(text: str) -> None:
    out.print()
    out.rule(f"[bold]{text}", align="left", style="dim")


def _absent(found: report.Report, line: str) -> None:
    found.absent.append(line)
    err.print(line, style="yellow", markup=False)


def _machine(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} processor, {torch.get_num_threads()} threads"


def _embeddings(documents: list[list[str]], device: "torch.device") -> "EmbeddingResult":
    folder = packaged_minilm()
    from . import demo_embeddings as parts

    texts = parts.pick_sentences(documents, parts.SENTENCES)
    own, max_length = parts.bertkern_encoder(folder, device)
    encoders, absent = {}, []
    try:
        from bertkern.integrations.transformers_encoder import transformers_encoder

        for attention in ("sdpa", "bertkern"):
            encoders[f"transformers, attention {attention}"] = transformers_encoder(
                folder, device, attention, max_length, parts.BATCH_SIZE
            )
    except ImportError as error:
        absent.append(f"no comparison ({error}): pip install 'bertkern[demo]'")
        err.print(absent[0], style="yellow", markup=False)
    encoders["bertkern"] = own

    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=len(encoders) * (1 + parts.REPEATS))
        contenders, vectors = parts.compare(
            encoders, texts, parts.REPEATS, lambda: progress.advance(task)
        )
    result = parts.EmbeddingResult(
        sentences=len(texts),
        device=device.type,
        contenders=contenders,
        searches=parts.search(parts.QUERIES, texts, vectors, own),
        absent=absent,
    )
    out.print(
        f"{len(texts)} sentences, MiniLM (6 layers, fp32), tokenisation included; batches of "
        f"{parts.BATCH_SIZE}, sorted by length; medians of {parts.REPEATS} interleaved repeats"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column(report.CONTENDER_HEADINGS[0])
    for heading in report.CONTENDER_HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for row in report.contender_rows(result):
        table.add_row(*row)
    out.print(table)
    out.print("\nSemantic search over these sentences (cosine similarity)")
    for query in result.searches:
        out.print(f"  {query.query}", style="bold", markup=False)
        for similarity, text in query.hits:
            shown = textwrap.shorten(text, _SHOWN_WIDTH, placeholder=" …")
            out.print(f"    {similarity:.2f}  {shown}", markup=False)
    return result


def _pretraining(
    documents: list[list[str]], folder: Path, device: "torch.device"
) -> report.PretrainingSummary:
    from . import demo_pretraining

    out.print(
        f"{len(documents)} documents of Python's own documentation. Ctrl-C leaves a checkpoint; "
        "run it again to go on."
    )
    result = demo_pretraining.run(documents, folder, device)
    out.print(
        f"{result.parameters:,} parameters, {result.tokens:,} tokens. Held-out masked-word loss "
        f"{result.held_out[0][1]:.2f} -> [bold]{result.held_out[-1][1]:.2f}[/bold] nats; guessing "
        f"by word frequency (unigram) gives {result.unigram_loss:.2f}"
    )
    for text, words in result.fills:
        print_guesses(text, [words])
    return result
