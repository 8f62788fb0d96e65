"""Modules on unpadded tokens: attention, feed-forward, LayerNorm, embeddings, the layers.

Each is a thin owner of parameters around one op of `bertkern.ops`. Tokens are [T, hidden]; a
`TokenLayout` says which token belongs to which sequence, and turns padded batches into tokens and
back.
"""

from .attention import CrossAttention, MultiHeadAttention
from .decoder import DecoderLayer
from .embeddings import BertEmbeddings
from .encoder import EncoderLayer
from .feed_forward import FeedForward
from .key_value_cache import KeyValueCache, SourceKeys
from .layer_norm import LayerNorm
from .layout import TokenLayout, packed_layout, padded_layout
from .linear import Linear
from .positions import SinusoidalPositions, sinusoidal_positions

__all__ = [
    "BertEmbeddings",
    "CrossAttention",
    "DecoderLayer",
    "EncoderLayer",
    "FeedForward",
    "KeyValueCache",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "SinusoidalPositions",
    "SourceKeys",
    "TokenLayout",
    "packed_layout",
    "padded_layout",
    "sinusoidal_positions",
]
