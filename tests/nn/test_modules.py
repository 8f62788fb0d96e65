"""Modules against torch's own, with the same weights."""

import pytest
import torch
from torch.nn import functional as F

from bertkern.nn import EncoderLayer, FeedForward, LayerNorm, Linear, padded_layout


def test_linear_feed_forward_and_layer_norm():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    linear = Linear(8, 6, "gelu").double()
    torch.testing.assert_close(linear(x), F.gelu(F.linear(x, linear.weight, linear.bias)))
    ffn = FeedForward(8, 16, "relu").double()
    torch.testing.assert_close(ffn(x), ffn.down(F.relu(ffn.up(x))))
    norm = LayerNorm(8, 1e-5).double()
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias, 1e-5))


@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer_is_torchs(masked):
    """nn.TransformerEncoderLayer is the same post-LN layer, on padded input."""
    torch.manual_seed(1)
    ours = EncoderLayer(16, 4, 32, eps=1e-5).double().eval()
    theirs = torch.nn.TransformerEncoderLayer(
        16, 4, 32, 0.0, "gelu", layer_norm_eps=1e-5, batch_first=True
    ).double()
    attention = theirs.self_attn
    with torch.no_grad():
        for a, b in [
            (attention.in_proj_weight, ours.attention.qkv.weight),
            (attention.in_proj_bias, ours.attention.qkv.bias),
            (attention.out_proj.weight, ours.attention.output.weight),
            (attention.out_proj.bias, ours.attention.output.bias),
            (theirs.linear1.weight, ours.feed_forward.up.weight),
            (theirs.linear1.bias, ours.feed_forward.up.bias),
            (theirs.linear2.weight, ours.feed_forward.down.weight),
            (theirs.linear2.bias, ours.feed_forward.down.bias),
        ]:
            a.copy_(b)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]]) if masked else None
    layout, _ = padded_layout((3, 7), x.device, mask)
    y = layout.pad(ours(layout.unpad(x), layout))
    expected = theirs(x, src_key_padding_mask=None if mask is None else ~mask)
    if mask is not None:
        expected = expected * mask[..., None]
    torch.testing.assert_close(y, expected)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="hidden_size 10 is not a multiple of num_heads 3"):
        EncoderLayer(10, 3, 20)
