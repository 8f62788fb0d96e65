"""FLOPs by hand, against torch's own count of transformers' BERT and Marian."""

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bertkern.models import BertConfig, TransformerConfig
from bertkern.train.flops import bert_training_flops, transformer_training_flops


def test_as_torch_counts_them():
    """Three sequences, each alone, so that nothing is padded; every token is predicted there."""
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=64,
    )
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(**config.to_dict(), attn_implementation="eager")
    )
    lengths = np.array([5, 17, 40])
    counted = 0
    for length in lengths:
        with FlopCounterMode(display=False) as counter:
            theirs(torch.ones(1, length, dtype=torch.int64))
        counted += counter.get_total_flops()
    assert bert_training_flops(config, lengths, int(lengths.sum())) == 3 * counted


@pytest.mark.parametrize(("length", "expected"), [(128, 174.6e6), (512, 188.7e6), (32, 171.0e6)])
def test_published_cost_of_a_token(length, expected):
    """BERT-base's forward, as benchmarks of CPU engines state it."""
    flops = bert_training_flops(BertConfig.base(), np.array([length])) / 3 / length
    assert flops == pytest.approx(expected, rel=2e-3)


def test_of_a_transformer_as_torch_counts_them():
    """Marian's sizes are the paper's; each pair alone, so that nothing is padded."""
    config = TransformerConfig(
        vocab_size=99, hidden_size=32, num_layers=3, num_attention_heads=4, intermediate_size=80
    )
    theirs = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=99,
            d_model=32,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=80,
            decoder_ffn_dim=80,
            max_position_embeddings=64,
            pad_token_id=0,
            decoder_start_token_id=0,
            attn_implementation="eager",
        )
    )
    sources, targets = np.array([5, 17, 40]), np.array([9, 3, 33])
    counted = 0
    for s, t in zip(sources, targets, strict=True):
        with FlopCounterMode(display=False) as counter:
            theirs(
                torch.ones(1, s, dtype=torch.int64),
                decoder_input_ids=torch.ones(1, t, dtype=torch.int64),
            )
        counted += counter.get_total_flops()
    assert transformer_training_flops(config, sources, targets) == 3 * counted
