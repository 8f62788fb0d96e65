"""Text and tokenizers, and the examples that models are trained on."""

from .corpus import Corpus
from .masking import MaskingSettings
from .packing import Batch, PackedBatch
from .pretraining import PackedPretrainingBatch, PretrainingBatch, PretrainingData
from .sources import read_documents, stream_documents
from .text import split_documents, split_sentences, standard_library_text
from .tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "MaskingSettings",
    "PackedBatch",
    "PackedPretrainingBatch",
    "PretrainingBatch",
    "PretrainingData",
    "load_tokenizer",
    "read_documents",
    "save_tokenizer",
    "split_documents",
    "split_sentences",
    "standard_library_text",
    "stream_documents",
    "train_tokenizer",
]
