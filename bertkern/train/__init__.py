"""Training: pre-training of BERT from text."""

from .evaluation import evaluate
from .history import Evaluation, History, StepRecord
from .interruption import TrainingInterrupted
from .pretraining import (
    PretrainingResult,
    PretrainingSettings,
    pretrain_from_text,
    steps_in,
    train,
)

__all__ = [
    "Evaluation",
    "History",
    "PretrainingResult",
    "PretrainingSettings",
    "StepRecord",
    "TrainingInterrupted",
    "evaluate",
    "pretrain_from_text",
    "steps_in",
    "train",
]
