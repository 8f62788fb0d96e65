"""Held-out masked-LM loss and accuracy, next-sentence accuracy, and a baseline."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bertkern.data.pretraining import PackedBatch, PretrainingData
from bertkern.models.bert import BertForPreTraining, mean_cross_entropy

from .history import Evaluation


@torch.no_grad()
def evaluate(
    model: BertForPreTraining,
    data: PretrainingData,
    tokens_per_batch: int,
    max_tokens: int | None = None,
) -> Evaluation:
    """Losses and accuracies on epoch 0 of the data, without dropout; always the same examples.

    Args:
        model, data: what is evaluated, on what.
        tokens_per_batch: most tokens of a batch.
        max_tokens: stop after the batch that reaches it; None for the whole epoch.
    """
    was_training = model.training
    model.eval()
    device = model.bert.embeddings.word.weight.device
    sums = torch.zeros(3, device=device, dtype=torch.float64)  # loss, right tokens, right pairs
    predictions = pairs = 0
    for batch in evaluation_batches(data, tokens_per_batch, max_tokens):
        on_device = batch.arguments(device)
        targets = on_device.pop("labels")
        places = on_device.pop("label_tokens")
        next_sentence = on_device.pop("next_sentence_label")
        assert isinstance(targets, Tensor)
        encoded = model.bert(**on_device)
        logits = model.predict(encoded.last_hidden_state.index_select(0, places))
        relationship = model.next_sentence(encoded.pooler_output)
        sums[0] += mean_cross_entropy(logits, targets) * len(targets)
        sums[1] += (logits.argmax(1) == targets).sum()
        sums[2] += (relationship.argmax(1) == next_sentence).sum()
        predictions += len(targets)
        pairs += len(batch.next_sentence_label)
    model.train(was_training)
    loss, right_tokens, right_pairs = sums.tolist()
    return Evaluation(
        mlm_loss=loss / predictions,
        mlm_accuracy=right_tokens / predictions,
        nsp_accuracy=right_pairs / pairs,
        predictions=predictions,
        pairs=pairs,
    )


def evaluation_batches(
    data: PretrainingData, tokens_per_batch: int, max_tokens: int | None
) -> Iterator[PackedBatch]:
    """The batches that evaluate looks at."""
    epoch, batches = data.batches(0, tokens_per_batch)
    tokens = 0
    for examples in batches:
        batch = epoch.pack(examples)
        yield batch
        tokens += len(batch.input_ids)
        if max_tokens is not None and tokens >= max_tokens:
            return


def unigram_loss(
    data: PretrainingData,
    held_out: PretrainingData,
    tokens_per_batch: int,
    max_tokens: int | None = None,
) -> float:
    """The held-out masked-LM loss of a model that knows only word frequencies.

    -log p(target) on average over the held-out targets, p the frequency in the training text with
    one added to every count.
    """
    counts = data.unigram_counts() + 1.0
    log_p = np.log(counts / counts.sum())
    batches = evaluation_batches(held_out, tokens_per_batch, max_tokens)
    targets = np.concatenate([batch.labels.numpy() for batch in batches])
    return float(-log_p[targets].mean())
