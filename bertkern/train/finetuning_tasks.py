"""What the training loop needs of each task that BERT is fine-tuned for.

    classification         a class or a score of a text or a pair
    multiple choice        which of C endings goes on
    token classification   a tag for each word
    question answering     a span of a text

A task knows its model, its losses, its held-out figures and the official form of its predictions.

Legend: E examples, C classes or choices, N tokens of all examples.
"""

from __future__ import annotations

import csv
import hashlib
import io
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertkern.data.answer_spans import Answers, best_answers
from bertkern.data.classification import ClassificationData
from bertkern.data.features import Features
from bertkern.data.files import write_text
from bertkern.data.multiple_choice import MultipleChoiceData
from bertkern.data.packing import Batch, PackedBatch
from bertkern.data.question_answering import QuestionAnsweringData
from bertkern.data.token_classification import IGNORE_INDEX, TokenClassificationData
from bertkern.models.bert_tasks import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bertkern.models.checkpoint import PretrainedModel
from bertkern.models.config import BertConfig

from .flops import bert_training_flops
from .loop import Task
from .metrics import classification_figures, entity_figures, regression_figures, wilson_interval
from .processes import Processes
from .settings import LoopSettings
from .squad import squad_figures, write_predictions

Data = TypeVar(
    "Data",
    bound=ClassificationData | MultipleChoiceData | TokenClassificationData | QuestionAnsweringData,
)
Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class FinetuningSettings:
    """How to fine-tune; the defaults are those of Devlin et al. (2018, appendix A.3).

    Attributes:
        epochs: how often each example is seen.
        batch_size: examples of a step, of all processes together (windows, for questions).
        evaluate_every, checkpoint_every: steps between; None: at the end of each epoch.
        evaluation_tokens: most tokens that are evaluated at once.
        metric: the held-out figure that says which weights are best; None: the task's first.
        n_best, max_answer_tokens, null_threshold: of answers, see `answer_spans` and `squad`.

    The others are LoopSettings'.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 3e-5
    warmup_fraction: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    accumulate: int = 1
    precision: str = "fp32"
    sharding: str = "ddp"
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    evaluate_first: bool = True
    checkpoint_every: int | None = None
    patience: int | None = None
    seed: int = 0
    evaluation_tokens: int = 8192
    metric: str | None = None
    n_best: int = 20
    max_answer_tokens: int = 30
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluation_tokens", "n_best", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        self.loop(1)  # checks what is the loop's

    def loop(self, examples: int) -> LoopSettings:
        """The loop's settings for so many examples."""
        own = {f.name: getattr(self, f.name) for f in fields(LoopSettings) if hasattr(self, f.name)}
        an_epoch = -(-examples // self.batch_size)
        for name in ("evaluate_every", "checkpoint_every"):
            if own[name] is None:
                own[name] = an_epoch
        return LoopSettings(**{**own, "steps": self.epochs * an_epoch})


class FinetuningTask(Task, Generic[Data]):
    """What the tasks have in common.

    Args:
        config: of the model.
        train, held_out: labelled.
        settings: how to fine-tune.

    Attributes:
        name: as the command line calls it.
        model_class: the model with the task's head.
        output_names, outputs_of_tokens: of the model's output: [E, ...] arrays, or [N, ...].
        figure_names: those that can be the metric, besides "loss"; the greatest is best, but for
            LOWER_IS_BETTER.
    """

    description = "fine-tuning"
    name: ClassVar[str]
    model_class: ClassVar[type[PretrainedModel]]
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
    outputs_of_tokens: ClassVar[bool] = False

    LOWER_IS_BETTER = ("loss", "mean_squared_error")

    def __init__(
        self, config: BertConfig, train: Data, held_out: Data, settings: FinetuningSettings
    ) -> None:
        self.config, self.settings = config, settings
        self.train: Data = train
        self.held_out: Data = held_out
        known = [*self.figure_names(), "loss"]
        self.metric = settings.metric or known[0]
        if self.metric not in known:
            raise ValueError(f"metric must be one of {', '.join(known)}, not {self.metric!r}")
        self.higher_is_better = self.metric not in self.LOWER_IS_BETTER

    @staticmethod
    def config_changes(train: Any) -> dict[str, Any]:
        """The entries of the model's config that the data decide."""
        return {}

    @abstractmethod
    def figure_names(self) -> list[str]:
        """The figures that can be the metric, the usual one first."""

    @abstractmethod
    def figures(self, data: Data, outputs: Outputs) -> dict[str, float]:
        """Held-out figures of a model's outputs for labelled data."""

    @abstractmethod
    def write(self, folder: Path, data: Data, outputs: Outputs) -> list[Path]:
        """Write the predictions in the task's official form; the files."""

    def intervals(self, data: Data, figures: dict[str, float]) -> dict[str, tuple[float, float]]:
        """95 % intervals of the figures that are shares of independent examples."""
        if "accuracy" not in figures:
            return {}
        count = len(data)
        return {"accuracy": wilson_interval(round(figures["accuracy"] * count), count)}

    def batches(self, epoch: int, start: int, step: int) -> Iterator[Batch]:
        """Every example once, in the order of the epoch."""
        return self.train.features.batches(
            epoch, self.settings.batch_size, self.settings.seed, start=start
        )

    def label_counts(self, part: PackedBatch) -> dict[str, int]:
        """Every example has one."""
        return {"loss": part.sequences}

    def losses(self, output: Any) -> dict[str, Tensor]:
        """The model's own loss."""
        return {"loss": output.loss}

    def evaluate(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        """The held-out loss and figures."""
        outputs, loss = self.outputs(model, self.held_out, processes)
        assert loss is not None, "held-out data are labelled"
        return {"loss": loss, **self.figures(self.held_out, outputs)}

    @torch.no_grad()
    def outputs(
        self, model: nn.Module, data: Data, processes: Processes
    ) -> tuple[Outputs, float | None]:
        """(the model's outputs for all examples, in order; the mean loss, None without labels).

        The model is in evaluation mode; the result is the same in every process.
        """
        device = next(model.parameters()).device
        features = data.features
        labelled = bool(features.example_labels or features.token_labels)
        found: list[tuple[Any, Any, list[NDArray[Any]], float, int]] = []
        for batch in features.evaluation_batches(self.settings.evaluation_tokens):
            part: Any  # a PackedFeatures
            part, counts = processes.part_of(batch)
            output = model(**part.arguments(device))
            if counts:
                values = [getattr(output, name).float().cpu().numpy() for name in self.output_names]
                labels = self.label_counts(part)["loss"] if labelled else 0
                loss = float(output.loss) * labels if labelled else 0.0
                found.append((part.examples, part.places, values, loss, labels))
        found = processes.gather(found)
        results: Outputs = {}
        size = len(features.input_ids) if self.outputs_of_tokens else len(features)
        for index, name in enumerate(self.output_names):
            shape = (size, *found[0][2][index].shape[1:])
            results[name] = np.empty(shape, dtype=np.float32)
            for examples, tokens, values, _, _ in found:
                results[name][tokens if self.outputs_of_tokens else examples] = values[index]
        if not labelled:
            return results, None
        total = sum(labels for *_, labels in found)
        return results, sum(loss for *_, loss, _ in found) / max(total, 1)

    def describe(self) -> dict[str, Any]:
        """Digests of the data, and what decides batches and figures."""
        settings = self.settings
        return {
            "task": self.name,
            "train": digest(self.train.features),
            "held_out": digest(self.held_out.features),
            "batch_size": settings.batch_size,
            "metric": self.metric,
            "answers": [settings.n_best, settings.max_answer_tokens, settings.null_threshold],
        }

    def flops(self, batch: Batch) -> float:
        """Of the layers."""
        return bert_training_flops(self.config, batch.sequence_lengths)  # type: ignore[attr-defined]


class ClassificationTask(FinetuningTask[ClassificationData]):
    """A class, or a score, of a text or a pair of texts."""

    name = "classification"
    model_class = BertForSequenceClassification

    @staticmethod
    def config_changes(train: ClassificationData) -> dict[str, Any]:
        """The names of the classes, or one number."""
        names = train.examples.label_names
        if names is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def figure_names(self) -> list[str]:
        """Accuracy first, or Pearson's correlation."""
        if self.train.examples.regression:
            return ["pearson", "spearman", "mean_squared_error"]
        return ["accuracy", "f1" if self.config.num_labels == 2 else "f1_macro", "mcc"]

    def figures(self, data: ClassificationData, outputs: Outputs) -> dict[str, float]:
        """As `metrics`."""
        labels = data.examples.labels
        assert labels is not None
        if data.examples.regression:
            return regression_figures(labels, outputs["logits"][:, 0])
        return classification_figures(labels, outputs["logits"].argmax(1), self.config.num_labels)

    def baselines(self) -> dict[str, float]:
        """Always the class that is most frequent in training."""
        labels, held_out = self.train.examples.labels, self.held_out.examples.labels
        assert labels is not None
        assert held_out is not None
        if self.train.examples.regression:
            return {"mean_squared_error": float(((held_out - labels.mean()) ** 2).mean())}
        return {"accuracy": float((held_out == np.bincount(labels).argmax()).mean())}

    def write(self, folder: Path, data: ClassificationData, outputs: Outputs) -> list[Path]:
        """GLUE's form: index and prediction, between tabs."""
        logits = outputs["logits"]
        if self.train.examples.regression:
            predictions = [f"{value:.6g}" for value in logits[:, 0]]
        else:
            predictions = [self.config.id2label[int(label)] for label in logits.argmax(1)]
        rows = zip(data.examples.ids, predictions, strict=True)
        path = folder / "predictions.tsv"
        write_text(path, "index\tprediction\n" + "".join(f"{i}\t{p}\n" for i, p in rows))
        return [path]


class MultipleChoiceTask(FinetuningTask[MultipleChoiceData]):
    """Which of C endings goes on."""

    name = "multiple-choice"
    model_class = BertForMultipleChoice

    def figure_names(self) -> list[str]:
        """Accuracy."""
        return ["accuracy"]

    def figures(self, data: MultipleChoiceData, outputs: Outputs) -> dict[str, float]:
        """Accuracy."""
        assert data.examples.labels is not None
        return {"accuracy": float((outputs["logits"].argmax(1) == data.examples.labels).mean())}

    def baselines(self) -> dict[str, float]:
        """One of C by chance."""
        return {"accuracy": 1 / self.held_out.examples.choices}

    def write(self, folder: Path, data: MultipleChoiceData, outputs: Outputs) -> list[Path]:
        """The form of SWAG's own code: the examples' ids and `pred`, between commas."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["", "pred"])
        writer.writerows(zip(data.examples.ids, outputs["logits"].argmax(1).tolist(), strict=True))
        path = folder / "predictions.csv"
        write_text(path, text.getvalue())
        return [path]


class TokenClassificationTask(FinetuningTask[TokenClassificationData]):
    """A tag for each word."""

    name = "token-classification"
    model_class = BertForTokenClassification
    outputs_of_tokens = True

    @staticmethod
    def config_changes(train: TokenClassificationData) -> dict[str, Any]:
        """The names of the tags."""
        names = train.examples.tag_names
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }

    def label_counts(self, part: PackedBatch) -> dict[str, int]:
        """The first pieces of words."""
        labels = part.label("labels")  # type: ignore[attr-defined]
        return {"loss": int((labels != IGNORE_INDEX).sum())}

    def figure_names(self) -> list[str]:
        """F1 of entities first."""
        return ["f1", "precision", "recall", "accuracy"]

    def figures(self, data: TokenClassificationData, outputs: Outputs) -> dict[str, float]:
        """Of entities, and the accuracy of words."""
        assert data.examples.tags is not None
        return entity_figures(data.examples.tags, self._tags(data, outputs))

    def baselines(self) -> dict[str, float]:
        """Every word outside of entities."""
        tags = self.held_out.examples.tags
        assert tags is not None
        return entity_figures(tags, [["O"] * len(own) for own in tags])

    def intervals(
        self, data: TokenClassificationData, figures: dict[str, float]
    ) -> dict[str, tuple[float, float]]:
        """None: the words of a sentence are not independent."""
        return {}

    def write(self, folder: Path, data: TokenClassificationData, outputs: Outputs) -> list[Path]:
        """CoNLL's form: word and predicted tag, the right tag between them where it is known."""
        lines = []
        for number, tags in enumerate(self._tags(data, outputs)):
            columns = [data.examples.sentences[number], tags]
            if data.examples.tags is not None:
                columns.insert(1, data.examples.tags[number])
            lines += [" ".join(entries) for entries in zip(*columns, strict=True)]
            lines.append("")
        path = folder / "predictions.conll"
        write_text(path, "\n".join(lines) + "\n")
        return [path]

    def _tags(self, data: TokenClassificationData, outputs: Outputs) -> list[list[str]]:
        """The predicted tag of each word, by sentence."""
        numbers = outputs["logits"][data.first_pieces].argmax(1)
        return data.by_sentence([self.config.id2label[int(number)] for number in numbers])


class QuestionAnsweringTask(FinetuningTask[QuestionAnsweringData]):
    """Spans of texts."""

    name = "qa"
    model_class = BertForQuestionAnswering
    output_names = ("start_logits", "end_logits")
    outputs_of_tokens = True

    @staticmethod
    def config_changes(train: QuestionAnsweringData) -> dict[str, Any]:
        """Two logits a token: start and end."""
        return {"num_labels": 2}

    def figure_names(self) -> list[str]:
        """F1 first."""
        names = ["f1", "exact"]
        return [*names, "best_f1", "best_exact"] if self._with_null(self.held_out) else names

    def figures(self, data: QuestionAnsweringData, outputs: Outputs) -> dict[str, float]:
        """SQuAD's, in percent."""
        answers = self._answers(data, outputs)
        ids = [question.id for question in data.questions]
        texts = [own.spans[0].text if own.spans else "" for own in answers]
        differences = None
        if self._with_null(data):
            differences = {i: own.null_difference for i, own in zip(ids, answers, strict=True)}
        return squad_figures(
            data.questions,
            dict(zip(ids, texts, strict=True)),
            differences,
            self.settings.null_threshold,
        )

    def intervals(
        self, data: QuestionAnsweringData, figures: dict[str, float]
    ) -> dict[str, tuple[float, float]]:
        """Of exact matches, in percent."""
        count = len(data.questions)
        low, high = wilson_interval(round(figures["exact"] / 100 * count), count)
        return {"exact": (100 * low, 100 * high)}

    def write(self, folder: Path, data: QuestionAnsweringData, outputs: Outputs) -> list[Path]:
        """SQuAD's form."""
        answers = self._answers(data, outputs)
        threshold = self.settings.null_threshold
        return write_predictions(folder, data.questions, answers, self._with_null(data), threshold)

    def _with_null(self, data: QuestionAnsweringData) -> bool:
        """Whether predictions may be empty: there are questions without answer, as in SQuAD 2.0."""
        return data.has_impossible or self.train.has_impossible

    def _answers(self, data: QuestionAnsweringData, outputs: Outputs) -> list[Answers]:
        ends = data.features.starts[1:-1]
        starts_of, ends_of = (np.split(outputs[name], ends) for name in self.output_names)
        return [
            best_answers(
                question.context,
                [data.windows[number] for number in numbers],
                [starts_of[number] for number in numbers],
                [ends_of[number] for number in numbers],
                self.settings.n_best,
                self.settings.max_answer_tokens,
            )
            for question, numbers in zip(data.questions, data.windows_of(), strict=True)
        ]


TASKS: dict[type, type[FinetuningTask[Any]]] = {
    ClassificationData: ClassificationTask,
    MultipleChoiceData: MultipleChoiceTask,
    TokenClassificationData: TokenClassificationTask,
    QuestionAnsweringData: QuestionAnsweringTask,
}
"""The task of each kind of data."""


def digest(features: Features) -> str:
    """SHA-256 of token ids and labels, by which a resumed run recognises its data."""
    found = hashlib.sha256()
    arrays = {"ids": features.input_ids, "types": features.token_type_ids}
    arrays |= {"starts": features.starts, **features.example_labels, **features.token_labels}
    for name, array in arrays.items():
        found.update(f"{name} {array.shape} {array.dtype.str}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
