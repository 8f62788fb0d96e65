"""Models: BERT with the heads of pre-training and of every task, the Transformer, what serves them,
their files."""

from .answer import Answer, Answered
from .attention_map import attention_map
from .bert import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForPreTrainingOutput,
    BertModel,
    BertModelOutput,
    BertTaskOutput,
)
from .bert_tasks import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForQuestionAnsweringOutput,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from .classify import Classification, Classify
from .config import BertConfig
from .conversion import convert_folder, load_model
from .fill_mask import FilledText, FillMask, Guess
from .onnx import export_onnx
from .sentence_encoder import Embedding, SentenceEncoder
from .serving import InputError
from .transformer import Transformer, TransformerOutput
from .transformer_config import TransformerConfig

__all__ = [
    "Answer",
    "Answered",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForPreTraining",
    "BertForPreTrainingOutput",
    "BertForQuestionAnswering",
    "BertForQuestionAnsweringOutput",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertModelOutput",
    "BertTaskOutput",
    "Classification",
    "Classify",
    "Embedding",
    "FillMask",
    "FilledText",
    "Guess",
    "InputError",
    "SentenceEncoder",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "attention_map",
    "convert_folder",
    "export_onnx",
    "load_model",
]
