"""Activations of the feed-forward network and their derivatives.

gelu(z) = z · Φ(z),  gelu'(z) = Φ(z) + z · φ(z)      (Hendrycks & Gimpel 2016; Φ by erf, exact)
gelu_tanh(z) = z/2 · (1 + tanh(√(2/π)(z + 0.044715 z³)))
relu(z) = max(z, 0)
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z), elementwise; "" is the identity."""
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "relu":
        return F.relu(z)
    return z


def activation_derivative(z: Tensor, activation: str) -> Tensor:
    """act'(z), elementwise, differentiable."""
    if activation == "gelu":
        cdf = 0.5 * torch.erfc(-z * math.sqrt(0.5))
        return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    return torch.ones_like(z)
