"""Text and tokenizers, and the examples that models are pre-trained and fine-tuned on."""

from .classification import ClassificationData, ClassificationExamples, read_classification
from .corpus import Corpus
from .held_out import hold_out
from .masking import MaskingSettings
from .multiple_choice import ChoiceExamples, MultipleChoiceData, read_multiple_choice
from .packing import Batch, PackedBatch
from .parallel_text import Pair, read_line_files, read_parallel
from .pretraining import PackedPretrainingBatch, PretrainingBatch, PretrainingData
from .question_answering import (
    Answer,
    Question,
    QuestionAnsweringData,
    WindowSettings,
    read_questions,
)
from .skip_gram import SkipGrams, WordText
from .sources import read_documents, stream_documents
from .text import split_documents, split_lines, split_sentences, standard_library_text
from .token_classification import (
    TaggedSentences,
    TokenClassificationData,
    read_token_classification,
)
from .tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from .translation import TranslationData

__all__ = [
    "Answer",
    "Batch",
    "ChoiceExamples",
    "ClassificationData",
    "ClassificationExamples",
    "Corpus",
    "MaskingSettings",
    "MultipleChoiceData",
    "PackedBatch",
    "PackedPretrainingBatch",
    "Pair",
    "PretrainingBatch",
    "PretrainingData",
    "Question",
    "QuestionAnsweringData",
    "SkipGrams",
    "TaggedSentences",
    "TokenClassificationData",
    "TranslationData",
    "WindowSettings",
    "WordText",
    "hold_out",
    "load_tokenizer",
    "read_classification",
    "read_documents",
    "read_line_files",
    "read_multiple_choice",
    "read_parallel",
    "read_questions",
    "read_token_classification",
    "save_tokenizer",
    "split_documents",
    "split_lines",
    "split_sentences",
    "standard_library_text",
    "stream_documents",
    "train_tokenizer",
]
