"""bertkern pretrain: a BERT from text, with masked words and next sentences."""

from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import CommandError, err, out, pick_device, writable_folder

if TYPE_CHECKING:
    from bertkern.data.text import Document
    from bertkern.train import History

_CORPUS = "corpus"  # the folder of tokenised text in --out


class Size(str, Enum):
    """The two sizes of the paper."""

    base = "base"
    large = "large"


class OptimizerName(str, Enum):
    """How weights are updated."""

    adamw = "adamw"
    lamb = "lamb"


class Precision(str, Enum):
    """What matrix products are computed in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Sharding(str, Enum):
    """What each of several processes holds."""

    ddp = "ddp"
    fsdp = "fsdp"


_TEXT, _MODEL, _DATA = "Text and folders", "Model", "Examples"
_TRAINING, _RUNNING = "Training", "Running"


def pretrain(
    folder: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="For the model, tokenizer, checkpoint and curves.",
            rich_help_panel=_TEXT,
        ),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text: .txt (empty lines separate documents, four at least), .jsonl, .parquet, "
            "folders of them, or hub:NAME[:CONFIG][:SPLIT] of the Hugging Face hub."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Text that `bertkern data prepare` tokenised, in place of sources; needs "
            "--tokenizer.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json, vocab.txt or a folder with one. Without it a WordPiece "
            "vocabulary is learned from the sources.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    text_column: Annotated[
        str,
        typer.Option(help="Of .jsonl, .parquet and hub sources.", rich_help_panel=_TEXT),
    ] = "text",
    one_sentence_per_line: Annotated[
        bool,
        typer.Option(
            "--one-sentence-per-line",
            help="Lines of the text are its sentences; else full stops end them.",
            rich_help_panel=_TEXT,
        ),
    ] = False,
    held_out: Annotated[
        float, typer.Option(help="Share of documents not trained on.", rich_help_panel=_TEXT)
    ] = 0.05,
    size: Annotated[
        Size | None, typer.Option(help="BERT's own sizes.", rich_help_panel=_MODEL)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config.json with the sizes.", rich_help_panel=_MODEL),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a BERT to go on from, with its tokenizer.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    hidden_size: Annotated[
        int, typer.Option(min=1, help="Columns of hidden states.", rich_help_panel=_MODEL)
    ] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Encoder layers.", rich_help_panel=_MODEL)] = 4,
    heads: Annotated[
        int, typer.Option(min=1, help="Attention heads; divide it.", rich_help_panel=_MODEL)
    ] = 4,
    ffn_size: Annotated[
        int | None,
        typer.Option(help="Columns inside the FFN (4 x hidden).", rich_help_panel=_MODEL),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(min=6, help="Of the learned vocabulary.", rich_help_panel=_MODEL)
    ] = 8192,
    max_length: Annotated[
        int, typer.Option(min=8, help="Tokens of a sequence.", rich_help_panel=_DATA)
    ] = 128,
    long_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a sequence in the run's last part (BERT: 512).", rich_help_panel=_DATA
        ),
    ] = None,
    long_fraction: Annotated[
        float, typer.Option(help="That part of the steps.", rich_help_panel=_DATA)
    ] = 0.1,
    whole_word: Annotated[
        bool, typer.Option("--whole-word", help="Mask all of a word.", rich_help_panel=_DATA)
    ] = False,
    static_masks: Annotated[
        bool,
        typer.Option("--static-masks", help="Same masks every epoch.", rich_help_panel=_DATA),
    ] = False,
    duplication: Annotated[
        int,
        typer.Option(min=1, help="Uses of a document in an epoch.", rich_help_panel=_DATA),
    ] = 1,
    steps: Annotated[
        int, typer.Option(min=1, help="Updates of the weights.", rich_help_panel=_TRAINING)
    ] = 1000,
    batch_tokens: Annotated[
        int,
        typer.Option(help="Most tokens of a step, all processes.", rich_help_panel=_TRAINING),
    ] = 4096,
    accumulate: Annotated[
        int,
        typer.Option(min=1, help="Pieces that a step is computed in.", rich_help_panel=_TRAINING),
    ] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="Peak; warm-up, then decay.", rich_help_panel=_TRAINING)
    ] = 1e-3,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps.", rich_help_panel=_TRAINING)
    ] = 0.1,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="LAMB is for huge batches.", rich_help_panel=_TRAINING)
    ] = OptimizerName.adamw,
    precision: Annotated[
        Precision, typer.Option(help="Of matrix products.", rich_help_panel=_TRAINING)
    ] = Precision.fp32,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_TRAINING
        ),
    ] = False,
    sharding: Annotated[
        Sharding,
        typer.Option(help="Under torchrun: whole or shared weights.", rich_help_panel=_TRAINING),
    ] = Sharding.ddp,
    seed: Annotated[
        int, typer.Option(help="Of weights, data, dropout.", rich_help_panel=_TRAINING)
    ] = 0,
    evaluate_every: Annotated[
        int,
        typer.Option(min=1, help="Steps between looks at held-out text.", rich_help_panel=_RUNNING),
    ] = 100,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_RUNNING)
    ] = 200,
    workers: Annotated[
        int,
        typer.Option(min=0, help="Processes that make examples.", rich_help_panel=_RUNNING),
    ] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write curves.", rich_help_panel=_RUNNING)
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from --out's checkpoint.", rich_help_panel=_RUNNING),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start anew in --out.", rich_help_panel=_RUNNING),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_RUNNING)
    ] = "auto",
) -> None:
    """Pre-train a BERT from text: masked words and next sentences.

    Ctrl-C writes a checkpoint; the same command with --resume goes on from there and ends with the
    same weights as a run that was never interrupted. On several GPUs or machines:
    torchrun --nproc-per-node 8 -m bertkern.cli.main pretrain ...

    Example: bertkern pretrain notes.txt book.txt --out my-bert --steps 2000
    """
    from bertkern.data import MaskingSettings, load_tokenizer
    from bertkern.data.corpus import META, Corpus
    from bertkern.data.sources import stream_documents
    from bertkern.models import BertConfig
    from bertkern.models.checkpoint import resolve_folder
    from bertkern.train import PretrainingSettings, Processes
    from bertkern.train import pretrain as train
    from bertkern.train.pretraining import existing_checkpoint, refuse_to_overwrite
    from bertkern.train.resuming import seen_by_all

    if resume and overwrite:
        raise CommandError("--resume and --overwrite exclude one another")
    if bool(sources) == (corpus is not None):
        raise CommandError("give either text files (or hub names) or --corpus")
    if corpus is not None and one_sentence_per_line:
        raise CommandError(
            "--one-sentence-per-line is for text: the sentences of --corpus are those that "
            "`bertkern data prepare` made"
        )
    if sum(given is not None for given in (size, config, start)) > 1:
        raise CommandError("--size, --config and --start exclude one another")
    if size is not None:
        sizes = getattr(BertConfig, size.value)(vocab_size=vocab_size)
    elif config is not None:
        sizes = BertConfig.from_json_file(config)
    else:
        sizes = BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn_size or 4 * hidden_size,
            max_position_embeddings=max(512, max_length, long_length or 0),
        )
    settings = PretrainingSettings(
        steps=steps,
        learning_rate=learning_rate,
        warmup_fraction=warmup,
        optimizer=optimizer.value,
        accumulate=accumulate,
        precision=precision.value,
        sharding=sharding.value,
        gradient_checkpointing=gradient_checkpointing,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        seed=seed,
        tokens_per_batch=batch_tokens,
        masking=MaskingSettings(
            max_length=max_length,
            whole_word=whole_word,
            static_masks=static_masks,
            duplication=duplication,
        ),
        long_length=long_length,
        long_fraction=long_fraction,
    )
    processes = Processes(pick_device(device))
    if resume:
        existing_checkpoint(folder, processes)
    elif not overwrite:
        refuse_to_overwrite(folder)
    if corpus is None:
        corpus = folder / _CORPUS
        tokenizer = tokenizer or (resolve_folder(start) if start is not None else None)
        if processes.is_main and not resume:
            texts = partial(
                stream_documents,
                sources or [],
                text_column,
                one_sentence_per_line=one_sentence_per_line,
            )
            _tokenise(texts, tokenizer, sizes.vocab_size, folder)
        elif processes.is_main:
            out.print(f"resuming with the text in {corpus}, as the run began", markup=False)
        processes.wait()
        seen_by_all(corpus / META, processes)
        tokenizer = folder
    elif tokenizer is None:
        raise CommandError(f"--corpus {corpus} needs the --tokenizer that it was made with")
    result = train(
        Corpus.open(corpus),
        folder,
        config=sizes,
        start=start,
        tokenizer=load_tokenizer(tokenizer),
        settings=settings,
        held_out=held_out,
        device=processes.device,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        tensorboard=tensorboard,
        console=out,
    )
    if processes.is_main and result.finished_before:
        print_finished(result.history, folder)
    elif processes.is_main:
        _print_summary(result.history, folder)
        _draw(result.history, folder)


def _tokenise(
    texts: "Callable[[], Iterator[Document]]",
    tokenizer: Path | None,
    vocab_size: int,
    folder: Path,
) -> None:
    """Put the texts' tokens into the folder's corpus, and the tokenizer beside it.

    A folder that is new is not left behind when the texts are refused.
    """
    from bertkern.data import load_tokenizer, save_tokenizer, train_tokenizer
    from bertkern.data.corpus import Corpus

    def sentences() -> Iterator[str]:
        for document in texts():
            yield from document

    is_new = not folder.exists()
    writable_folder(folder)
    try:
        if tokenizer is not None:
            words = load_tokenizer(tokenizer)
        else:
            if next(sentences(), None) is None:
                raise CommandError("there is no text in the sources")
            with out.status("learning a vocabulary"):
                words = train_tokenizer(sentences, vocab_size)
        with out.status("tokenising"):
            corpus = Corpus.build(texts(), words, folder / _CORPUS, overwrite=True)
        save_tokenizer(words, folder)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    out.print(
        f"{corpus.documents:,} documents, {corpus.sentences:,} sentences, {corpus.tokens:,} "
        f"tokens of a vocabulary of {corpus.vocab_size:,}"
    )
    if corpus.left_out:
        out.print(
            f"{corpus.left_out:,} documents with fewer than two sentences were left out: a "
            "sentence ends at . ! ? before a capital or a digit, or with its line under "
            "--one-sentence-per-line",
            style="yellow",
        )


def print_finished(history: "History", folder: Path) -> None:
    """Say that a run that was to be resumed had come to its end."""
    steps = history.evaluations[-1].step
    out.print(
        f"{folder}: already finished after {steps} step{'' if steps == 1 else 's'}; nothing was "
        "changed",
        markup=False,
        soft_wrap=True,
    )


def _print_summary(history: "History", folder: Path) -> None:
    last, baselines = history.evaluations[-1].figures, history.baselines
    out.print(
        f"held-out masked-word loss {last['mlm_loss']:.3f} nats (unigram baseline "
        f"{baselines['mlm_loss']:.3f}), accuracy {last['mlm_accuracy']:.1%} "
        f"({baselines['mlm_accuracy']:.1%}), next-sentence accuracy {last['nsp_accuracy']:.1%} "
        f"({baselines['nsp_accuracy']:.1%})"
    )
    out.print(f"model, tokenizer and history in {folder}", markup=False, soft_wrap=True)


def _draw(history: "History", folder: Path) -> None:
    """The curves as a picture, where there is matplotlib."""
    from bertkern.train.curves import CURVES, check_matplotlib, draw_curves
    from bertkern.train.pretraining import PretrainingTask

    try:
        check_matplotlib()
    except ModuleNotFoundError as error:
        err.print(f"no {CURVES}: {error}", style="yellow", markup=False, soft_wrap=True)
        return
    task = PretrainingTask
    draw_curves(history, task.metric, task.higher_is_better, folder / CURVES)
    out.print(f"curves in {folder / CURVES}", markup=False, soft_wrap=True)
