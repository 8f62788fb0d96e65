"""A task for the tests of the loop: random sentences, labelled by a word that they hold or not."""

import numpy as np
import torch

from bertkern.data.packing import cumulative_lengths, to_device
from bertkern.models import BertConfig, BertForSequenceClassification
from bertkern.train import LoopSettings, Task

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
SETTINGS = LoopSettings(
    steps=12, learning_rate=5e-3, evaluate_every=4, checkpoint_every=100, seed=3
)


class Part:
    """Sentences first .. last - 1 of a batch."""

    def __init__(self, sentences, labels, first, last):
        self.ids, self.labels = sentences[first:last], labels[first:last]
        self.first, self.max_seqlen = first, max(map(len, sentences))
        self.tokens, self.sequences = sum(map(len, self.ids)), len(self.ids)

    def arguments(self, device="cpu"):
        lengths = np.array([len(ids) for ids in self.ids])
        cu_seqlens = torch.from_numpy(cumulative_lengths(lengths)).int()
        return to_device(
            {
                "input_ids": torch.from_numpy(np.concatenate(self.ids)),
                "cu_seqlens": cu_seqlens,
                "max_seqlen": self.max_seqlen,
                "labels": torch.tensor(self.labels),
                "sequence_offset": self.first,
            },
            device,
        )


class Batch:
    def __init__(self, sentences, labels):
        self.sentences, self.labels = sentences, labels
        self.lengths = np.array([len(ids) for ids in sentences])

    def __len__(self):
        return len(self.sentences)

    def part(self, first, last):
        return Part(self.sentences, self.labels, first, last)


class LabelledSentences(Task):
    """Does a sentence hold word 7? Batches of the given sizes make up an epoch."""

    description = "testing"
    metric = "accuracy"
    higher_is_better = True

    def __init__(self, sizes=(6, 5, 7), figures=None):
        self.sizes, self.figures = sizes, figures
        self.evaluations = 0

    def batches(self, epoch, start, step):
        for index, size in list(enumerate(self.sizes))[start:]:
            rng = np.random.default_rng([epoch, index])
            sentences = [rng.integers(1, 50, rng.integers(2, 16)) for _ in range(size)]
            for sentence in sentences[::2]:
                sentence[rng.integers(len(sentence))] = 7
            yield Batch(sentences, [int(7 in sentence) for sentence in sentences])

    def label_counts(self, part):
        return {"label": part.sequences}

    def losses(self, output):
        return {"label": output.loss}

    def evaluate(self, model, processes):
        """Accuracy on epoch 1000, or the next of the figures given."""
        if self.figures is not None:
            self.evaluations += 1
            return {"accuracy": self.figures[self.evaluations - 1]}
        right = []
        for batch in self.batches(1000, 0, 0):
            part, counts = processes.part_of(batch)
            arguments = part.arguments()
            labels = arguments.pop("labels")
            guesses = model(**arguments).logits.argmax(1)
            right += processes.gather((guesses == labels).tolist() if counts else [])
        return {"accuracy": float(np.mean(right))}

    def describe(self):
        return {"sizes": list(self.sizes)}


def model(seed=0, dropout=0.3):
    """The same weights for the same seed; dropout is on unless asked otherwise."""
    torch.manual_seed(seed)
    config = BertConfig(
        **SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2
    )
    return BertForSequenceClassification(config)
