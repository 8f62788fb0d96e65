"""FLOPs that the mathematics of training needs, a multiply-add counted as two.

BERT: forward = Σ_sequences s·L·(8h² + 4hf + 4sh) + P·(2h² + 2hV);   training = 3 × forward

which is L·(24h² + 4sh) a token where f = 4h. Embeddings, LayerNorms, softmax, pooler and what
is computed twice (checkpointed activations, recomputed logits) are not counted.

Legend: s tokens of a sequence, L layers, h hidden size, f intermediate size, P predicted tokens,
V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bertkern.models.config import BertConfig
from bertkern.models.transformer_config import TransformerConfig


def bert_training_flops(
    config: BertConfig, lengths: NDArray[np.int64], predictions: int = 0
) -> float:
    """FLOPs of forward and backward over sequences of these lengths and so many predictions."""
    s = lengths.astype(np.float64)
    h, f = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers * (s * (8 * h * h + 4 * h * f) + 4 * s * s * h).sum()
    return float(3 * (layers + predictions * (2 * h * h + 2 * h * config.vocab_size)))


def transformer_training_flops(
    config: TransformerConfig, sources: NDArray[np.int64], targets: NDArray[np.int64]
) -> float:
    """FLOPs of forward and backward over pairs of these lengths, each target token predicted.

    forward = Σ_pairs L·(s(8h² + 4hf + 4sh) + t(12h² + 4hf + 4th + 4sh) + 4sh²) + t·2hV

    s and t tokens of source and target. The decoder projects its target for two attentions, and the
    source's keys and values once a layer; masked scores of the causal attention are counted.
    """
    s, t = sources.astype(np.float64), targets.astype(np.float64)
    h, f = config.hidden_size, config.intermediate_size
    encoder = s * (8 * h * h + 4 * h * f + 4 * s * h)
    decoder = t * (12 * h * h + 4 * h * f + 4 * t * h + 4 * s * h) + 4 * s * h * h
    layers = config.num_layers * (encoder + decoder).sum()
    return float(3 * (layers + t.sum() * 2 * h * config.vocab_size))
