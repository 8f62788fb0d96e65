"""Training: the loop, pre-training of BERT from text, and fine-tuning for tasks."""

from .evaluation import evaluate
from .finetuning import FinetuningResult, finetune
from .finetuning_tasks import FinetuningSettings, FinetuningTask
from .history import Evaluation, History, StepRecord
from .interruption import TrainingInterrupted
from .loop import Task, train
from .optimizer import Lamb
from .pretraining import PretrainingResult, PretrainingSettings, PretrainingTask, pretrain
from .processes import Processes
from .settings import LoopSettings

__all__ = [
    "Evaluation",
    "FinetuningResult",
    "FinetuningSettings",
    "FinetuningTask",
    "History",
    "Lamb",
    "LoopSettings",
    "PretrainingResult",
    "PretrainingSettings",
    "PretrainingTask",
    "Processes",
    "StepRecord",
    "Task",
    "TrainingInterrupted",
    "evaluate",
    "finetune",
    "pretrain",
    "train",
]
