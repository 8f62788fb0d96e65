"""Modules on unpadded tokens: attention, feed-forward, LayerNorm, embeddings, encoder layer.

Each is a thin owner of parameters around one op of `bertkern.ops`. Tokens are [T, hidden]; a
`TokenLayout` says which token belongs to which sequence, and turns padded batches into tokens and
back.
"""

from .attention import MultiHeadAttention
from .embeddings import BertEmbeddings
from .encoder import EncoderLayer
from .feed_forward import FeedForward
from .layer_norm import LayerNorm
from .layout import TokenLayout, packed_layout, padded_layout
from .linear import Linear

__all__ = [
    "BertEmbeddings",
    "EncoderLayer",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "TokenLayout",
    "packed_layout",
    "padded_layout",
]
