"""bertkern words train: word vectors from text."""

import shutil
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import CommandError, err, out, pick_device, writable_folder

if TYPE_CHECKING:
    from bertkern.data.skip_gram import WordText
    from bertkern.data.text import Document

_TEXT, _MODEL, _TRAINING, _RUNNING = "Text and files", "Vectors", "Training", "Running"


class OptimizerName(str, Enum):
    """How vectors are updated."""

    sgd = "sgd"
    adagrad = "adagrad"


def train(
    path: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="File for the vectors: .txt or .vec for word2vec's text format, .bin for its "
            "binary one.",
            rich_help_panel=_TEXT,
        ),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text: .txt, .jsonl, .parquet, folders, patterns, or "
            "hub:NAME\\[:CONFIG]\\[:SPLIT]; without any, the English of Python's own documentation."
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Of .jsonl, .parquet and hub sources.", rich_help_panel=_TEXT)
    ] = "text",
    one_sentence_per_line: Annotated[
        bool,
        typer.Option(
            "--one-sentence-per-line",
            help="Lines of the text are its sentences; else full stops end them.",
            rich_help_panel=_TEXT,
        ),
    ] = False,
    min_count: Annotated[
        int,
        typer.Option(min=1, help="Words that are rarer are left out.", rich_help_panel=_TEXT),
    ] = 5,
    size: Annotated[
        int, typer.Option(min=1, help="Numbers of a vector.", rich_help_panel=_MODEL)
    ] = 100,
    window: Annotated[
        int,
        typer.Option(
            min=1, help="Words on each side that a word is to predict.", rich_help_panel=_MODEL
        ),
    ] = 2,
    negative: Annotated[
        int,
        typer.Option(
            min=1, help="Random words that each pair is held against.", rich_help_panel=_MODEL
        ),
    ] = 5,
    sample: Annotated[
        float,
        typer.Option(
            help="Words of a larger share of the text are thinned out; 0: none.",
            rich_help_panel=_MODEL,
        ),
    ] = 1e-3,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes through the text; without it 5, and up to 50 below 400,000 words.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="sgd is word2vec's.", rich_help_panel=_TRAINING)
    ] = OptimizerName.adagrad,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="At first; it falls linearly.", rich_help_panel=_TRAINING),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of all that is drawn.", rich_help_panel=_TRAINING)
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where an interrupted run stopped.", rich_help_panel=_RUNNING
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace --out, or an interrupted run.", rich_help_panel=_RUNNING
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_RUNNING)
    ] = "auto",
) -> None:
    """Learn word vectors from text: skip-gram with negative sampling.

    Ctrl-C keeps the run in a folder beside --out, named as it is with .run; the same command with
    --resume goes on from there and ends with the same vectors as a run never interrupted.

    Example: bertkern words train books/*.txt --out vectors.bin
    """
    from bertkern.data.skip_gram import WordText
    from bertkern.models.word_vector_files import format_of
    from bertkern.train.word_vectors import (
        WordVectorSettings,
        epochs_for,
        train_word_vectors,
    )

    if resume and overwrite:
        raise CommandError("--resume and --overwrite exclude one another")
    format_of(path, None)
    run = path.with_name(f"{path.name}.run")
    text_folder, checkpoint = run / "text", run / "checkpoint.safetensors"
    if resume:
        if not checkpoint.is_file():
            raise CommandError(f"{checkpoint}: no checkpoint to resume from")
        text = WordText.open(text_folder)
        out.print(f"resuming with the text in {text_folder}, as the run began", markup=False)
    else:
        _refuse_to_overwrite(path, run, overwrite)
    where = pick_device(device)

    def settings(words: int) -> WordVectorSettings:
        return WordVectorSettings(
            size=size,
            window=window,
            negative=negative,
            sample=sample,
            epochs=epochs or epochs_for(words),
            optimizer=optimizer.value,
            learning_rate=learning_rate,
            seed=seed,
        )

    settings(words=1)  # refused before the text is read
    if not resume:
        documents = _documents(sources, text_column, one_sentence_per_line)
        text = _read(documents, text_folder, min_count)
    chosen = settings(len(text))
    try:
        result = train_word_vectors(
            text, chosen, checkpoint=checkpoint, resume=resume, device=where, console=out
        )
    except ValueError:
        if not resume:  # the run was refused: nothing is left to go on from
            shutil.rmtree(run)
        raise
    result.vectors.save(path)
    shutil.rmtree(run)
    out.print(
        f"loss {result.losses[0]:.3f} in the first epoch, {result.losses[-1]:.3f} in the last of "
        f"{chosen.epochs}; {result.words_per_second:,.0f} words a second"
    )
    out.print(f"{len(result.vectors):,} word vectors in {path}", markup=False, soft_wrap=True)


def _refuse_to_overwrite(path: Path, run: Path, overwrite: bool) -> None:
    """Fail where files are in the way, or remove those of an interrupted run."""
    from bertkern.data.skip_gram import META

    if overwrite:
        if run.exists() and not (run / "text" / META).is_file():
            raise CommandError(f"{run} is not of a run of this command: move it, or choose --out")
        shutil.rmtree(run, ignore_errors=True)
        return
    if run.exists():
        raise CommandError(
            f"{run} exists, of an interrupted run: go on from it (--resume), or allow --overwrite"
        )
    if path.exists():
        raise CommandError(f"{path} exists: choose another file (--out), or allow --overwrite")


def _documents(
    sources: list[str] | None, text_column: str, one_sentence_per_line: bool
) -> "Callable[[], Iterable[Document]]":
    """What gives the documents of the sources, each time that it is called."""
    from bertkern.data import standard_library_text, stream_documents

    if not sources:
        documents = standard_library_text()
        return lambda: documents
    return lambda: stream_documents(
        sources, text_column, one_sentence_per_line=one_sentence_per_line
    )


def _read(
    documents: "Callable[[], Iterable[Document]]", folder: Path, min_count: int
) -> "WordText":
    """Number the words of the documents in a folder, and say what was found and left out."""
    from bertkern.data.skip_gram import WordText

    writable_folder(folder.parent)
    try:
        with out.status("reading the text"):
            text = WordText.build(documents, folder, min_count)
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)  # nothing of use is in it yet
        raise
    out.print(
        f"{len(text):,} words of the text, {len(text.words):,} of them different; "
        f"{text.total - len(text):,} left out, that occur fewer than {min_count} times"
    )
    if text.pruned:
        err.print(
            f"memory was full of different words: {text.pruned:,} that had occurred "
            f"{text.pruned_up_to} time(s) or fewer were forgotten while counting",
            style="yellow",
        )
    return text
