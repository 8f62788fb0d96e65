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
from .generate import Hypothesis
from .next_token import Sampling
from .onnx import export_onnx
from .sentence_encoder import Embedding, SentenceEncoder
from .serving import InputError
from .transformer import Transformer, TransformerOutput
from .transformer_config import TransformerConfig
from .translate import Alternative, Translate, Translation
from .word_vectors import WordVectors

__all__ = [
    "Alternative",
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
    "Hypothesis",
    "InputError",
    "Sampling",
    "SentenceEncoder",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "Translate",
    "Translation",
    "WordVectors",
    "attention_map",
    "convert_folder",
    "export_onnx",
    "load_model",
]
