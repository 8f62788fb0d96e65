"""Models: BERT with its pre-training heads, sentence embeddings, and their files."""

from .bert import BertForPreTraining, BertForPreTrainingOutput, BertModel, BertModelOutput
from .config import BertConfig
from .fill_mask import fill_mask
from .sentence_encoder import SentenceEncoder

__all__ = [
    "BertConfig",
    "BertForPreTraining",
    "BertForPreTrainingOutput",
    "BertModel",
    "BertModelOutput",
    "SentenceEncoder",
    "fill_mask",
]
