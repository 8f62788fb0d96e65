"""Attention of one query per sequence over a key/value cache.        (Vaswani et al. 2017, §3.2)

B batch, S keys that the cache has room for, H query heads, Hk key heads, D head dim. q [B, H, D],
k_cache and v_cache [B, S, Hk, D]; query head h reads key head h // (H / Hk) (Ainslie et al. 2023,
"GQA").

    x_j = scale · q k_jᵀ,  s_j = softcap · tanh(x_j / softcap) + bias_j
    lse = log Σ_j exp(s_j),  out = Σ_j exp(s_j − lse) v_j

The query stands at the newest key, n − 1 with n = cache_lengths[b], and sees key j when
n − 1 − window_left ≤ j < n (−1: no limit) and bias is neither False nor −inf there. A query that
sees nothing gives out 0, lse −inf and no gradient.
"""

import torch
from torch import Tensor

from .layer_norm import statistics_dtype


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
    """(out [B, H, D] in q's dtype, lse [B, H]). bias is [B or 1, H or 1, 1, S or 1], float or bool.

    Lengths are read on the device only, so that this can be traced.
    """
    dtype = statistics_dtype(q)
    heads, room, key_heads = q.shape[1], *k_cache.shape[1:3]
    position = torch.arange(room, device=q.device)
    newest = cache_lengths[:, None].long().clamp(max=room) - 1
    inside = position <= newest  # [B, S]
    if window_left >= 0:
        inside = inside & (position >= newest - window_left)
    seen = inside[:, None]  # [B, 1 or H, S]
    if bias is not None:
        seen = seen & (bias if bias.dtype == torch.bool else bias != float("-inf"))[:, :, 0]
    empty = ~seen.any(-1, keepdim=True)
    # What takes no part may be NaN, and 0 · NaN = NaN: it is replaced, not multiplied by 0.
    q_BHD = q.to(dtype).masked_fill(empty, 0.0)
    k, v = (t.to(dtype).masked_fill(~inside[:, :, None, None], 0.0) for t in (k_cache, v_cache))
    group = heads // key_heads if key_heads else 1
    grouped = (key_heads, group)  # H = Hk · (H / Hk)
    s = torch.einsum("bngd,bsnd->bngs", q_BHD.unflatten(1, grouped), k).flatten(1, 2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias[:, :, 0].to(dtype)
    s = s.masked_fill(~seen, float("-inf")).masked_fill(empty, 0.0)  # −inf − (−inf) would be NaN
    p = torch.softmax(s, -1).masked_fill(~seen, 0.0)
    lse = torch.logsumexp(s, -1) if room else s.sum(-1)
    out = torch.einsum("bngs,bsnd->bngd", p.unflatten(1, grouped), v).flatten(1, 2)
    out = out.masked_fill(empty, 0.0)
    return out.to(q.dtype), lse.masked_fill(empty[..., 0], float("-inf"))
