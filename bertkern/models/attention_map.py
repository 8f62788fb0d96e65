"""What each token looks at: the attention probabilities of every head of every layer.

    A[l, h, i, j] = softmax_j(q_i · k_j / √D)      of layer l and head h, token i looking at token j

The fused attention never holds these; they are computed here from the queries and keys of a forward
pass, in float32 (float64 for a model in float64).

Legend: L layers, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertkern.nn.attention import MultiHeadAttention


@torch.inference_mode()
def attention_map(
    model: nn.Module, input_ids: Tensor, token_type_ids: Tensor | None = None
) -> Tensor:
    """The attention probabilities of one sequence, dropout off (Vaswani et al. 2017, section 3.2).

    Args:
        model: a BERT, with or without head; its mode stays as it was.
        input_ids: integer [S] or [1, S].
        token_type_ids: integer, shape of input_ids; None means type 0.

    Returns:
        float32 [L, H, S, S] on the model's device; rows add up to 1.

    Raises:
        ValueError: more than one sequence, or a sequence that the model refuses.
        TypeError: a model without attention layers.
    """
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
        token_type_ids = None if token_type_ids is None else token_type_ids[0]
    if input_ids.dim() != 1:
        raise ValueError(
            f"input_ids must be one sequence, [S] or [1, S], not {list(input_ids.shape)}"
        )
    attentions = [part for part in model.modules() if isinstance(part, MultiHeadAttention)]
    if not attentions:
        raise TypeError(f"{type(model).__name__} has no attention layers")
    maps: list[Tensor] = []
    hooks = [
        attention.qkv.register_forward_hook(
            lambda _, __, qkv, heads=attention.num_heads: maps.append(_probabilities(qkv, heads))
        )
        for attention in attentions
    ]
    encoder = getattr(model, "bert", model)  # a head would compute what nobody reads
    was_training = model.training
    model.eval()
    try:
        encoder(
            input_ids[None], token_type_ids=None if token_type_ids is None else token_type_ids[None]
        )
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def _probabilities(qkv: Tensor, heads: int) -> Tensor:
    """[S, 3 · H · D] -> [H, S, S]."""
    qkv = qkv if qkv.dtype == torch.float64 else qkv.float()
    q_HSD, k_HSD, _ = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    scale = q_HSD.shape[-1] ** -0.5
    return (q_HSD @ k_HSD.transpose(1, 2) * scale).softmax(-1)
