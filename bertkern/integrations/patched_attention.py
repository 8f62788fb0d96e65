"""Attention of transformers' BERT family that does not ask the registry for it, for
`bertkern.patch`. In transformers 4 most of it does not.

    by matmul and softmax                             attention, for encoders
    by torch's scaled_dot_product_attention           the class's own forward, inside `sdpa()`

Which modules get these classes: patched_transformers.py.

B batch, S sequence.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import ops
from ..ops.attention import MAX_HEAD_DIM
from .patched_bert_layers import Part
from .patched_torch import dropout_probability
from .torch import sdpa


class SelfAttention(Part):
    """softmax(q kᵀ / √D + mask) v, which transformers 4 computes by matmul and softmax."""

    WHAT = "attention"
    ARGUMENTS: ClassVar = {
        "hidden_states",
        "attention_mask",
        "head_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "past_key_value",
        "past_key_values",
        "output_attentions",
        "cache_position",
    }
    CHILDREN: ClassVar = {
        "query": (nn.Linear,),
        "key": (nn.Linear,),
        "value": (nn.Linear,),
        "dropout": (nn.Dropout,),
    }
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    num_attention_heads: int
    attention_head_size: int
    all_head_size: int
    position_embedding_type: str
    max_position_embeddings: int
    distance_embedding: nn.Embedding
    is_decoder: bool
    layer_idx: int
    transpose_for_scores: Callable[[Tensor], Tensor]

    @classmethod
    def obstacle_in(cls, module: nn.Module, class_of: Callable[[Any], type] = type) -> str | None:
        """As `Part.obstacle_in`, for an encoder without relative positions."""
        if module.position_embedding_type != "absolute":
            return f"its position_embedding_type is {module.position_embedding_type}"
        if module.is_decoder:
            return "it is a decoder's, computed without transformers' registry"
        head_dim: Any = module.attention_head_size
        if head_dim > MAX_HEAD_DIM:
            return f"its head dim is {head_dim}; at most {MAX_HEAD_DIM} are supported"
        return super().obstacle_in(module, class_of)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """x [B, S, hidden] -> ([B, S, hidden], None); the mask is added to the scores. The class's
        own forward computes what else may be asked for: weights, caches, cross attention."""
        more = [*args, *(value for name, value in kwargs.items() if name != "cache_position")]
        if self.obstacle() is not None or any(x is not None and x is not False for x in more):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        heads = (self.num_attention_heads, self.attention_head_size)
        q_BSHD, k_BSHD, v_BSHD = (
            ops.linear(hidden_states, dense.weight, dense.bias).unflatten(-1, heads)
            for dense in (self.query, self.key, self.value)
        )
        out = ops.attention(
            q_BSHD,
            k_BSHD,
            v_BSHD,
            bias=attention_mask,
            dropout_p=dropout_probability(self.dropout),
        )
        return out.flatten(2), None


class RoutedAttention(Part):
    """An attention that calls torch's scaled_dot_product_attention: the class's own forward, in
    which that is `bertkern.scaled_dot_product_attention`."""

    WHAT = "attention"
    CHILDREN: ClassVar = {}

    @classmethod
    def obstacle_in(cls, module: nn.Module, class_of: Callable[[Any], type] = type) -> str | None:
        """As `Part.obstacle_in`: relative positions are computed without torch's function."""
        positions = getattr(module, "position_embedding_type", "absolute")
        return None if positions == "absolute" else f"its position_embedding_type is {positions}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments and the output of the class's own forward."""
        with sdpa():
            return super().forward(*args, **kwargs)
