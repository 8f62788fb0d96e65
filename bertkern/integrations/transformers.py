"""`attn_implementation="bertkern"` for transformers ≥ 5.

    import bertkern.integrations.transformers
    model = AutoModel.from_pretrained(folder, attn_implementation="bertkern")

Importing registers two functions under the name "bertkern": the attention, which transformers calls
in every layer with [B, H, S, D] views, and its mask function, which it calls once per forward pass
(without one it would pass no mask at all). The mask function turns the tokens' mask into what the
kernels take:

    None                 nothing is padded
    int32 [B]            key lengths: padding stands on the right
    bool [B, S]          any other mask of tokens (left padding, holes): self-attention gathers the
    tokens

B batch, H heads, S sequence, D head dim, T tokens that are not padding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import attention, attention_varlen

NAME = "bertkern"


def _key_padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The mask of tokens [B, S] as None, lengths int32 [B] or bool [B, S]. One synchronisation."""
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
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
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Tensor | None:
    """The mask function that transformers calls once per forward pass.

    Returns:
        See the module's text; the causal part is not in it, `bertkern_attention` reads it off the
        module.

    Raises:
        NotImplementedError: for a mask that is neither full nor causal (sliding windows, chunks,
            masks combined by the model).
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if use_vmap or mask_function not in (bidirectional_mask_function, causal_mask_function):
        shown = getattr(mask_function, "__name__", mask_function)
        raise NotImplementedError(
            f"attn_implementation='{NAME}': the model asks for mask_function={shown}; supported "
            "are full "
            "and causal attention with a mask of padded tokens"
        )
    return _key_padding(attention_mask, kv_length, kv_offset)


def _gathered(
    q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor, **options: Any
) -> Tensor:
    """Self-attention among the tokens that the mask keeps, in their order; other rows give 0."""
    lengths = mask_BS.sum(-1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    kept = mask_BS.flatten().nonzero()[:, 0]
    q, k, v = (t.flatten(0, 1)[kept] for t in (q_BSHD, k_BSHD, v_BSHD))
    longest = mask_BS.shape[1]
    out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    rows = q_BSHD.shape[0] * q_BSHD.shape[1]
    padded = out.new_zeros(rows, *out.shape[1:]).index_copy(0, kept, out)
    return padded.view(q_BSHD.shape)


def bertkern_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None.
        query: [B, H, Sq, D]; key, value: [B, H, Sk, D]; any strides.
        attention_mask: what `bertkern_mask` returned.
        dropout: probability, 0 in evaluation.
        scaling: factor on the scores.
        kwargs: options of other attentions are refused when they would change the result.

    Returns:
        ([B, Sq, H, D], None): the weights are never held.

    Raises:
        NotImplementedError: for options and masks that would otherwise be ignored.
    """
    for name in ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation='{NAME}': {name} is not supported yet")
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"attn_implementation='{NAME}': output_attentions=True is not supported, the weights "
            "are "
            "never held; use attn_implementation='eager'"
        )
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    q_BSHD, k_BSHD, v_BSHD = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = {
        "causal": causal and q_BSHD.shape[1] > 1,
        "dropout_p": dropout,
        "scale": scaling,
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
            **options,
        )
        return out.view(q_BSHD.shape), None
    if attention_mask is None or attention_mask.dim() == 1:
        return attention(q_BSHD, k_BSHD, v_BSHD, key_lengths=attention_mask, **options), None
    one_length = q_BSHD.shape[1] == k_BSHD.shape[1]
    if attention_mask.shape != k_BSHD.shape[:2] or not one_length:
        raise NotImplementedError(
            f"attn_implementation='{NAME}': attention_mask of shape {list(attention_mask.shape)} "
            "for "
            f"{q_BSHD.shape[1]} queries and {k_BSHD.shape[1]} keys is not supported yet; a mask "
            "of tokens "
            "[B, S] is (with holes or left padding for self-attention only)"
        )
    return _gathered(q_BSHD, k_BSHD, v_BSHD, attention_mask, **options), None


def register() -> None:
    """Registers both functions; done on import."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "bertkern.integrations.transformers needs transformers >= 5 "
            f"(pip install 'bertkern[demo]'): {error}"
        ) from error
    AttentionInterface.register(NAME, bertkern_attention)
    AttentionMaskInterface.register(NAME, bertkern_mask)


register()
