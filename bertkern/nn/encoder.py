"""Transformer encoder layer on unpadded tokens (Vaswani et al. 2017, BERT).

    h = LayerNorm(x + dropout(attention(x)))
    y = LayerNorm(h + dropout(feed_forward(h)))

or with the LayerNorms before the sublayers (`sublayers.py`).

Legend: T tokens of a batch without padding.
"""

from torch import Tensor, nn

from .attention import MultiHeadAttention
from .feed_forward import FeedForward
from .layer_norm import LayerNorm
from .layout import TokenLayout
from .sublayers import apply_sublayers

SEEDS_PER_LAYER = 3  # attention weights, and the output of each of the two sublayers


class EncoderLayer(nn.Module):
    """One layer of the encoder.

    Args:
        hidden_size, num_heads, intermediate_size: sizes; heads must divide hidden_size.
        activation: of the feed-forward network: "gelu" (erf), "gelu_tanh" or "relu".
        dropout: probability of dropping a value of a sublayer's output in training.
        attention_dropout: probability of dropping an attention weight in training.
        eps: of both LayerNorms.
        prenorm: LayerNorms before the sublayers, not after the sums.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-12,
        prenorm: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.prenorm = prenorm
        self.attention = MultiHeadAttention(hidden_size, num_heads, attention_dropout)
        self.attention_norm = LayerNorm(hidden_size, eps)
        self.feed_forward = FeedForward(hidden_size, intermediate_size, activation)
        self.feed_forward_norm = LayerNorm(hidden_size, eps)

    def forward(self, x: Tensor, layout: TokenLayout, seeds: Tensor | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden].

        Args:
            x: the tokens.
            layout: which token belongs to which sequence.
            seeds: int64 [SEEDS_PER_LAYER] on x's device, for the dropouts; None lets each op draw
                its own.
        """
        attention_seed, *output_seeds = [None] * SEEDS_PER_LAYER if seeds is None else seeds
        return apply_sublayers(
            x,
            [
                (self.attention_norm, lambda h: self.attention(h, layout, attention_seed)),
                (self.feed_forward_norm, self.feed_forward),
            ],
            self.prenorm,
            self.dropout if self.training else 0.0,
            output_seeds,
            layout.dropout_rows,
        )
