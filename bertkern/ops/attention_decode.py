"""Attention of one query per sequence over a key/value cache, for generation, a token at a time.

    s_j = softcap · tanh(scale · q k_jᵀ / softcap) + bias_j,  out = Σ_j exp(s_j − lse) v_j

(Vaswani et al. 2017; split over the keys after Dao et al. 2023, "Flash-Decoding")

B batch, S keys that the cache has room for, H query heads, Hk key heads, D head dim. An op for
inference: where a gradient is asked for, it goes through the formula in `bertkern/reference/`,
which holds all B · H · S scores and copies the caches. Training wants `attention`.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..reference import attention_decode as reference
from ..reference.layer_norm import statistics_dtype
from . import _arguments as arguments
from ._backend import implementation
from ._registration import UNUSUAL, define_backward, usual_call
from ._vmap import Fold
from .attention import MAX_HEAD_DIM, _window, bias_matrices

_OP = "attention_decode"


def _decode(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return implementation(_OP, "", q, head_dim=q.shape[-1])(q, *rest)


def _decode_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=statistics_dtype(q))


_attention_decode = define_backward(  # a forward, whose gradients too go through a formula
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, "
    "Tensor? bias, SymInt window_left, float softcap, float scale) -> (Tensor, Tensor)",
    _decode,
    _decode_fake,
    reference.attention_decode,
    fold=Fold(("q", "k_cache", "v_cache", "cache_lengths"), unless=("bias",)),
)


_usual = usual_call("x[b h d], x[b s g d], x[b s g d], int32[b]")


def _check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor) -> None:
    arguments.check_tensor(_OP, "q", q)
    arguments.check_same(_OP, "q", q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 3:
        raise ValueError(
            f"{_OP}: q has shape {list(q.shape)}; it must have 3 dimensions, [B, H, D]"
        )
    batch, _, head_dim = q.shape
    if k_cache.dim() != 4 or k_cache.shape[0] != batch or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"{_OP}: k_cache has shape {list(k_cache.shape)}; it must be [B, S, Hk, D] = "
            f"[{batch}, S, Hk, {head_dim}]"
        )
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{_OP}: v_cache has shape {list(v_cache.shape)}; it must be k_cache's, "
            f"{list(k_cache.shape)}"
        )
    arguments.check_index_tensor(_OP, "cache_lengths", cache_lengths, q, (batch,), torch.int32)


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...
@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...
def attention_decode(  # type: ignore[misc]  # the overloads abbreviate the options
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    bias: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax(scale · q kᵀ) v of one query a sequence over the keys in its cache.

    The query is the newest token: it stands at position cache_lengths[b] − 1, so causal is implied.
    Cross-attention calls it with the source's keys and lengths. A sequence's result is the same
    bits in every batch and in every size of cache.

    Args:
        q: [B, H, D], float16, bfloat16, float32 or float64.
        k_cache, v_cache: [B, S, Hk, D] with any strides, [B, Hk, S, D] transposed among them (one
            whose last dimension is not contiguous is copied at each call); H is a multiple of Hk,
            query head h reads key head h // (H / Hk).
        cache_lengths: int32 [B], on q's device and never read on the host; sequence b has keys 0 …
            cache_lengths[b] − 1 (less than 0 counts as 0, more than S as S). What lies behind is
            never used, whatever it holds.
        bias: added to the scores after softcap, in q's dtype or float32; or bool, False meaning
            −inf. It broadcasts to [B, H, 1, S] by torch's rules, as that of `attention` does for
            one query.
        window: (left, right), −1 for no limit: keys j ≥ cache_lengths[b] − 1 − left. There are no
            keys to the right of the newest.
        softcap: c > 0 replaces each product x by c · tanh(x / c), before the bias; 0 is none.
        scale: factor on the products; None is 1/√D.
        return_lse: also return lse = log Σ_j exp(s_j), float32 [B, H].

    Returns:
        [B, H, D] in q's dtype, contiguous; with return_lse, (out, lse). A query that sees no key
        gives 0 and lse −inf. Gradients are right, but slow (see the head of this file).

    Raises:
        ValueError, TypeError, NotImplementedError: naming the argument, its value and those
            allowed.
    """
    if arguments.autocasts(q):
        q, k_cache, v_cache, bias = arguments.to_autocast_dtype(  # type: ignore[assignment]
            q, k_cache, v_cache, bias
        )
    usual = UNUSUAL  # with a bias, which may have fewer dimensions
    if bias is None:
        usual = _usual(q, k_cache, v_cache, cache_lengths)
    if usual == UNUSUAL:
        _check_tensors(q, k_cache, v_cache, cache_lengths)
        q, k_cache, v_cache = (arguments.unit_last_stride(t) for t in (q, k_cache, v_cache))
        sizes = (*q.shape[:2], 1, k_cache.shape[1])
        bias = bias_matrices(_OP, "bias", bias, q, sizes)
        cache_lengths = cache_lengths.contiguous()
    _, heads, head_dim = q.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{_OP}: head dim is {head_dim}; allowed are 1 to {MAX_HEAD_DIM}")
    key_heads = k_cache.shape[2]
    if key_heads != heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"{_OP}: k_cache has {key_heads} heads and q has {heads}; q's must be a multiple of "
            "k_cache's (each key head serves as many query heads)"
        )
    left, _ = _window(_OP, window)
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{_OP}: softcap={softcap}; it must be 0 (none) or positive and finite")
    out, lse = _attention_decode(
        q,
        k_cache,
        v_cache,
        cache_lengths,
        bias,
        left,
        float(softcap),
        1.0 / math.sqrt(head_dim) if scale is None else float(scale),
        usual=usual,
    )
    return (out, lse) if return_lse else out
