"""Multi-head self-attention on unpadded tokens (Vaswani et al. 2017, section 3.2).

    [q, k, v] = x W_qkvᵀ + b_qkv,   out = concat_heads(dropout(softmax(q kᵀ / √D)) v) W_outᵀ + b_out

Legend: T tokens of B sequences, H heads, D head dim, hidden = H · D.
"""

from typing import cast

from torch import Tensor, nn

from bertkern import ops

from .layout import TokenLayout
from .linear import Linear


class MultiHeadAttention(nn.Module):
    """Self-attention in which a token sees all tokens of its own sequence.

    The three input projections are one packed parameter: rows 0..hidden-1 of `qkv` give q, then k,
    then v.

    Args:
        hidden_size: H · D.
        num_heads: H; must divide hidden_size.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.output = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, layout: TokenLayout, dropout_seed: Tensor | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden], after the output projection, before dropout and residual."""
        head_dim = x.shape[1] // self.num_heads
        qkv_T3HD = self.qkv(x).unflatten(1, (3, self.num_heads, head_dim))
        q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
        out_THD = ops.attention_varlen(
            q_THD,
            k_THD,
            v_THD,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed=dropout_seed,
            sequence_offset=layout.sequence_offset,
        )
        return self.output(cast(Tensor, out_THD).flatten(1))
