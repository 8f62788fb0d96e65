"""`attn_implementation="bertkern"` for transformers ≥ 5, and for those models of 4.5x that ask for
their attention by name (BERT does from 5.0 on, ModernBERT later).

    import bertkern.integrations.transformers
    model = AutoModel.from_pretrained(folder, attn_implementation="bertkern")

Importing registers two functions under the name "bertkern": the attention, which transformers calls
in every layer with [B, H, S, D] views, and its mask function, which it calls once per forward pass
(without one it would pass no mask at all). The mask function says what may be seen in the cheapest
form that says it:

    None                  nothing is padded
    int32 [B]             key lengths: padding stands on the right
    bool [B, Sk]          any other mask of tokens (left padding, holes)
    bool [B, 1, Sq, Sk]   everything else that a model asks for: windows, chunks, packed positions,
                          caches of a fixed size, masks of its own. Nothing is left to add to it.

With the first three, whether attention is causal is read off the module. Masks of four dimensions
that a user or a model brings, bool or added to the scores, are taken as they are.

B batch, H heads, Hk key heads, S sequence, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops import attention, attention_varlen
from ..ops._registration import may_read

NAME = "bertkern"
# Options of other attentions that would change the result.
REFUSED = ("head_mask", "indices", "block_indices", "cache")


def _key_padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The mask of tokens as None, lengths int32 [B] or bool [B, Sk].

    That looks at the mask, which costs one synchronisation; while something traces it stays bool.
    """
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:  # rows of a cache that nothing was written to yet
        attention_mask = pad(attention_mask, (0, missing))
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if not may_read(mask):
        return mask
    lengths = mask.sum(-1, dtype=torch.int32)
    positions = torch.arange(mask.shape[1], device=mask.device)
    right_padded = (mask == (positions < lengths[:, None])).all()
    full = lengths.min() == kv_length if mask.numel() else right_padded
    all_full, all_right = torch.stack([full, right_padded]).tolist()
    if all_full:
        return None
    return lengths if all_right else mask


def bertkern_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask function that transformers calls once per forward pass; its arguments are those of
    `transformers.masking_utils.sdpa_mask`.

    Returns:
        See the module's text.

    Raises:
        NotImplementedError: for a mask of neither two nor four dimensions, and for a model that
            does not ask for its attention by name, which would misread such masks.
    """
    from .transformers_versions import (
        BIDIRECTIONAL_MASK_FUNCTION,
        CAUSAL_MASK_FUNCTION,
        own_attention,
        whole_mask,
    )

    model = None if config is None else own_attention(type(config))
    if model is not None:
        raise NotImplementedError(
            f"attn_implementation='{NAME}': {model} computes its attention itself, in this version "
            "of transformers; use attn_implementation='eager'"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"attn_implementation='{NAME}': attention_mask of shape {list(attention_mask.shape)} "
            "is not supported; [B, Sk] and [B, H or 1, Sq or 1, Sk] are"
        )
    if mask_function is CAUSAL_MASK_FUNCTION:
        # The op's causal attention counts from the last key, which must be the last query's.
        ends = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        tokens_alone = ends and allow_is_causal_skip
    else:
        both_ways = mask_function is BIDIRECTIONAL_MASK_FUNCTION  # 4.57 has none
        tokens_alone = both_ways and allow_is_bidirectional_skip
    if tokens_alone and not use_vmap:
        return _key_padding(attention_mask, kv_length, kv_offset)
    return whole_mask(
        q_length,
        q_offset,
        device,
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=CAUSAL_MASK_FUNCTION if mask_function is None else mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
    )


def _mask_options(
    mask: Tensor | None, position_bias: Tensor | None, q_BSHD: Tensor, keys: int, causal: bool
) -> dict[str, Any]:
    """A layer's mask as arguments of `bertkern.attention`."""
    batch, queries = q_BSHD.shape[:2]
    options: dict[str, Any] = {"causal": causal and queries > 1, "bias": position_bias}
    if mask is None:
        return options
    if mask.dim() == 1:
        return {**options, "key_lengths": mask}
    if mask.dim() == 2 and mask.shape == (batch, keys):
        return {**options, "key_padding_mask": mask.bool()}
    if mask.dim() != 4 or mask.shape[-1] < keys:
        raise NotImplementedError(
            f"attn_implementation='{NAME}': attention_mask of shape {list(mask.shape)} for "
            f"{queries} queries and {keys} keys is not supported; [B], [B, Sk] and "
            "[B, H or 1, Sq or 1, Sk] are"
        )
    mask = mask[..., :keys]  # of a cache of a fixed size, as transformers' own attention cuts it
    options["causal"] = False
    if mask.dtype != torch.bool:
        return {**options, "bias": mask if position_bias is None else position_bias + mask}
    if mask.shape[1:3] == (1, 1):
        return {**options, "key_padding_mask": mask[:, 0, 0].expand(batch, keys)}
    if position_bias is not None:
        mask = torch.where(mask, position_bias, float("-inf"))
    return {**options, "bias": mask}


def bertkern_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None, and True
            where it has none.
        query: [B, H, Sq, D]; key: [B, Hk, Sk, D]; value: [B, Hk, Sk, Dv]; any strides.
        attention_mask: what `bertkern_mask` returned, or a mask of four dimensions: bool (True:
            attend) or added to the scores.
        dropout: probability, 0 in evaluation.
        scaling: factor on the scores.
        softcap: c · tanh(score / c) in place of each score.
        sliding_window: w: query i sees keys j with |i − j| < w, if the mask does not say it.
        position_bias: [B or 1, H or 1, Sq or 1, Sk], added to the scores, with a gradient.
        s_aux: [H], the score of a key whose value is 0 (an attention sink), with a gradient.
        kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k of packed sequences.
            Options of other attentions are refused when they would change the result.

    Returns:
        ([B, Sq, H, Dv], None): the weights are never held. A query that sees no key gives 0.

    Raises:
        NotImplementedError: for options and masks that would otherwise be ignored.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation='{NAME}': {name} is not supported")
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"attn_implementation='{NAME}': output_attentions=True is not supported, the weights "
            "are never held; use attn_implementation='eager'"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim != head_dim:  # filled up with zeros
        scaling = head_dim**-0.5 if scaling is None else scaling
        widest = max(head_dim, value_dim)
        query, key, value = (pad(t, (0, widest - t.shape[-1])) for t in (query, key, value))
    q_BSHD, k_BSHD, v_BSHD = (t.transpose(1, 2) for t in (query, key, value))
    queries, keys = q_BSHD.shape[1], k_BSHD.shape[1]
    options: dict[str, Any] = {
        "softcap": softcap or 0.0,
        "dropout_p": dropout,
        "scale": scaling,
        "return_lse": s_aux is not None,
    }
    packed = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if packed[0] is not None and packed[1] is not None:
        out = attention_varlen(
            q_BSHD.flatten(0, 1),
            k_BSHD.flatten(0, 1),
            v_BSHD.flatten(0, 1),
            packed[0].to(torch.int32),
            packed[1].to(torch.int32),
            int(kwargs["max_length_q"]),
            int(kwargs["max_length_k"]),
            causal=causal,
            window=_window(sliding_window),
            bias=position_bias,
            **options,
        )
        out, lse = out if s_aux is not None else (out, None)
        out = _with_sink(out, lse, s_aux).view(q_BSHD.shape)
    else:
        # A mask of four dimensions holds the window. In an encoder the op may skip what is outside;
        # in a decoder the mask may show more (parts of a prompt that see each other), and keys of a
        # cache need not end with the last query's.
        told = attention_mask is None or attention_mask.dim() < 4
        skips = told or (not causal and queries == keys)
        options |= _mask_options(attention_mask, position_bias, q_BSHD, keys, causal)
        window = _window(sliding_window if skips else None)
        out = attention(q_BSHD, k_BSHD, v_BSHD, window=window, **options)
        out, lse = out if s_aux is not None else (out, None)
        out = _with_sink(out, lse, s_aux)
    return out[..., :value_dim], None


def _window(sliding_window: int | None) -> tuple[int, int] | None:
    return None if sliding_window is None else (sliding_window - 1, sliding_window - 1)


def _with_sink(out: Tensor, lse: Tensor | None, s_aux: Tensor | None) -> Tensor:
    """One more key of score s_aux [H] and value 0: out [..., S, H, D] by exp(lse) / (exp(lse) +
    exp(s_aux)), with lse [..., H, S]."""
    if lse is None or s_aux is None:
        return out
    share = torch.sigmoid(lse.transpose(-1, -2) - s_aux.to(lse.dtype))
    return (out * share[..., None]).to(out.dtype)


def register() -> None:
    """Registers both functions; done on import."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        from .transformers_versions import MASKS_BY_POSITIONS, by_positions
    except ImportError as error:
        raise ImportError(
            "bertkern.integrations.transformers needs transformers >= 5 "
            f"(pip install 'bertkern[demo]'): {error}"
        ) from error
    AttentionInterface.register(NAME, bertkern_attention)
    mask = by_positions(bertkern_mask) if MASKS_BY_POSITIONS else bertkern_mask
    AttentionMaskInterface.register(NAME, mask)


register()
