"""Sublayers with their residual connections and LayerNorms, before or after them.

    post-LN   x = LayerNorm_i(x + dropout(f_i(x)))      for each i    (Vaswani et al. 2017)
    pre-LN    x = x + dropout(f_i(LayerNorm_i(x)))      for each i    (Xiong et al. 2020)

Either way a sum and the LayerNorm that follows it are one pass over memory.

Legend: T tokens.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from bertkern import ops

from .layer_norm import LayerNorm

Sublayer = tuple[LayerNorm, Callable[[Tensor], Tensor]]


def apply_sublayers(
    x: Tensor,
    sublayers: Sequence[Sublayer],
    prenorm: bool,
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | None] | None = None,
    dropout_rows: Tensor | None = None,
) -> Tensor:
    """[T, hidden] -> [T, hidden].

    Args:
        x: the tokens.
        sublayers: each one's LayerNorm and function.
        prenorm: whether the LayerNorms stand before the functions.
        dropout_p: probability of dropping a value that a function gives.
        seeds: of the dropout of each; None draws them.
        dropout_rows: int64 [T], each token's row in dropout's masks.
    """
    seeds = [None] * len(sublayers) if seeds is None else seeds
    if not prenorm:
        for (norm, function), seed in zip(sublayers, seeds, strict=True):
            x = norm.add(function(x), x, dropout_p, seed, dropout_rows)
        return x
    normed = sublayers[0][0](x)
    for i, (_, function) in enumerate(sublayers[:-1]):
        next_norm = sublayers[i + 1][0]
        normed, x = next_norm.add_and_sum(function(normed), x, dropout_p, seeds[i], dropout_rows)
    y = sublayers[-1][1](normed)
    return x + ops.dropout(y, dropout_p, seeds[-1], dropout_rows=dropout_rows)
