"""Drop-ins for other libraries. `torch` is here at once; `transformers` registers itself when it is
imported."""

from . import torch

__all__ = ["torch"]
