"""Small data for each task that a small model can learn, and models to start from."""

import numpy as np
import torch

from bertkern.data import save_tokenizer, train_tokenizer
from bertkern.data.classification import ClassificationData, ClassificationExamples
from bertkern.data.multiple_choice import ChoiceExamples, MultipleChoiceData
from bertkern.data.question_answering import (
    Answer,
    Question,
    QuestionAnsweringData,
    WindowSettings,
)
from bertkern.data.token_classification import TaggedSentences, TokenClassificationData
from bertkern.models import BertConfig, BertForPreTraining

KINDS = ("classification", "regression", "multiple-choice", "token-classification", "qa")
FILLERS = ["the", "mat", "sat", "today", "plays", "guitar", "listens", "house"]
WINDOWS = WindowSettings(max_length=20, stride=6, max_query_length=4)


def tokenizer():
    words = [*FILLERS, "cat", "dog", "ann", "lee", "where", "york"]
    return train_tokenizer([" ".join(words)] * 3, 200, min_frequency=1)


def save_start(folder, dropout=0.1):
    """A small BERT with its tokenizer, as pre-training leaves it."""
    words = tokenizer()
    config = BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForPreTraining(config).save_pretrained(folder)
    save_tokenizer(words, folder)
    return folder


def make(kind, count, seed, words=None):
    """Labelled data: "cat" and "dog" decide, whatever the kind."""
    rng = np.random.default_rng(seed)
    words = words or tokenizer()

    def text(*others):
        found = [*rng.choice(FILLERS, rng.integers(2, 9)), *others]
        return [str(word) for word in rng.permutation(found)]

    ids = [str(10 + i) for i in range(count)]
    if kind in ("classification", "regression"):
        labels = rng.integers(0, 2, count)
        texts = [" ".join(text("cat" if label else "dog")) for label in labels]
        values, names = (labels, ["no", "yes"])
        if kind == "regression":
            values, names = (labels * 2.5 - 1).astype(np.float32), None
        return ClassificationData(
            ClassificationExamples("file", texts, None, values, names, ids), words, 16
        )
    if kind == "multiple-choice":
        labels = rng.integers(0, 3, count)
        endings = [
            [" ".join(text("cat" if i == label else "dog")) for i in range(3)] for label in labels
        ]
        starts = [" ".join(text()) for _ in labels]
        return MultipleChoiceData(ChoiceExamples("file", starts, endings, labels, ids), words, 24)
    if kind == "token-classification":
        sentences = [[w for word in text("cat", "ann") for w in pair(word)] for _ in ids]
        tags = [[TAGS.get(word, "O") for word in sentence] for sentence in sentences]
        names = ["O", "B-ANIMAL", "B-PER", "I-PER"]
        return TokenClassificationData(
            TaggedSentences("file", sentences, tags, names, ids), words, 16
        )
    questions = []
    for i in ids:
        context = " ".join([*text(*text()), "york"])
        answers = ()
        if rng.random() < 0.7:
            context = " ".join(rng.permutation([*context.split(), "cat"]))
            answers = (Answer("cat", context.index("cat")),)
        questions.append(Question(i, "where the cat", context, answers, not answers))
    return QuestionAnsweringData(questions, words, WINDOWS)


TAGS = {"cat": "B-ANIMAL", "ann": "B-PER", "lee": "I-PER"}


def pair(word):
    """A name is two words."""
    return ["ann", "lee"] if word == "ann" else [word]
