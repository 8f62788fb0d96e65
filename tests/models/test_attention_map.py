"""attention_map against transformers' own probabilities."""

import pytest
import torch
import transformers

from bertkern.models import BertConfig, BertForMaskedLM, BertModel, attention_map
from bertkern.reference.tolerance import assert_close, hold_in_most_draws

SIZES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


@pytest.fixture
def pair(tmp_path):
    """(bertkern's model, transformers' eager model) with the same weights, larger than usual so
    that the probabilities are far from uniform."""
    model = BertForMaskedLM(BertConfig(**SIZES, initializer_range=0.3))
    model.save_pretrained(tmp_path)
    transformers.logging.set_verbosity_error()  # its report on the head that it leaves out
    theirs = transformers.BertModel.from_pretrained(
        tmp_path, attn_implementation="eager", add_pooling_layer=False
    )
    return model, theirs.eval()


@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_equals_transformers(pair, length):
    model, theirs = pair
    types = (torch.arange(length) > length // 2).long()

    def check(draw):
        generator = torch.Generator().manual_seed(draw)
        maps = []
        for _ in range(max(1, 64 // length)):  # the rule's mean is one of 64 rows
            ids = torch.randint(60, (length,), generator=generator)
            found = attention_map(model.float(), ids, types)
            assert found.shape == (3, 4, length, length)
            assert found.dtype == torch.float32
            inputs = {"input_ids": ids[None], "token_type_ids": types[None]}
            with torch.no_grad():
                same, truth = (
                    torch.cat(theirs.to(dtype)(**inputs, output_attentions=True).attentions)
                    for dtype in (torch.float32, torch.float64)
                )
            torch.testing.assert_close(attention_map(model.double(), ids, types), truth)
            maps.append((found, truth, same))
        assert_close(*(torch.cat(rows, -2) for rows in zip(*maps, strict=True)))

    hold_in_most_draws(check)


def test_leaves_the_model_as_it_was(pair):
    model, _ = pair
    model.train()
    ids = torch.randint(60, (1, 9))
    first = attention_map(model, ids)  # dropout is off although the model trains
    assert torch.equal(first, attention_map(model, ids))
    assert model.training
    assert model.bert.layers[0].attention.training
    assert not any(part._forward_hooks for part in model.modules())


def test_hooks_go_when_the_model_refuses(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="longer than max_position_embeddings"):
        attention_map(model, torch.zeros(41, dtype=torch.int64))
    assert not any(part._forward_hooks for part in model.modules())


def test_wrong_arguments():
    model = BertModel(BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"must be one sequence.*not \[2, 3\]"):
        attention_map(model, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="Linear has no attention layers"):
        attention_map(torch.nn.Linear(2, 2), torch.zeros(3, dtype=torch.int64))
