"""Multi-head attention on unpadded tokens (Vaswani et al. 2017, section 3.2).

    self    [q, k, v] = x W_qkvᵀ + b_qkv
    cross   q = x W_qᵀ + b_q,   [k, v] = source W_kvᵀ + b_kv
    both    out = concat_heads(dropout(softmax(q kᵀ / √D)) v) W_outᵀ + b_out

In generation, `decode` computes the newest token of each row alone, over keys and values that are
kept (`key_value_cache.py`).

Legend: T tokens of B sequences, H heads, D head dim, hidden = H · D; R rows of generation, several
for a sequence in beam search.
"""

from typing import cast

from torch import Tensor, nn

from bertkern import ops

from .key_value_cache import KeyValueCache, SourceKeys
from .layout import TokenLayout
from .linear import Linear


class MultiHeadAttention(nn.Module):
    """Self-attention in which a token sees the tokens of its own sequence.

    The three input projections are one packed parameter: rows 0..hidden-1 of `qkv` give q, then k,
    then v.

    Args:
        hidden_size: H · D.
        num_heads: H; must divide hidden_size.
        dropout: probability of dropping an attention weight in training.
        causal: a token sees itself and those before it; else all.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        _check_heads(hidden_size, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.causal = causal
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
            causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed=dropout_seed,
            sequence_offset=layout.sequence_offset,
        )
        return self.output(cast(Tensor, out_THD).flatten(1))

    def decode(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """[R, hidden] -> [R, hidden]: a token more of each row; its key and value are kept."""
        head_dim = x.shape[1] // self.num_heads
        q_RHD, k_RHD, v_RHD = self.qkv(x).unflatten(1, (3, self.num_heads, head_dim)).unbind(1)
        cache.append(k_RHD, v_RHD)
        out_RHD = ops.attention_decode(q_RHD, cache.k, cache.v, cache.lengths)
        return self.output(out_RHD.flatten(1))


class CrossAttention(nn.Module):
    """Attention of a target's tokens to all tokens of the source that it belongs to.

    The two projections of the source are one packed parameter: rows 0..hidden-1 of `kv` give k,
    then v.

    Args:
        hidden_size: H · D, of target and source.
        num_heads: H; must divide hidden_size.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        _check_heads(hidden_size, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Linear(hidden_size, hidden_size)
        self.kv = Linear(hidden_size, 2 * hidden_size)
        self.output = Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        source: Tensor,
        source_layout: TokenLayout,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Target [T, hidden] and source [T', hidden] of the same B sequences -> [T, hidden]."""
        head_dim = x.shape[1] // self.num_heads
        k_THD, v_THD = self._project_source(source)
        out_THD = ops.attention_varlen(
            self.query(x).unflatten(1, (self.num_heads, head_dim)),
            k_THD,
            v_THD,
            layout.cu_seqlens,
            source_layout.cu_seqlens,
            layout.max_seqlen,
            source_layout.max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed=dropout_seed,
            sequence_offset=layout.sequence_offset,
        )
        return self.output(cast(Tensor, out_THD).flatten(1))

    def keys_of(self, source: Tensor, source_layout: TokenLayout) -> SourceKeys:
        """What `decode` needs of the source [T', hidden], computed once for all its steps."""
        k_THD, v_THD = self._project_source(source)
        return SourceKeys(
            source_layout.by_sequence(k_THD, 0.0),
            source_layout.by_sequence(v_THD, 0.0),
            source_layout.cu_seqlens.diff(),
        )

    def decode(self, x: Tensor, keys: SourceKeys) -> Tensor:
        """[R, hidden] -> [R, hidden]; R = B · beams, the beams of a sequence one after another.

        The beams of a sequence are more query heads over its one set of keys: none is copied.
        """
        batch, head_dim = keys.k.shape[0], x.shape[1] // self.num_heads
        beams = x.shape[0] // batch if batch else 1
        q_BnHD = self.query(x).unflatten(1, (self.num_heads, head_dim)).unflatten(0, (batch, beams))
        q_BhD = q_BnHD.transpose(1, 2).flatten(1, 2)  # h: head, then beam
        out_BhD = ops.attention_decode(q_BhD, keys.k, keys.v, keys.lengths)
        out_BnHD = out_BhD.unflatten(1, (self.num_heads, beams)).transpose(1, 2)
        return self.output(out_BnHD.flatten(0, 1).flatten(1))

    def _project_source(self, source: Tensor) -> tuple[Tensor, ...]:
        head_dim = source.shape[1] // self.num_heads
        return self.kv(source).unflatten(1, (2, self.num_heads, head_dim)).unbind(1)


def _check_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
