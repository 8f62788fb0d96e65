"""bertkern train-translation: a Transformer from pairs of texts in two languages."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import CommandError, err, out, pick_device, writable_folder
from .pretrain import Precision, Sharding, print_finished

if TYPE_CHECKING:
    from bertkern.data.parallel_text import Pair
    from bertkern.train import TranslationResult

_TEXT, _MODEL, _TRAINING, _RUNNING = "Text and folders", "Model", "Training", "Running"
_PAPERS_WARMUP = 4000  # steps
_SAMPLES = 5  # translations that are shown at the end


class Size(str, Enum):
    """The paper's two models."""

    base = "base"
    big = "big"


def _option(
    default_panel: str, help: str, *names: str, **options: object
) -> typer.models.OptionInfo:
    return typer.Option(*names, help=help, rich_help_panel=default_panel, **options)  # type: ignore[arg-type]


def train_translation(
    folder: Annotated[
        Path,
        _option(_TEXT, "For the model, tokenizer, checkpoints and curves.", "--out", "-o"),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Pairs: .tsv or .csv with two columns, .jsonl, .parquet, gettext catalogues (.po, "
            ".mo), folders of them, or hub:NAME[:CONFIG][:SPLIT] of the Hugging Face hub."
        ),
    ] = None,
    source: Annotated[
        Path | None, _option(_TEXT, "Source texts, one a line; with --target in place of pairs.")
    ] = None,
    target: Annotated[Path | None, _option(_TEXT, "Their translations, one a line.")] = None,
    source_column: Annotated[
        str, _option(_TEXT, "Of tables and hub names; the language in wmt's sets.")
    ] = "source",
    target_column: Annotated[str, _option(_TEXT, "The same of the translations.")] = "target",
    strip_accelerators: Annotated[
        bool,
        _option(
            _TEXT,
            "Catalogues' menus without the marks of keys (_Open, &Open).",
            "--strip-accelerators",
        ),
    ] = False,
    held_out_file: Annotated[
        list[str] | None,
        _option(_TEXT, "Pairs not trained on; without it a part of the others."),
    ] = None,
    held_out: Annotated[
        float, _option(_TEXT, "That part of the source texts; they occur in no training pair.")
    ] = 0.05,
    tokenizer: Annotated[
        Path | None,
        _option(_TEXT, "Folder or tokenizer.json, in place of a learned BPE of both languages."),
    ] = None,
    start_vectors: Annotated[
        Path | None, _option(_TEXT, "Word vectors that the embedding starts from (bertkern words).")
    ] = None,
    size: Annotated[Size | None, _option(_MODEL, "The paper's own sizes.")] = None,
    config: Annotated[Path | None, _option(_MODEL, "A config.json with the sizes.")] = None,
    hidden_size: Annotated[int, _option(_MODEL, "Columns of hidden states.", min=1)] = 256,
    layers: Annotated[int, _option(_MODEL, "Of encoder and of decoder.", min=1)] = 3,
    heads: Annotated[int, _option(_MODEL, "Attention heads; divide it.", min=1)] = 4,
    ffn_size: Annotated[int | None, _option(_MODEL, "Columns inside the FFN (4 x hidden).")] = None,
    dropout: Annotated[float, _option(_MODEL, "Of sublayers and embeddings.")] = 0.1,
    label_smoothing: Annotated[float, _option(_MODEL, "Share spread over all tokens.")] = 0.1,
    prenorm: Annotated[
        bool, _option(_MODEL, "LayerNorms before the sublayers, not after.", "--prenorm")
    ] = False,
    vocab_size: Annotated[int, _option(_MODEL, "Of the learned BPE.", min=261)] = 8192,
    max_length: Annotated[
        int, _option(_TRAINING, "Longer pairs are left out (tokens of a side).", min=2)
    ] = 256,
    steps: Annotated[int, _option(_TRAINING, "Updates of the weights.", min=1)] = 5000,
    batch_tokens: Annotated[
        int, _option(_TRAINING, "Most tokens of a step, both sides, all processes.", min=4)
    ] = 4096,
    accumulate: Annotated[int, _option(_TRAINING, "Pieces that a step is computed in.", min=1)] = 1,
    learning_rate: Annotated[
        float | None,
        _option(
            _TRAINING, "Its peak; without it the paper's: 1/sqrt(hidden x warmup), 4000 or more."
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        _option(_TRAINING, "Steps in which the rate rises (4000, or a tenth of fewer).", min=1),
    ] = None,
    average: Annotated[int, _option(_TRAINING, "Checkpoints whose mean the model is.", min=1)] = 5,
    precision: Annotated[Precision, _option(_TRAINING, "Of matrix products.")] = Precision.fp32,
    gradient_checkpointing: Annotated[
        bool, _option(_TRAINING, "Less memory, more time.", "--gradient-checkpointing")
    ] = False,
    sharding: Annotated[
        Sharding, _option(_TRAINING, "Under torchrun: whole or shared weights.")
    ] = Sharding.ddp,
    seed: Annotated[int, _option(_TRAINING, "Of weights, data, dropout.")] = 0,
    evaluate_every: Annotated[
        int, _option(_RUNNING, "Steps between looks at held-out pairs.", min=1)
    ] = 500,
    evaluation_pairs: Annotated[
        int, _option(_RUNNING, "Most held-out pairs to translate each time.", min=1)
    ] = 200,
    checkpoint_every: Annotated[int, _option(_RUNNING, "Steps between checkpoints.", min=1)] = 250,
    tensorboard: Annotated[bool, _option(_RUNNING, "Write curves.", "--tensorboard")] = False,
    resume: Annotated[
        bool, _option(_RUNNING, "Go on from --out's checkpoint.", "--resume")
    ] = False,
    overwrite: Annotated[bool, _option(_RUNNING, "Start anew in --out.", "--overwrite")] = False,
    device: Annotated[str, _option(_RUNNING, "auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a Transformer to translate, from pairs of texts.

    Ctrl-C writes a checkpoint; the same command with --resume goes on from there and ends with the
    same weights as a run that was never interrupted. On several GPUs or machines:
    torchrun --nproc-per-node 8 -m bertkern.cli.main train-translation ...

    Example: bertkern train-translation messages.de.po --out en-de --steps 2000
    """
    from bertkern.data import load_tokenizer
    from bertkern.models import TransformerConfig, WordVectors
    from bertkern.train import Processes, TranslationSettings, noam_peak
    from bertkern.train import train_translation as train
    from bertkern.train.pretraining import existing_checkpoint, refuse_to_overwrite

    if resume and overwrite:
        raise CommandError("--resume and --overwrite exclude one another")
    if size is not None and config is not None:
        raise CommandError("--size and --config exclude one another")
    if size is not None:
        sizes: TransformerConfig = getattr(TransformerConfig, size.value)()
    elif config is not None:
        sizes = TransformerConfig.from_json_file(config)
    else:
        sizes = TransformerConfig(
            hidden_size=hidden_size,
            num_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn_size or 4 * hidden_size,
            dropout=dropout,
            label_smoothing=label_smoothing,
            prenorm=prenorm,
        )
    warmup_steps = warmup or min(_PAPERS_WARMUP, max(1, steps // 10))
    # the equation gives short warm-ups a peak at which post-LN models no longer learn
    peak = noam_peak(sizes.hidden_size, max(warmup_steps, _PAPERS_WARMUP))
    settings = TranslationSettings(
        steps=steps,
        learning_rate=peak if learning_rate is None else learning_rate,
        warmup_steps=warmup_steps,
        accumulate=accumulate,
        precision=precision.value,
        sharding=sharding.value,
        gradient_checkpointing=gradient_checkpointing,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        average=average,
        seed=seed,
        tokens_per_batch=batch_tokens,
        max_length=max_length,
        evaluation_pairs=evaluation_pairs,
    )
    processes = Processes(pick_device(device))
    if resume:
        existing_checkpoint(folder, processes)
    elif not overwrite:
        refuse_to_overwrite(folder)
    read = _Reader(source_column, target_column, strip_accelerators)
    pairs = read(sources, source, target)
    if held_out_file:
        test = read(held_out_file)
        trained_on = {pair.source for pair in pairs}
        if seen := sum(pair.source in trained_on for pair in test):
            read.notes.append(f"{seen:,} held-out source texts are among the training pairs, too")
    else:
        pairs, test = _split(pairs, held_out, seed)
    if processes.is_main:
        writable_folder(folder)
        out.print(f"{len(pairs):,} pairs to train on, {len(test):,} held out")
        for note in read.notes:
            out.print(note, style="yellow", markup=False, soft_wrap=True)
    result = train(
        pairs,
        test,
        folder,
        config=sizes,
        vocab_size=vocab_size,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        start_vectors=None if start_vectors is None else WordVectors.load(start_vectors),
        settings=settings,
        device=processes.device,
        resume=resume,
        overwrite=overwrite,
        tensorboard=tensorboard,
        console=out,
    )
    if processes.is_main and result.finished_before:
        print_finished(result.history, folder)
    elif processes.is_main:
        _print_summary(result, test)


class _Reader:
    """Reads pairs as the options say; `notes` are what it left out."""

    def __init__(self, source_column: str, target_column: str, strip_accelerators: bool) -> None:
        self._columns = (source_column, target_column)
        self._strips = strip_accelerators
        self.notes: list[str] = []

    def __call__(
        self,
        sources: list[str] | None,
        source: Path | None = None,
        target: Path | None = None,
    ) -> "list[Pair]":
        from bertkern.data.parallel_text import read_line_files, read_parallel

        if (source is None) != (target is None):
            raise CommandError("--source and --target belong together: two files, line by line")
        if bool(sources) == (source is not None):
            raise CommandError("give either files of pairs or --source and --target")
        if source is not None and target is not None:
            return read_line_files(source, target, notes=self.notes)
        return read_parallel(
            sources or [], *self._columns, accelerators=not self._strips, notes=self.notes
        )


def _split(pairs: "list[Pair]", held_out: float, seed: int) -> "tuple[list[Pair], list[Pair]]":
    """A part of the source texts, with all their translations, is held out."""
    from bertkern.data import hold_out

    train, test = hold_out([pair.source for pair in pairs], held_out, seed)
    return [pairs[i] for i in train], [pairs[i] for i in test]


def _print_summary(result: "TranslationResult", test: "list[Pair]") -> None:
    from bertkern.models import Translate
    from bertkern.train.curves import CURVES

    if any(result.left_out):
        of_training, of_held_out = result.left_out
        err.print(
            f"{of_training:,} training pairs and {of_held_out:,} held out were longer than "
            "--max-length and left out",
            style="yellow",
        )
    last, baselines = result.history.evaluations[-1].figures, result.history.baselines
    out.print(
        f"held-out BLEU {last['bleu']:.1f} (copying the source {baselines['bleu']:.1f}), chrF "
        f"{last['chrf']:.1f} ({baselines['chrf']:.1f}), loss {last['loss']:.3f} nats a token (by "
        f"frequency {baselines['loss']:.3f}); translated greedily"
    )
    count = min(_SAMPLES, len(test))
    samples = [test[len(test) * i // count] for i in range(count)]
    translate = Translate.from_pretrained(result.out)  # whole, also where FSDP2 holds parts
    translations = translate([pair.source for pair in samples])
    for pair, translation in zip(samples, translations, strict=True):
        out.print(f"  {pair.source}", markup=False, style="bold")
        out.print(f"    is translated to  {translation.text}", markup=False)
        out.print(f"    the reference is  {pair.target}", markup=False)
    folder = result.out
    out.print(f"model, tokenizer and history in {folder}", markup=False, soft_wrap=True)
    out.print(f"curves in {folder / CURVES}", markup=False, soft_wrap=True)
