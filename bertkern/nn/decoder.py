"""Transformer decoder layer on unpadded tokens (Vaswani et al. 2017, section 3.1).

    h = LayerNorm(x + dropout(causal_attention(x)))
    g = LayerNorm(h + dropout(cross_attention(h, source)))
    y = LayerNorm(g + dropout(feed_forward(g)))

or with the LayerNorms before the sublayers (`sublayers.py`).

Legend: T target tokens of a batch without padding, T' source tokens; R rows of generation.
"""

from __future__ import annotations

from torch import Tensor, nn

from .attention import CrossAttention, MultiHeadAttention
from .feed_forward import FeedForward
from .key_value_cache import KeyValueCache, SourceKeys
from .layer_norm import LayerNorm
from .layout import TokenLayout
from .sublayers import apply_sublayers

SEEDS_PER_DECODER_LAYER = 5  # two attentions' weights, and the output of each of three sublayers


class DecoderLayer(nn.Module):
    """One layer of the decoder.

    Args:
        hidden_size, num_heads, intermediate_size: sizes; heads must divide hidden_size.
        activation: of the feed-forward network: "gelu" (erf), "gelu_tanh" or "relu".
        dropout: probability of dropping a value of a sublayer's output in training.
        attention_dropout: probability of dropping an attention weight in training.
        eps: of the LayerNorms.
        prenorm: LayerNorms before the sublayers, not after the sums.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: str = "relu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-6,
        prenorm: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.prenorm = prenorm
        self.attention = MultiHeadAttention(hidden_size, num_heads, attention_dropout, causal=True)
        self.attention_norm = LayerNorm(hidden_size, eps)
        self.cross_attention = CrossAttention(hidden_size, num_heads, attention_dropout)
        self.cross_attention_norm = LayerNorm(hidden_size, eps)
        self.feed_forward = FeedForward(hidden_size, intermediate_size, activation)
        self.feed_forward_norm = LayerNorm(hidden_size, eps)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        source: Tensor,
        source_layout: TokenLayout,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Target [T, hidden] and encoded source [T', hidden] -> [T, hidden].

        Args:
            x, layout: the target's tokens, and which belongs to which sequence.
            source, source_layout: the same of the source.
            seeds: int64 [SEEDS_PER_DECODER_LAYER] on x's device, for the dropouts; None lets each
                op draw its own.
        """
        self_seed, cross_seed, *output_seeds = (
            [None] * SEEDS_PER_DECODER_LAYER if seeds is None else seeds
        )
        return apply_sublayers(
            x,
            [
                (self.attention_norm, lambda h: self.attention(h, layout, self_seed)),
                (
                    self.cross_attention_norm,
                    lambda h: self.cross_attention(h, layout, source, source_layout, cross_seed),
                ),
                (self.feed_forward_norm, self.feed_forward),
            ],
            self.prenorm,
            self.dropout if self.training else 0.0,
            output_seeds,
            layout.dropout_rows,
        )

    def decode(self, x: Tensor, cache: KeyValueCache, source_keys: SourceKeys) -> Tensor:
        """[R, hidden] -> [R, hidden]: the newest token of each row, without dropout."""
        return apply_sublayers(
            x,
            [
                (self.attention_norm, lambda h: self.attention.decode(h, cache)),
                (
                    self.cross_attention_norm,
                    lambda h: self.cross_attention.decode(h, source_keys),
                ),
                (self.feed_forward_norm, self.feed_forward),
            ],
            self.prenorm,
        )
