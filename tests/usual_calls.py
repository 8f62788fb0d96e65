"""Well-formed calls of every op that has a shortcut (`usual_call`), for the tests of what it says.

Legend: B batch, S queries, T keys, H heads, G key heads, D head dim, R rows, N columns; p dropout.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import bertkern

B, S, T, H, G, D = 2, 3, 5, 4, 2, 8
ROWS, N, K, F, CLASSES = (2, 3), 4, 6, 5, 7
P = 0.3


@dataclass(frozen=True)
class UsualCall:
    """A call with its options bound.

    Args:
        op: the name of its module.
        function: of the tensors, in the order of the pattern.
        tensors: fresh ones by name; None for one that is absent.
        matcher: the name in the module.
    """

    op: str
    function: Callable[..., Any]
    tensors: Callable[[], dict[str, Tensor | None]]
    matcher: str = "_usual"

    @property
    def module(self) -> ModuleType:
        """What the shortcut is looked up in."""
        return importlib.import_module(f"bertkern.ops.{self.op}")

    def answer(self, *tensors: Any) -> int:
        """What the shortcut says."""
        return getattr(self.module, self.matcher)(*tensors)


def _seed() -> Tensor:
    return torch.tensor([7])


def _rows(count: int) -> Tensor:
    return torch.arange(count).flip(0) * 3


def _attention(**changes: Tensor | None) -> dict[str, Tensor | None]:
    tensors = {
        "q": torch.randn(B, S, H, D),
        "k": torch.randn(B, T, G, D),
        "v": torch.randn(B, T, G, D),
        "bias": torch.randn(B, H, S, T),
        "key_padding_mask": torch.tensor([[True, False, True, True, True], [True] * T]),
        "key_lengths": torch.tensor([4, 5], dtype=torch.int32),
        "dropout_seed": _seed(),
    }
    return {**tensors, **changes}


def _attention_call(q, k, v, bias, key_padding_mask, key_lengths, seed):
    return bertkern.attention(
        q,
        k,
        v,
        bias=bias,
        key_padding_mask=key_padding_mask,
        key_lengths=key_lengths,
        dropout_p=P,
        dropout_seed=seed,
        return_lse=True,
    )


def _varlen() -> dict[str, Tensor | None]:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    return {
        **{name: torch.randn(5, 2, D) for name in "qkv"},
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens.clone(),
        "dropout_seed": _seed(),
    }


def _sdpa(mask: Tensor | None, heads: int = G) -> dict[str, Tensor | None]:
    return {
        "query": torch.randn(B, H, S, D),
        "key": torch.randn(B, heads, T, D),
        "value": torch.randn(B, heads, T, D),
        "attn_mask": mask,
    }


def _embedding() -> dict[str, Tensor | None]:
    return {
        "ids": torch.tensor([[0, 3, 3], [1, 4, 0]]),
        "position_ids": torch.tensor([[0, 1, 2], [0, 1, 2]], dtype=torch.int32),
        "type_ids": torch.tensor([[0, 1, 1], [0, 0, 1]]),
        "word": torch.randn(5, N),
        "position": torch.randn(3, N),
        "type": torch.randn(2, N),
        "weight": torch.randn(N),
        "bias": torch.randn(N),
        "dropout_seed": _seed(),
        "dropout_rows": _rows(6),
    }


CALLS = {
    "attention": UsualCall("attention", _attention_call, _attention),
    "attention with a mask and drawn dropout": UsualCall(
        "attention",
        _attention_call,
        lambda: _attention(bias=torch.rand(1, H, 1, T) > 0.3, dropout_seed=None),
    ),
    "attention_varlen": UsualCall(
        "attention",
        lambda q, k, v, cu_q, cu_k, seed: bertkern.attention_varlen(
            *(q, k, v, cu_q, cu_k, 3, 3), causal=True, dropout_p=P, dropout_seed=seed
        ),
        _varlen,
        "_usual_varlen",
    ),
    "sdpa with a float mask": UsualCall(
        "scaled_dot_product_attention",
        lambda *tensors: bertkern.scaled_dot_product_attention(*tensors, 0.0, enable_gqa=True),
        lambda: _sdpa(torch.randn(1, H, S, T)),
    ),
    "sdpa with padding and drawn dropout": UsualCall(
        "scaled_dot_product_attention",
        lambda *tensors: bertkern.scaled_dot_product_attention(*tensors, P),
        lambda: _sdpa(torch.rand(B, 1, 1, T) > 0.3, heads=H),
    ),
    "layer_norm": UsualCall(
        "layer_norm",
        bertkern.layer_norm,
        lambda: {
            "x": torch.randn(*ROWS, N),
            "weight": torch.randn(N).bfloat16(),
            "bias": torch.randn(N),
        },
    ),
    "dropout_add_layer_norm": UsualCall(
        "dropout_add_layer_norm",
        lambda x, residual, weight, bias, seed, rows: bertkern.dropout_add_layer_norm(
            x, residual, weight, bias, P, 1e-12, True, seed, dropout_rows=rows
        ),
        lambda: {
            "x": torch.randn(*ROWS, N),
            "residual": torch.randn(*ROWS, N),
            "weight": torch.randn(N),
            "bias": torch.randn(N),
            "dropout_seed": _seed(),
            "dropout_rows": _rows(6),
        },
    ),
    "linear": UsualCall(
        "linear",
        lambda x, w, b, residual, seed, rows: bertkern.linear(
            *(x, w, b),
            activation="gelu",
            residual=residual,
            dropout_p=P,
            dropout_seed=seed,
            dropout_rows=rows,
        ),
        lambda: {
            "x": torch.randn(*ROWS, K),
            "w": torch.randn(N, K),
            "b": torch.randn(N),
            "residual": torch.randn(*ROWS, N),
            "dropout_seed": _seed(),
            "dropout_rows": _rows(6),
        },
    ),
    "ffn": UsualCall(
        "ffn",
        lambda x, w1, b1, w2, b2, seed, rows: bertkern.ffn(
            x, w1, b1, w2, b2, "gelu", P, seed, dropout_rows=rows
        ),
        lambda: {
            "x": torch.randn(*ROWS, K),
            "w1": torch.randn(F, K),
            "b1": torch.randn(F),
            "w2": torch.randn(N, F),
            "b2": torch.randn(N),
            "dropout_seed": _seed(),
            "dropout_rows": _rows(6),
        },
    ),
    "ffn with drawn dropout": UsualCall(
        "ffn",
        lambda *tensors: bertkern.ffn(*tensors[:5], "relu", P),
        lambda: {
            "x": torch.randn(4, K),
            "w1": torch.randn(F, K),
            "b1": None,
            "w2": torch.randn(N, F),
            "b2": None,
            "dropout_seed": None,
            "dropout_rows": None,
        },
    ),
    "linear_cross_entropy": UsualCall(
        "linear_cross_entropy",
        lambda *tensors: bertkern.linear_cross_entropy(*tensors, reduction="none"),
        lambda: {
            "x": torch.randn(*ROWS, K),
            "weight": torch.randn(CLASSES, K),
            "bias": torch.randn(CLASSES),
            "target": torch.tensor([[4, -100, 0], [6, 2, 1]]),
        },
    ),
    "embedding_layer_norm": UsualCall(
        "embedding_layer_norm",
        lambda *tensors: bertkern.embedding_layer_norm(
            *tensors[:8], 1e-12, P, tensors[8], dropout_rows=tensors[9], padding_idx=3
        ),
        _embedding,
    ),
}
