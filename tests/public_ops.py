"""Every public op as a function of its differentiable inputs, for the tests of what torch asks of
all of them alike.

Legend: n sequences, samples or rows, the dimension that tests vary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bertkern
from bertkern import ops

SEED = torch.tensor([7])
CU_SEQLENS = torch.tensor([0, 3, 8], dtype=torch.int32)
LENGTHS = torch.tensor([3, 6], dtype=torch.int32)
HOLES = torch.tensor(
    [[True, False, True, True, True, False], [False, True, True, True, True, True]]
)
IDS = torch.tensor([0, 3, 3, 1, 4])
TARGET = torch.tensor([4, -100, 0, 2, 1])


@dataclass(frozen=True)
class PublicOp:
    """An op with its options bound.

    Args:
        function: of the differentiable inputs.
        shapes: the inputs' shapes; n stands for the first dimension of the first `batched` ones.
        batched: how many of the inputs have a first dimension that may be n.
    """

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    batched: int = 0

    def inputs(self, n: int | None = None) -> list[Tensor]:
        """Fresh leaves; n replaces the first dimension of those that have one to vary."""
        return [
            torch.randn(
                (n, *shape[1:]) if n is not None and i < self.batched else shape,
                requires_grad=True,
            )
            for i, shape in enumerate(self.shapes)
        ]


_Q, _K = (2, 5, 2, 8), (2, 6, 2, 8)
_ROWS, _COLUMNS = (5, 8), (8,)

OPS = {
    "attention": PublicOp(
        lambda q, k, v: bertkern.attention(q, k, v, causal=True), (_Q, _K, _K), 3
    ),
    "attention with lengths": PublicOp(
        lambda q, k, v: bertkern.attention(q, k, v, key_lengths=LENGTHS), (_Q, _K, _K)
    ),
    "attention with holes and dropout": PublicOp(
        lambda q, k, v: bertkern.attention(
            q, k, v, key_padding_mask=HOLES, dropout_p=0.3, dropout_seed=SEED
        ),
        (_Q, _K, _K),
    ),
    "attention with bias": PublicOp(
        lambda q, k, v, bias: bertkern.attention(q, k, v, bias=bias, window=(2, 1)),
        (_Q, _K, _K, (1, 2, 5, 6)),
    ),
    "attention_varlen": PublicOp(
        lambda q, k, v: bertkern.attention_varlen(q, k, v, CU_SEQLENS, CU_SEQLENS, 5, 5),
        ((8, 2, 8),) * 3,
    ),
    "attention_decode": PublicOp(
        lambda q, k, v: bertkern.attention_decode(
            q, k, v, torch.arange(3, 3 + q.shape[0], dtype=torch.int32), window=(3, 0), softcap=2.0
        ),
        ((2, 4, 8), _K, _K),
        3,
    ),
    "scaled_dot_product_attention": PublicOp(
        bertkern.scaled_dot_product_attention, ((2, 2, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)), 3
    ),
    "layer_norm": PublicOp(bertkern.layer_norm, (_ROWS, _COLUMNS, _COLUMNS), 1),
    "dropout_add_layer_norm": PublicOp(
        lambda x, residual, weight, bias: bertkern.dropout_add_layer_norm(
            x, residual, weight, bias, 0.3, dropout_seed=SEED
        ),
        (_ROWS, _ROWS, _COLUMNS, _COLUMNS),
        2,
    ),
    "embedding_layer_norm": PublicOp(
        lambda word, position, types, weight, bias: bertkern.embedding_layer_norm(
            *(IDS, IDS, IDS % 2, word, position, types, weight, bias),
            *(1e-12, 0.3, SEED),
            padding_idx=3,
        ),
        (_ROWS, _ROWS, (2, 8), _COLUMNS, _COLUMNS),
    ),
    "dropout": PublicOp(lambda x: ops.dropout(x, 0.3, SEED), (_ROWS,), 1),
    "linear": PublicOp(
        lambda x, w, b, residual: bertkern.linear(
            x, w, b, activation="gelu", residual=residual, dropout_p=0.3, dropout_seed=SEED
        ),
        (_ROWS, (4, 8), (4,), (5, 4)),
    ),
    "ffn": PublicOp(
        lambda x, w1, b1, w2, b2: bertkern.ffn(x, w1, b1, w2, b2, dropout_p=0.3, dropout_seed=SEED),
        (_ROWS, (16, 8), (16,), (8, 16), (8,)),
        1,
    ),
    "linear_cross_entropy": PublicOp(
        lambda x, w, b: bertkern.linear_cross_entropy(x, w, b, TARGET, label_smoothing=0.1),
        (_ROWS, (5, 8), (5,)),
    ),
}
