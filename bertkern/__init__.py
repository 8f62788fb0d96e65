"""bertkern: fused attention, LayerNorm and feed-forward kernels for encoder models, and BERT on
top.

The ops are public here. Models are in `bertkern.models`, modules in `bertkern.nn`, drop-ins in
`bertkern.integrations`, and `bertkern.patch(model)` puts the ops into a model of torch or
transformers; `bertkern.info()` says what can be used on this machine.
"""

from ._version import __version__
from .info import info
from .integrations.patching import patch, unpatch
from .ops import (
    attention,
    attention_decode,
    attention_varlen,
    backend,
    dropout_add_layer_norm,
    embedding_layer_norm,
    ffn,
    layer_norm,
    linear,
    linear_cross_entropy,
    scaled_dot_product_attention,
)

__all__ = [
    "__version__",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backend",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "ffn",
    "info",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "patch",
    "scaled_dot_product_attention",
    "unpatch",
]
