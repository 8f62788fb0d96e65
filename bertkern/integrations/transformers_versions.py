"""Where versions of transformers differ in what this package uses of them.

    names         PreTrainedConfig, modules of activation, whole models: not in every version
    registry      attention and mask functions under a name of one's own, since 4.5x
    masks         mask functions get the positions of the queries, later lengths and offsets

What their layers compute is no matter of numbers of versions: see `Part.knows`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

Config: Any = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig


@cache
def optional(file: str, name: str) -> Any:
    """What `transformers.<file>` calls by a name, or None where this version has none."""
    try:
        return getattr(importlib.import_module(f"transformers.{file}"), name, None)
    except ImportError:
        return None


# Modules that compute GELU by tanh, by all their names.
_TANH = ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation")
GELU_TANH = [optional("activations", name) for name in (*_TANH, "AccurateGELUActivation")]
MASKED_LM_LOSS = optional("loss.loss_utils", "ForMaskedLMLoss")

_sdpa_mask = optional("masking_utils", "sdpa_mask")
CAUSAL_MASK_FUNCTION = optional("masking_utils", "causal_mask_function")
BIDIRECTIONAL_MASK_FUNCTION = optional("masking_utils", "bidirectional_mask_function")
# Whether mask functions get `cache_position`, not q_length and q_offset.
MASKS_BY_POSITIONS = (
    _sdpa_mask is not None and "cache_position" in inspect.signature(_sdpa_mask).parameters
)


def has_registry() -> bool:
    """Whether attention and mask functions can be registered under a name of one's own."""
    return optional("masking_utils", "AttentionMaskInterface") is not None


def takes_attention(model: type) -> bool:
    """Whether a model's class asks the registry for its attention, as transformers judges it."""
    judge = getattr(model, "_can_set_attn_implementation", None)
    return judge is not None and bool(judge())


@torch.compiler.assume_constant_result
def own_attention(config: type) -> str | None:
    """The name of a model with this class of config if its attention is its own, or None."""
    return _own_attention(config)


@cache
def _own_attention(config: type) -> str | None:
    name = config.__module__.replace(".configuration_", ".modeling_")
    for kind in vars(sys.modules.get(name, object)).values():
        if (
            inspect.isclass(kind)
            and issubclass(kind, transformers.PreTrainedModel)
            and kind.__module__ == name
            and not takes_attention(kind)
        ):
            return str(kind.__name__)
    return None


def by_positions(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function of lengths and offsets as one of the queries' positions."""

    def mask(*, cache_position: Tensor, **options: Any) -> Any:
        q_offset: Any = cache_position[0]
        causal = options.get("mask_function") is CAUSAL_MASK_FUNCTION
        if causal and not torch.compiler.is_compiling():
            q_offset = int(q_offset)
        return function(
            q_length=cache_position.shape[0],
            q_offset=q_offset,
            device=cache_position.device,
            **options,
        )

    return mask


def whole_mask(
    q_length: int, q_offset: int | Tensor, device: torch.device | str, **options: Any
) -> Tensor:
    """transformers' own `sdpa_mask`, bool [B, 1, Sq, Sk]."""
    queries: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset, "device": device}
    if MASKS_BY_POSITIONS:
        queries = {"cache_position": torch.arange(q_length, device=device) + q_offset}
    mask: Tensor = _sdpa_mask(allow_is_causal_skip=False, **queries, **options)
    return mask
