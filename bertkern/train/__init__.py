"""Training: the loop, pre-training of BERT from text, fine-tuning for tasks, translation,
word vectors."""

from .evaluation import evaluate
from .finetuning import FinetuningResult, finetune
from .finetuning_tasks import FinetuningSettings, FinetuningTask
from .history import Evaluation, History, StepRecord
from .interruption import TrainingInterrupted
from .loop import Task, train
from .optimizer import Lamb
from .pretraining import PretrainingResult, PretrainingSettings, PretrainingTask, pretrain
from .processes import Processes
from .settings import LoopSettings, noam_peak
from .translation import (
    TranslationResult,
    TranslationSettings,
    TranslationTask,
    train_translation,
)
from .word_picture import draw_words
from .word_vectors import WordVectorResult, WordVectorSettings, train_word_vectors

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
    "TranslationResult",
    "TranslationSettings",
    "TranslationTask",
    "WordVectorResult",
    "WordVectorSettings",
    "draw_words",
    "evaluate",
    "finetune",
    "noam_peak",
    "pretrain",
    "train",
    "train_translation",
    "train_word_vectors",
]
