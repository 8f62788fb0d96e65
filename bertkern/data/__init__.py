"""Text and tokenizers, and the examples that models are trained on."""

from .pretraining import Epoch, MaskingSettings, PackedBatch, PretrainingData
from .text import read_documents, split_documents, split_sentences, standard_library_text
from .tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "Epoch",
    "MaskingSettings",
    "PackedBatch",
    "PretrainingData",
    "load_tokenizer",
    "read_documents",
    "save_tokenizer",
    "split_documents",
    "split_sentences",
    "standard_library_text",
    "train_tokenizer",
]
