"""The backend "cpu" of attention_decode: the compiled attention kernel with one query a sequence.

That kernel aligns a window to the whole cache, a query of a cache stands at its own length, so the
window is taken as a mask of keys. Arguments are those of `bertkern/reference/attention_decode.py`.
"""

import torch
from torch import Tensor

from ..reference.attention import CAUSAL_NONE
from ._cpu import attention_fwd


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    bias: Tensor | None,
    window_left: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, D], lse [B, H])."""
    room = k_cache.shape[1]
    lengths = cache_lengths.clamp(0, room)
    keys = None
    if window_left >= 0:
        keys = torch.arange(room) >= lengths[:, None] - 1 - window_left
    out, lse = attention_fwd(
        q[:, None], k_cache, v_cache, bias, keys, None, None, lengths, None, 1, room,
        CAUSAL_NONE, -1, -1, softcap, 0.0, scale, 0, False,
    )  # fmt: skip
    return out[:, 0], lse[..., 0]
