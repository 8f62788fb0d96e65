"""Where the versions of transformers differ in what this package uses of them: all of it is here.

    5      mask functions get lengths and offsets; up to 5.0 or some versions after it, as in 4, the
           positions of the queries in their place
    4.5x   AttentionInterface and AttentionMaskInterface appear; BERT does not ask them yet
    4      PreTrainedConfig is PretrainedConfig; layers return tuples

Signatures of layers are not compared with numbers of versions: see `Part.knows`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import activations

Config: Any = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig

# Modules that compute GELU by tanh.
GELU_TANH = tuple(
    getattr(activations, name)
    for name in (
        "GELUTanh",
        "PytorchGELUTanh",
        "NewGELUActivation",
        "FastGELUActivation",
        "AccurateGELUActivation",
    )
    if hasattr(activations, name)
)


@cache
def model_class(file: str, name: str) -> type[nn.Module] | None:
    """A class of `transformers.models.<file>`, or None where this version has none."""
    try:
        module = importlib.import_module(f"transformers.models.{file}")
    except ImportError:
        return None
    found: type[nn.Module] | None = getattr(module, name, None)
    return found


@cache
def has_registry() -> bool:
    """Whether attention and mask functions can be registered under a name of one's own."""
    try:
        from transformers import AttentionInterface  # noqa: F401
        from transformers.masking_utils import AttentionMaskInterface  # noqa: F401
    except ImportError:
        return False
    return True


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


def masks_by_positions() -> bool:
    """Whether mask functions get `cache_position`, not q_length and q_offset."""
    from transformers.masking_utils import sdpa_mask

    return "cache_position" in inspect.signature(sdpa_mask).parameters


def by_positions(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function of lengths and offsets as one of the queries' positions."""
    from transformers.masking_utils import causal_mask_function

    def mask(*, cache_position: Tensor, **options: Any) -> Any:
        q_offset: Any = cache_position[0]
        causal = options.get("mask_function") is causal_mask_function
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
    from transformers.masking_utils import sdpa_mask

    options["allow_is_causal_skip"] = False
    if masks_by_positions():
        positions = torch.arange(q_length, device=device) + q_offset
        mask: Tensor = sdpa_mask(cache_position=positions, **options)
        return mask
    mask = sdpa_mask(q_length=q_length, q_offset=q_offset, device=device, **options)
    return mask
