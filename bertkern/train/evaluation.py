"""Held-out masked-LM loss and accuracy, next-sentence accuracy, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bertkern.data.pretraining import PretrainingBatch, PretrainingData
from bertkern.models.bert import BertForPreTraining, mean_cross_entropy

from .processes import Processes


@torch.no_grad()
def evaluate(
    model: BertForPreTraining,
    data: PretrainingData,
    tokens_per_batch: int,
    max_tokens: int | None = None,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Figures on epoch 0 of the data, without dropout; always of the same examples.

    Args:
        model, data: what is evaluated, on what.
        tokens_per_batch: most tokens of a batch.
        max_tokens: stop after the batch that reaches it; None for the whole epoch.
        processes: each computes its share of every batch; None: this one alone.

    Returns:
        mlm_loss (nats for a masked token), mlm_accuracy, nsp_accuracy.
    """
    processes = processes or Processes()
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(5, device=device, dtype=torch.float64)
    for batch in evaluation_batches(data, tokens_per_batch, max_tokens):
        part, counts = processes.part_of(batch)
        arguments = part.arguments(device)
        targets: Tensor = arguments.pop("labels")
        places: Tensor = arguments.pop("label_tokens")
        next_sentence: Tensor = arguments.pop("next_sentence_label")
        encoded = model.bert(**arguments)
        logits = model.predict(encoded.last_hidden_state.index_select(0, places))
        relationship = model.next_sentence(encoded.pooler_output)
        if counts:
            sums[0] += mean_cross_entropy(logits, targets) * len(targets)
            sums[1] += (logits.argmax(1) == targets).sum()
            sums[2] += len(targets)
            sums[3] += (relationship.argmax(1) == next_sentence).sum()
            sums[4] += len(next_sentence)
    model.train(was_training)
    loss, right_tokens, tokens, right_pairs, pairs = processes.total(sums).tolist()
    return {
        "mlm_loss": loss / max(tokens, 1),
        "mlm_accuracy": right_tokens / max(tokens, 1),
        "nsp_accuracy": right_pairs / max(pairs, 1),
    }


def evaluation_batches(
    data: PretrainingData, tokens_per_batch: int, max_tokens: int | None
) -> Iterator[PretrainingBatch]:
    """The batches that evaluate looks at."""
    tokens = 0
    for batch in data.batches(0, tokens_per_batch):
        yield batch
        tokens += int(batch.lengths.sum())
        if max_tokens is not None and tokens >= max_tokens:
            return


def frequency_baselines(
    data: PretrainingData,
    held_out: PretrainingData,
    tokens_per_batch: int,
    max_tokens: int | None = None,
) -> dict[str, float]:
    """The held-out figures of a model that knows only how frequent words and labels are.

    Its masked-LM loss is -log p(target) on average over the held-out targets, p the frequency in
    the training text with one added to every count; it always predicts the most frequent word, and
    of the two labels of sentence pairs the one that is more frequent in the held-out pairs.
    """
    counts = data.corpus.unigram_counts() + 1.0
    log_p = np.log(counts / counts.sum())
    targets, pairs = [], []
    for batch in evaluation_batches(held_out, tokens_per_batch, max_tokens):
        whole = batch.part(0, len(batch))
        targets.append(whole.labels.numpy())
        pairs.append(whole.next_sentence_label.numpy())
    all_targets, random = np.concatenate(targets), float(np.concatenate(pairs).mean())
    return {
        "mlm_loss": float(-log_p[all_targets].mean()),
        "mlm_accuracy": float((all_targets == log_p.argmax()).mean()),
        "nsp_accuracy": max(random, 1 - random),
    }
