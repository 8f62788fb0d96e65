"""The ops: one file each, with its equation, public function, registration, shapes and backward.

`_backend.py` chooses who computes; `_cpu.py` and `_cuda.py` hand tensors to the compiled extension;
`_registration.py` and `_arguments.py` are what the op files share.
"""

from ._backend import backend
from .attention import attention, attention_varlen
from .attention_decode import attention_decode
from .dropout import dropout
from .dropout_add_layer_norm import dropout_add_layer_norm
from .embedding_layer_norm import embedding_layer_norm
from .ffn import ffn
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .scaled_dot_product_attention import scaled_dot_product_attention

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "backend",
    "dropout",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "ffn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]
