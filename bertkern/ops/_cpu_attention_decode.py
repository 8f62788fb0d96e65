"""The backend "cpu" of attention_decode: the compiled attention kernel with one query a sequence.

That kernel has no bias, window, softcap and grouped heads (`_backend.py` says so); those calls are
the reference's. Arguments are those of `bertkern/reference/attention_decode.py`.
"""

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
    out, lse = attention_fwd(
        q[:, None], k_cache, v_cache, None, None, None, None, lengths, None, 1, room,
        CAUSAL_NONE, -1, -1, 0.0, 0.0, scale, 0,
    )  # fmt: skip
    return out[:, 0], lse[..., 0]
