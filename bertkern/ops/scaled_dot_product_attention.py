"""`torch.nn.functional.scaled_dot_product_attention` on these kernels: its signature and its
meaning."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from ..reference.attention import CAUSAL_BOTTOM_RIGHT, CAUSAL_NONE, CAUSAL_TOP_LEFT
from . import _arguments as arguments
from ._registration import UNUSUAL, usual_call
from .attention import attend, bias_matrices

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
    """Softmax(scale · query keyᵀ + mask) value with torch's layout, `[..., S, D]` with H as the
    dimension before.

    Args:
        query: [B, H, Sq, D], [H, Sq, D] or [Sq, D], any strides. Leading dimensions broadcast.
        key: [B, Hk, Sk, D]; value: [B, Hk, Sk, Dv]. Where Dv is not D, the narrower tensors are
            filled up with zeros in a copy.
        attn_mask: broadcasts to [B, H, Sq, Sk]; bool (True: attend) or query's dtype or float32
            (added to the scores), with a gradient. A bool mask that differs by key alone, as
            padding does, is taken as a key padding mask, which is cheaper; a causal bias of
            `torch.nn.attention.bias`, as the causal mask that it means.
        dropout_p: applied whenever it is above 0, as torch does.
        is_causal: query i sees keys j ≤ i (aligned to the top left, as torch does); not together
            with attn_mask.
        scale: None is 1/√D.
        enable_gqa: H may be a multiple of Hk; query head h reads key head h // (H / Hk).

    Returns:
        [B, H, Sq, Dv] in query's dtype, in memory a contiguous [B, Sq, H, Dv]. A query that sees no
        key gives 0.

    Raises:
        ValueError, TypeError: naming the argument, its value and those allowed.
    """
    if attn_mask is not None and is_causal:
        raise ValueError(f"{_OP}: is_causal=True with an attn_mask; give one of the two")
    causal = CAUSAL_TOP_LEFT if is_causal else CAUSAL_NONE
    if type(attn_mask) not in (Tensor, Parameter, type(None)):
        causal, attn_mask = _causal_bias(attn_mask, causal, query, key)
    if arguments.autocasts(query):
        query, key, value, attn_mask = arguments.to_autocast_dtype(  # type: ignore[assignment]
            query, key, value, attn_mask
        )
    usual = _usual(query, key, value, attn_mask)
    if usual != UNUSUAL and (enable_gqa or key.shape[1] == query.shape[1]):
        bias, key_padding_mask = _mask(attn_mask, query.shape[0], key.shape[2])
        return _attend(query, key, value, bias, key_padding_mask, causal, dropout_p, scale, usual)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.check_tensor(_OP, name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{_OP}: {name} has shape {list(tensor.shape)}; it needs at least [S, D]"
            )
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if key.shape[-1] != head_dim:
        raise ValueError(
            f"{_OP}: query and key have head dims {head_dim} and {key.shape[-1]}; they must be "
            "equal"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{_OP}: value has {value.shape[-2]} rows; it must have key's, {key.shape[-2]}"
        )
    if scale is None and head_dim:
        scale = 1.0 / math.sqrt(head_dim)
    widest = max(head_dim, value_dim)
    if head_dim != value_dim:
        query, key, value = (_widened(t, widest) for t in (query, key, value))
    leading, key_leading = _leading(query, key, value, enable_gqa)
    heads, batch = (leading or (1,))[-1], math.prod(leading[:-1])
    q, k, v = _BHSD(query, leading), _BHSD(key, key_leading), _BHSD(value, key_leading)
    attn_mask = _matrices(attn_mask, q, leading, (batch, heads, q.shape[2], k.shape[2]))
    bias, key_padding_mask = _mask(attn_mask, batch, k.shape[2])
    out = _attend(q, k, v, bias, key_padding_mask, causal, dropout_p, scale)
    if len(leading) != 2:
        out = out.reshape(*leading, q.shape[2], widest)
    return out if value_dim == widest else out[..., :value_dim]


_usual = usual_call("x[b h s d], x[b g t d], x[b g t d], mask?[b|1 h|1 s|1 t|1]")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: int,
    dropout_p: float,
    scale: float | None,
    usual: int = UNUSUAL,
) -> Tensor:
    """The op on [B, H, S, D]."""
    (out,) = attend(
        _OP,
        q,
        k,
        v,
        bias=bias,
        key_padding_mask=key_padding_mask,
        max_seqlen_q=q.shape[2],
        max_seqlen_k=k.shape[2],
        causal=causal,
        dropout_p=dropout_p,
        dropout_seed=None,
        scale=scale,
        sequence_offset=0,
        heads_first=True,
        usual=usual,
    )
    return out


def _causal_bias(
    attn_mask: Any, causal: int, query: Tensor, key: Tensor
) -> tuple[int, Tensor | None]:
    """(causal, attn_mask) of a `torch.nn.attention.bias.CausalBias`, a tensor that holds sizes and
    no values; of anything else, as they are."""
    from torch.nn.attention.bias import CausalBias, CausalVariant  # a quarter second to import

    if not isinstance(attn_mask, CausalBias):
        return causal, attn_mask
    sizes = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
    if sizes != (query.shape[-2], key.shape[-2]):
        raise ValueError(
            f"{_OP}: attn_mask is a causal bias of {list(sizes)}; query and key have "
            f"{[query.shape[-2], key.shape[-2]]} rows"
        )
    top_left = attn_mask.variant == CausalVariant.UPPER_LEFT
    return CAUSAL_TOP_LEFT if top_left else CAUSAL_BOTTOM_RIGHT, None


def _BHSD(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """[..., S, D], whose leading dimensions broadcast to `leading`, as [B, H, S, D]."""
    if len(leading) == 2 and tensor.shape[:-2] == leading:
        return tensor
    size = tensor.shape[-2:]
    tensor = tensor.expand(*leading, *size)
    return tensor.reshape(math.prod(leading[:-1]), (leading or (1,))[-1], *size)


def _widened(tensor: Tensor, head_dim: int) -> Tensor:
    return tensor if tensor.shape[-1] == head_dim else pad(tensor, (0, head_dim - tensor.shape[-1]))


def _leading(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The leading dimensions of query, and those of key and value, after broadcasting. With
    enable_gqa the heads, the last of them, do not broadcast."""
    shapes = [query.shape[:-2], key.shape[:-2], value.shape[:-2]]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0], shapes[0]
    apart = enable_gqa and all(shapes)
    try:
        if not apart:
            together = tuple(torch.broadcast_shapes(*shapes))
            return together, together
        outer = tuple(torch.broadcast_shapes(*(shape[:-1] for shape in shapes)))
    except RuntimeError as error:
        raise ValueError(
            f"{_OP}: query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)} have leading dimensions that do not broadcast"
            + ("" if enable_gqa else " (enable_gqa=True shares key heads among query heads)")
        ) from error
    if shapes[1][-1] != shapes[2][-1]:
        raise ValueError(
            f"{_OP}: value has {shapes[2][-1]} heads; it must have key's, {shapes[1][-1]}"
        )
    return (*outer, shapes[0][-1]), (*outer, shapes[1][-1])


def _matrices(
    attn_mask: Tensor | None, q: Tensor, leading: tuple[int, ...], sizes: tuple[int, int, int, int]
) -> Tensor | None:
    """The mask as [B or 1, H or 1, Sq or 1, Sk or 1]."""
    if isinstance(attn_mask, Tensor) and len(leading) > 2 and attn_mask.dim() > 3:
        # [..., H, Sq, Sk] -> [B, H, Sq, Sk]: a batch of several dimensions is copied if it
        # broadcasts.
        outer = attn_mask.shape[:-3]
        if any(size != 1 for size in outer):
            try:
                attn_mask = attn_mask.expand(*leading[:-1], *attn_mask.shape[-3:])
            except RuntimeError as error:
                raise ValueError(
                    f"{_OP}: attn_mask has shape {list(attn_mask.shape)}; it must broadcast to "
                    f"{[*leading, *sizes[2:]]}"
                ) from error
        attn_mask = attn_mask.reshape(math.prod(attn_mask.shape[:-3]), *attn_mask.shape[-3:])
    return bias_matrices(_OP, "attn_mask", attn_mask, q, sizes)


def _mask(attn_mask: Tensor | None, batch: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """(bias, key_padding_mask [B, Sk]): one of them, or none; of [B or 1, H or 1, Sq or 1, Sk or
    1]."""
    if attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.shape[1:3] == (1, 1):
        return None, attn_mask[:, 0, 0].expand(batch, keys)
    return attn_mask, None
