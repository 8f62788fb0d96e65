"""The ops: one file each, with its equation, public function, registration, shapes and backward.

`_backend.py` chooses who computes; `_cpu.py` and `_cuda.py` hand tensors to the compiled extension;
`_registration.py` and `_arguments.py` are what the op files share.
"""

from ._backend import backend
from .attention import attention, attention_varlen
from .dropout import dropout
from .dropout_add_layer_norm import dropout_add_layer_norm
from .ffn import ffn
from .layer_norm import layer_norm
from .linear import linear
from .scaled_dot_product_attention import scaled_dot_product_attention

__all__ = [
    "attention",
    "attention_varlen",
    "backend",
    "dropout",
    "dropout_add_layer_norm",
    "ffn",
    "layer_norm",
    "linear",
    "scaled_dot_product_attention",
]
