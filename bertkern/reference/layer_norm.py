"""LayerNorm, alone and with the dropout and residual addition that precede it (Ba et al. 2016).

    x̂ = (x − mean) · rstd,  rstd = 1/√(var + eps),  y = x̂ · weight + bias          rows of x
    [rows, cols]
    dropout_add: z = residual + dropout(x),  y = LayerNorm(z)

Backward, with g = dy · weight:  dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),
dweight = Σ_rows dy · x̂,  dbias = Σ_rows dy.
"""

import torch
from torch import Tensor

from .dropout import dropout


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x − mean, mean [rows]) in the statistics' dtype.

    The mean is taken twice: the rounding of the first, large beside a small variance, is the mean
    of what it leaves behind.
    """
    x = x.to(statistics_dtype(x))
    mean = x.mean(-1, keepdim=True)
    left = (x - mean).mean(-1, keepdim=True)
    return (x - mean) - left, (mean + left)[:, 0]


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂, mean [rows], rstd [rows]) in the statistics' dtype."""
    centred, mean = _centre(x)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    return centred * rstd[:, None], mean, rstd


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    y, mean, rstd = _normalize(x, eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias). The statistics are functions of x, so that this can be differentiated
    again."""
    centred, _ = _centre(x)
    var = centred.square().mean(-1)
    # eps is what the saved rstd holds beyond the variance: the value is the saved one, the slope is
    # x's.
    rstd = torch.rsqrt(var + (rstd.detach() ** -2 - var.detach()))
    normalized = centred * rstd[:, None]
    dy = dy.to(normalized.dtype)
    g = dy if weight is None else dy * weight
    dx = rstd[:, None] * (
        g - g.mean(-1, keepdim=True) - normalized * (g * normalized).mean(-1, keepdim=True)
    )
    dweight = None if weight is None else (dy * normalized).sum(0).to(weight.dtype)
    dbias = None if bias is None else dy.sum(0).to(bias.dtype)
    return dx.to(x.dtype), dweight, dbias


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, z, mean, rstd)."""
    dropped = x if dropout_seed is None else dropout(x, dropout_p, dropout_seed, dropout_rows)
    z = residual + dropped
    return layer_norm_fwd(z, weight, bias, eps)[0], z, *_normalize(z, eps)[1:]


def dropout_add_layer_norm_bwd(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias); dz is the gradient that reaches z itself, or None."""
    dresidual, dweight, dbias = layer_norm_bwd(dy, z, weight, bias, mean, rstd)
    if dz is not None:
        dresidual = dresidual + dz
    dx = dresidual
    if dropout_seed is not None:
        dx = dropout(dx, dropout_p, dropout_seed, dropout_rows)
    return dx, dresidual, dweight, dbias
