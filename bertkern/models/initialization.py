"""Weights before training, as in the code of Devlin et al. (2018).

Matrices are drawn from N(0, std); LayerNorm weights are 1; all else, padding's embedding too, is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialize_parameter(name: str, parameter: Tensor, std: float) -> None:
    """Fill one parameter from torch's generator; `name` ends in norm.weight for a LayerNorm's."""
    if parameter.dim() == 2:
        parameter.normal_(std=std)
    else:
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def initialize(module: nn.Module, std: float) -> None:
    """Fill every parameter of a module, in the order of its parameters."""
    for name, parameter in module.named_parameters():
        initialize_parameter(name, parameter, std)
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx] = 0.0
