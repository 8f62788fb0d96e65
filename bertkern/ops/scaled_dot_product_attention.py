"""`torch.nn.functional.scaled_dot_product_attention` on these kernels: its signature and its
meaning."""

import torch
from torch import Tensor

from ..reference.attention import CAUSAL_NONE, CAUSAL_TOP_LEFT
from . import _arguments as arguments
from .attention import attend

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax(scale · query keyᵀ) value with torch's layout, `[..., S, D]` with H as the dimension
    before.

    Args:
        query: [B, H, Sq, D], [H, Sq, D] or [Sq, D], any strides. Leading dimensions broadcast.
        key, value: [B, H, Sk, D].
        attn_mask, enable_gqa: not supported yet.
        dropout_p: applied whenever it is above 0, as torch does.
        is_causal: query i sees keys j ≤ i (aligned to the top left, as torch does).
        scale: None is 1/√D.

    Returns:
        [B, H, Sq, D] in query's dtype (a transposed view of a contiguous [B, Sq, H, D]).

    Raises:
        ValueError, TypeError, NotImplementedError: naming the argument, its value and those
            allowed.
    """
    if attn_mask is not None:
        raise NotImplementedError(
            f"{_OP}: attn_mask={attn_mask.dtype} {list(attn_mask.shape)} is not supported yet; "
            "for padding use bertkern.attention(key_lengths=...) or bertkern.attention_varlen"
        )
    if enable_gqa:
        raise NotImplementedError(f"{_OP}: enable_gqa=True is not supported yet; use False")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.check_tensor(_OP, name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{_OP}: {name} has shape {list(tensor.shape)}; it needs at least [S, D]"
            )
    query, key, value = arguments.to_autocast_dtype(query, key, value)  # type: ignore[assignment]
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        raise ValueError(
            f"{_OP}: query, key and value have head dims {query.shape[-1]}, {key.shape[-1]} and "
            f"{value.shape[-1]}; they must be equal"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{_OP}: value has {value.shape[-2]} rows; it must have key's, {key.shape[-2]}"
        )
    try:
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError as error:
        raise ValueError(
            f"{_OP}: query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)} have "
            "leading dimensions that do not broadcast"
        ) from error
    heads = leading[-1] if leading else 1
    batch = torch.Size(leading[:-1]).numel()
    q, k, v = (
        t.expand(*leading, *t.shape[-2:]).reshape(batch, heads, *t.shape[-2:]).transpose(1, 2)
        for t in (query, key, value)
    )
    out, _ = attend(
        _OP,
        q,
        k,
        v,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        causal=CAUSAL_TOP_LEFT if is_causal else CAUSAL_NONE,
        dropout_p=dropout_p,
        dropout_seed=None,
        scale=scale,
        sequence_offset=0,
    )
    return out.transpose(1, 2).reshape(*leading, *query.shape[-2:])
