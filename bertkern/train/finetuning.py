"""Fine-tuning of a BERT for a task (Devlin et al. 2018, section 4).

`finetune` goes from data and a folder with a BERT to a folder with the fine-tuned model, which
`from_pretrained` here and in transformers reads. The data decide the task:

    tokenizer = load_tokenizer("bert-base-uncased")
    train, dev = (
        ClassificationData(read_classification(f"RTE/{name}.tsv"), tokenizer)
        for name in ("train", "dev")
    )
    result = finetune(train, dev, "bert-base-uncased", "rte", settings=FinetuningSettings(epochs=4))
    result.figures["accuracy"], result.intervals["accuracy"]

The weights that it ends with are those of the best evaluation. Ctrl-C and SIGTERM end a run after
the step at hand with a checkpoint; with resume=True it goes on and ends with the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bertkern.data.files import write_text
from bertkern.data.tokenizer import save_tokenizer
from bertkern.models.checkpoint import PretrainedModel

from .checkpoint import save_model
from .curves import CURVES, check_matplotlib, draw_curves
from .finetuning_tasks import TASKS, Data, FinetuningSettings, FinetuningTask
from .history import History, StepRecord
from .loop import CHECKPOINT, HISTORY, own_random_state, train
from .pretraining import (
    existing_checkpoint,
    refuse_to_overwrite,
    refuse_to_replace_the_start,
    runs_files,
)
from .processes import Processes
from .resuming import finished_step, refuse_another_run, seen_by_all

METRICS = "metrics.json"
HELD_OUT, TEST = "held_out", "test"  # folders of predictions
_MEANINGS = {
    "train": "other training examples (--train, or a limit on their tokens)",
    "held_out": "other held-out examples (--dev, or a limit on their tokens)",
    "answers": "other --n-best, --max-answer-tokens or --null-threshold",
    "steps": "another number of steps (--epochs, --batch-size)",
}


@dataclass
class FinetuningResult:
    """What `finetune` made; the same is in the folder `out`.

    Attributes:
        model: with the weights of the best evaluation, in evaluation mode.
        task: what it was trained on.
        history: losses and evaluations.
        figures: held-out, of the best weights.
        intervals: 95 % intervals of those figures that have one.
        test_figures: of the test data, where they are labelled.
        files: those written, the model's and the tokenizer's apart.
        out: the folder.
        finished_before: the run that was to be resumed had ended; nothing was computed or written.
    """

    model: PretrainedModel
    task: FinetuningTask[Any]
    history: History
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    test_figures: dict[str, float] | None
    files: list[Path]
    out: Path
    finished_before: bool = False


def finetune(
    train_data: Data,
    held_out: Data,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: FinetuningSettings | None = None,
    test: Data | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    console: Console | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> FinetuningResult:
    """Fine-tune; write model, tokenizer, history, figures, curves and predictions to a folder.

    Started by `torchrun` or `accelerate launch`, all processes call it and train one model.

    Args:
        train_data, held_out: ClassificationData, MultipleChoiceData, TokenClassificationData or
            QuestionAnsweringData; labelled, both of one kind, with the tokenizer of `model`.
        model: folder or hub name of a BERT; a head that it lacks is drawn from the seed.
        out: the folder, made if need be. It gets, besides model and tokenizer: history.json,
            metrics.json, curves.png, the checkpoint, and predictions in held_out/ and test/.
        settings: how to fine-tune.
        test: predicted at the end with the best weights, and scored where labelled.
        device: where to compute.
        resume: go on from out's checkpoint, with the same data and settings; a run that has ended
            is read and left as it is.
        overwrite: start anew although out holds a checkpoint or a model, which are removed.
        tensorboard: write curves to out's `tensorboard`, too.
        progress: show a progress bar, on `console`.
        on_step: called with every record of the history.

    Raises:
        ValueError: data that are not labelled, of different kinds or with different labels,
            sequences that are longer than the model's positions, a tokenizer that is larger than
            its vocabulary, or a resumed run with other data or settings.
        FileExistsError: out holds a checkpoint or a model; neither resume nor overwrite is given.
        FileNotFoundError: no such model, or resume, but no checkpoint; or a folder that not all
            processes see.
        ModuleNotFoundError: scikit-learn or matplotlib is not installed.
        TrainingInterrupted: Ctrl-C or SIGTERM; the checkpoint is written.
    """
    out = Path(out)
    settings = settings or FinetuningSettings()
    processes = Processes(device)
    check_matplotlib()
    refuse_to_replace_the_start(out, model)
    if resume:
        existing_checkpoint(out, processes)
    elif not overwrite:
        refuse_to_overwrite(out)
    _check_data(train_data, held_out, test)
    kind = TASKS[type(train_data)]
    with own_random_state(processes.device):
        torch.manual_seed(settings.seed)
        network = kind.model_class.from_pretrained(
            model, torch.float32, new_head=True, **kind.config_changes(train_data)
        )
    _check_model(network, [train_data, held_out, *([test] if test is not None else [])])
    network.to(processes.device)
    task = kind(network.config, train_data, held_out, settings)
    loop_settings = settings.loop(len(train_data))
    if resume:
        asked = asdict(loop_settings)
        for name in ("evaluate_every", "checkpoint_every"):
            if getattr(settings, name) is None:
                del asked[name]  # an epoch, which follows from the others
        now = {"settings": asked, "data": task.describe()}
        refuse_another_run(out / CHECKPOINT, now, _MEANINGS)
        if finished_step(out / CHECKPOINT, out / METRICS) is not None:
            return _finished(task, out, processes)
    processes.wait()  # before the first one removes what the others looked for
    if processes.is_main:
        if not resume:
            for path in runs_files(out):
                path.unlink()
        for name in (METRICS, CURVES):  # an earlier run's would not belong to this one
            (out / name).unlink(missing_ok=True)
        save_tokenizer(train_data.tokenizer, out)
    processes.wait()
    seen_by_all(out / "tokenizer.json", processes)  # all will read the best weights there
    history = train(
        network,
        task,
        loop_settings,
        processes,
        folder=out,
        resume=resume,
        keep_best=True,
        tensorboard=tensorboard,
        progress=progress,
        console=console,
        on_step=on_step,
    )
    save_model(network, out, processes)
    result = _assessed(network, task, history, test, processes, out)
    if processes.is_main:
        write_text(out / HISTORY, history.to_json())
        draw_curves(history, task.metric, task.higher_is_better, out / CURVES)
        content = json.dumps(_metrics(result, loop_settings.steps, test), indent=1) + "\n"
        write_text(out / METRICS, content)
        result.files += [out / name for name in (HISTORY, CURVES, METRICS)]
    return result


def _finished(task: FinetuningTask[Any], out: Path, processes: Processes) -> FinetuningResult:
    """The result of a run that has ended, from its files."""
    metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    folders = [folder for folder in (out / HELD_OUT, out / TEST) if folder.is_dir()]
    return FinetuningResult(
        model=task.model_class.from_pretrained(out).to(processes.device),
        task=task,
        history=History.from_dict(json.loads((out / HISTORY).read_text(encoding="utf-8"))),
        figures=metrics["held_out"],
        intervals={name: tuple(bounds) for name, bounds in metrics["intervals"].items()},
        test_figures=metrics.get("test"),
        files=[
            *(path for folder in folders for path in sorted(folder.iterdir())),
            *(out / name for name in (HISTORY, CURVES, METRICS)),
        ],
        out=out,
        finished_before=True,
    )


def _assessed(
    model: PretrainedModel,
    task: FinetuningTask[Any],
    history: History,
    test: Any,
    processes: Processes,
    out: Path,
) -> FinetuningResult:
    """Figures and predictions of the best weights."""
    outputs, loss = task.outputs(model, task.held_out, processes)
    assert loss is not None
    figures = {"loss": loss, **task.figures(task.held_out, outputs)}
    files = task.write(out / HELD_OUT, task.held_out, outputs) if processes.is_main else []
    test_figures = None
    if test is not None:
        outputs, loss = task.outputs(model, test, processes)
        if loss is not None:
            test_figures = {"loss": loss, **task.figures(test, outputs)}
        if processes.is_main:
            files += task.write(out / TEST, test, outputs)
    intervals = task.intervals(task.held_out, figures)
    return FinetuningResult(model, task, history, figures, intervals, test_figures, files, out)


def _metrics(result: FinetuningResult, steps: int, test: Any) -> dict[str, Any]:
    """The content of metrics.json."""
    task, history = result.task, result.history
    best = history.best(task.metric, task.higher_is_better)
    assert best is not None
    examples = {"train": len(task.train), "held_out": len(task.held_out)}
    if test is not None:
        examples["test"] = len(test)
    content: dict[str, Any] = {
        "task": task.name,
        "metric": task.metric,
        "held_out": result.figures,
        "intervals": result.intervals,
        "baselines": history.baselines,
        "best_step": best.step,
        "steps": history.evaluations[-1].step,
        "planned_steps": steps,
        "examples": examples,
        "settings": asdict(task.settings),
    }
    if result.test_figures is not None:
        content["test"] = result.test_figures
        content["test_intervals"] = task.intervals(test, result.test_figures)
    return content


def _check_data(train_data: Any, held_out: Any, test: Any) -> None:
    """Raise where the data are of different kinds, or not labelled."""
    kinds = {type(data) for data in (train_data, held_out, test) if data is not None}
    if len(kinds) > 1 or not kinds <= set(TASKS):
        raise ValueError(
            f"train_data, held_out and test must be of one kind, one of "
            f"{', '.join(kind.__name__ for kind in TASKS)}, not "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))}"
        )
    for name, data in (("train_data", train_data), ("held_out", held_out)):
        if not len(data) or not (data.features.example_labels or data.features.token_labels):
            raise ValueError(f"{name} must be labelled examples, one or more")
    for attribute in ("label_names", "tag_names"):
        trained = getattr(getattr(train_data, "examples", None), attribute, None)
        for name, data in (("held_out", held_out), ("test", test)):
            other = getattr(getattr(data, "examples", None), attribute, trained)
            labelled = data is not None and (
                data.features.example_labels or data.features.token_labels
            )
            if labelled and other != trained:
                raise ValueError(f"{name} has the labels {other}, train_data {trained}")


def _check_model(model: PretrainedModel, data: list[Any]) -> None:
    """Raise where the data do not fit into the model."""
    config = model.config
    longest = max(
        int((part.features.starts[1:] - part.features.starts[:-1]).max()) for part in data
    )
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds max_position_embeddings = "
            f"{config.max_position_embeddings} of the model; make the data with a lower max_length"
        )
    largest = max(int(part.features.input_ids.max()) for part in data)
    if largest >= config.vocab_size:
        raise ValueError(
            f"the data have token id {largest}, the model's vocabulary {config.vocab_size} tokens: "
            "they were made with another tokenizer"
        )
