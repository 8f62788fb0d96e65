"""Training: the loop, and pre-training of BERT from text."""

from .evaluation import evaluate
from .history import Evaluation, History, StepRecord
from .interruption import TrainingInterrupted
from .loop import Task, train
from .optimizer import Lamb
from .pretraining import PretrainingResult, PretrainingSettings, PretrainingTask, pretrain
from .processes import Processes
from .settings import LoopSettings

__all__ = [
    "Evaluation",
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
    "pretrain",
    "train",
]
