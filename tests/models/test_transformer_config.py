"""TransformerConfig: the paper's sizes, and what is refused, by name."""

import pytest
import torch

from bertkern.models import Transformer, TransformerConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, not 0"),
        ({"num_attention_heads": 7}, "num_attention_heads = 7 must divide hidden_size = 512"),
        ({"dropout": 1.5}, r"dropout must be in 0\.\.1, not 1\.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be a number >= 0"),
        ({"hidden_act": "swish"}, "hidden_act must be one of"),
        ({"eos_token_id": 37000}, "eos_token_id must be an integer below vocab_size = 37000"),
        ({"bos_token_id": 3}, r"must be different, not \(0, 3, 3\)"),
        ({"pad_token_id": True}, "pad_token_id must be an integer below"),
        ({"hidden_sizes": 3}, "unknown config keys hidden_sizes"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(changes)


def test_parameters_are_the_papers():
    """Sizes of table 3 at a vocabulary of 37,000, counted by hand."""

    def count(d, ff, layers=6, vocab=37000):
        attention, norm = 4 * d * d + 4 * d, 2 * d
        ffn = 2 * d * ff + ff + d
        return vocab * d + layers * (attention + ffn + 2 * norm + 2 * attention + ffn + 3 * norm)

    with torch.device("meta"):
        base, big = (
            Transformer(make()) for make in (TransformerConfig.base, TransformerConfig.big)
        )
        pre = Transformer(TransformerConfig.base(prenorm=True))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (base, big, pre)]
    assert sizes == [count(512, 2048), count(1024, 4096), count(512, 2048) + 4 * 512]
    assert sizes[0] == 63_082_496
