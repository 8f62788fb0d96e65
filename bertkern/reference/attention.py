"""Attention: out = dropout(softmax(score(q kᵀ))) v        (Vaswani et al. 2017, section 3.2)

B batch, S sequence, T total tokens, H heads, D head dim. Two layouts: batched q [B, Sq, H, D] with
k and v [B, Sk, Hk, D], keys optionally cut at key_lengths [B] and chosen by key_padding_mask
[B, Sk]; and variable-length q [Tq, H, D] with k and v [Tk, Hk, D], sequences delimited by
cu_seqlens [B + 1]. Query head h reads key head h // (H / Hk).

    x = scale · q kᵀ,  s = softcap · tanh(x / softcap) + bias,  lse = log Σ exp(s)
    p = exp(s − lse),  out = (p · mask) v
    backward:  dv = (p · mask)ᵀ dout,  dp = dout vᵀ · mask,  ds = p · (dp − delta),
    delta = Σ_D dout · out − dlse,  dbias = Σ ds over what it was broadcast over,
    dx = ds · (1 − tanh²(x / softcap)),  dq = scale · dx k,  dk = scale · dxᵀ q

Query i sees key j when j < len_k, key_padding_mask[j], bias is neither False nor −inf there, and
i + diagonal − window_left ≤ j ≤ i + diagonal + window_right (−1: no limit on that side). diagonal
is Sk − Sq in the batched layout (of the whole matrix, so that key_lengths mean padding and nothing
else) and len_k − len_q of the sequence in the other. CAUSAL_BOTTOM_RIGHT is window_right 0;
CAUSAL_TOP_LEFT is j ≤ i. A query that sees nothing gives out 0, lse −inf and no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from .dropout import random_bits, threshold_and_scale
from .layer_norm import statistics_dtype

CAUSAL_NONE, CAUSAL_BOTTOM_RIGHT, CAUSAL_TOP_LEFT = 0, 1, 2


def _sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
) -> list[tuple[int, int, slice, slice]]:
    """(first, last + 1, queries, keys) of each group of sequences that can be computed together.

    In the batched layout the slices run over S within sequences first..last; in the variable-length
    layout they run over T and a group is one sequence.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        return [
            (i, i + 1, slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]))
            for i in range(len(starts_q) - 1)
        ]
    queries = slice(0, q.shape[1])
    if key_lengths is None:
        return [(0, q.shape[0], queries, slice(0, k.shape[1]))]
    return [(i, i + 1, queries, slice(0, n)) for i, n in enumerate(key_lengths.tolist())]


def _batched(part: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """[S, Hk, D] or [B, S, Hk, D] -> [B, S, H, D] in `dtype`, each key head for its query heads."""
    part = (part[None] if part.dim() == 3 else part).to(dtype)
    group = heads // part.shape[2] if part.shape[2] else 1
    return part if group == 1 else part.repeat_interleave(group, dim=2)


def _heads_first(t: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D] of the same memory layout, but no view."""
    return t.transpose(1, 2).clone(memory_format=torch.preserve_format)


def _sum_groups(grad: Tensor, key_heads: int) -> Tensor:
    """Gradient of [B, S, H, D] -> of [B, S, Hk, D]: the sum over each key head's query heads."""
    if grad.shape[2] == key_heads:
        return grad
    return grad.unflatten(2, (key_heads, grad.shape[2] // key_heads)).sum(3)


def _part_of_bias(bias: Tensor, first: int, last: int, len_q: int, len_k: int) -> Tensor:
    """The part of bias [B or 1, H or 1, Sq or 1, Sk or 1] that a group of sequences sees."""
    batch = slice(first, last) if bias.shape[0] > 1 else slice(None)
    return bias[batch, :, : max(len_q, 1), : max(len_k, 1)]


class _Scores:
    """The probabilities of one group of sequences, and the way back from their gradient.

    p [B, H, Sq, Sk], lse [B, H, Sq]; tanh and allowed broadcast to p's shape.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        keys: Tensor | None,
        low: int | None,
        high: int | None,
        scale: float,
        softcap: float,
    ) -> None:
        """q [B, Sq, H, D], k [B, Sk, H, D]; keys bool [B, Sk]; i + low ≤ j ≤ i + high."""
        self.scale = scale
        len_q, len_k = q.shape[1], k.shape[1]
        allowed = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
        if high is not None:
            allowed = allowed.tril(high)
        if low is not None:
            allowed = allowed.triu(low)
        allowed = allowed[None, None]
        if keys is not None:
            allowed = allowed & keys[:, None, None, :]
            k = k.masked_fill(~keys[:, :, None, None], 0.0)
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        self.tanh = torch.tanh(s / softcap) if softcap else None
        if self.tanh is not None:
            s = self.tanh * softcap
        if bias is not None and bias.dtype == torch.bool:
            allowed = allowed & bias
        elif bias is not None:
            allowed = allowed & (bias != float("-inf"))
            s = s + bias.to(s.dtype)
        self.allowed = allowed
        s = s.masked_fill(~allowed, float("-inf"))
        self.empty = ~allowed.any(-1)  # [B or 1, H or 1, Sq]: −inf − (−inf) would be NaN there
        s = s.masked_fill(self.empty[..., None], 0.0)
        self.p = torch.softmax(s, -1).masked_fill(~allowed, 0.0)
        lse = torch.logsumexp(s, -1) if len_k else s.sum(-1)
        self.lse = lse.masked_fill(self.empty, float("-inf"))

    def rows(self, t: Tensor) -> Tensor:
        """t [B, Sq, H, D] with 0 in the rows of queries that see nothing (they may hold NaN)."""
        return t.masked_fill(self.empty.transpose(1, 2)[..., None], 0.0)

    def backward(self, ds: Tensor) -> Tensor:
        """Gradient of q kᵀ from that of the scores that the softmax saw."""
        if self.tanh is not None:
            ds = (ds * (1 - self.tanh * self.tanh)).masked_fill(~self.allowed, 0.0)
        return ds * self.scale


def _dropout_mask(
    p: Tensor, first: int, dropout_p: float, seed: Tensor | None, sequence_offset: int
) -> Tensor | None:
    """The factor, 0 or scale, on each probability of p [B, H, Sq, Sk]; sequences count from
    `first`."""
    if seed is None:
        return None

    def coordinate(dim: int, start: int = 0) -> Tensor:
        index = torch.arange(start, start + p.shape[dim], device=p.device)
        return index.reshape([-1 if d == dim else 1 for d in range(4)])

    threshold, scale = threshold_and_scale(dropout_p)
    bits = random_bits(
        seed, coordinate(0, first + sequence_offset), coordinate(1), coordinate(2), coordinate(3)
    )
    return (bits >= threshold).to(p.dtype) * scale


class _Group:
    """One group of sequences: its inputs, scores, dropout factors and places in the tensors."""

    def __init__(self, at: tuple[int, int, slice, slice], q, k, v, bias, key_padding_mask, varlen,
                 causal, window_left, window_right, softcap, dropout_p, scale, seed,
                 sequence_offset) -> None:  # fmt: skip
        first, last, queries, keys = at
        self.first, self.last, self.queries, self.varlen = first, last, queries, varlen
        self.at_q = queries if varlen else (slice(first, last), queries)
        self.at_k = keys if varlen else (slice(first, last), keys)
        dtype, heads = statistics_dtype(q), q.shape[-2]
        q_BSHD, k_BSHD, v_BSHD = (
            _batched(t, dtype, heads) for t in (q[self.at_q], k[self.at_k], v[self.at_k])
        )
        len_q, len_k = q_BSHD.shape[1], k_BSHD.shape[1]
        diagonal = (len_k if varlen else k.shape[1]) - len_q
        low = None if window_left < 0 else diagonal - window_left
        high = None if window_right < 0 else diagonal + window_right
        if causal == CAUSAL_BOTTOM_RIGHT:
            high = diagonal
        elif causal == CAUSAL_TOP_LEFT:
            high = 0
        self.bias = None if bias is None else _part_of_bias(bias, first, last, len_q, len_k)
        seen = None
        if key_padding_mask is not None:
            seen = key_padding_mask[self.at_k]
            v_BSHD = v_BSHD.masked_fill(~seen[:, :, None, None], 0.0)
        self.scores = _Scores(q_BSHD, k_BSHD, self.bias, seen, low, high, scale, softcap)
        self.q, self.k, self.v = self.scores.rows(q_BSHD), k_BSHD, v_BSHD
        if seen is not None:
            self.k = k_BSHD.masked_fill(~seen[:, :, None, None], 0.0)
        self.mask = _dropout_mask(self.scores.p, first, dropout_p, seed, sequence_offset)
        self.p = self.scores.p
        self.dropped = self.p if self.mask is None else self.p * self.mask

    def put(self, target: Tensor, at: Any, part: Tensor) -> None:
        """Write [B, S, ...] into its place in a tensor of either layout."""
        target[at] = (part[0] if self.varlen else part).to(target.dtype)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
    heads_first: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out like q; lse [B, H, Sq], or [H, Tq] in the variable-length layout.

    bias is [B or 1, H or 1, Sq or 1, Sk or 1], float or bool. heads_first: q, k, v and out are
    [B, H, S, D], out in memory [B, S, H, D].
    """
    varlen = cu_seqlens_q is not None
    if heads_first:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    heads = q.shape[-2]
    lse_shape = (heads, q.shape[0]) if varlen else (q.shape[0], heads, q.shape[1])
    lse = torch.full(lse_shape, float("-inf"), dtype=statistics_dtype(q), device=q.device)
    for at in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, key_lengths):
        group = _Group(
            at, q, k, v, bias, key_padding_mask, varlen, causal, window_left, window_right,
            softcap, dropout_p, scale, dropout_seed, sequence_offset,
        )  # fmt: skip
        group.put(out, group.at_q, torch.einsum("bhqk,bkhd->bqhd", group.dropped, group.v))
        if varlen:
            lse[:, group.queries] = group.scores.lse[0]
        else:
            lse[group.first : group.last] = group.scores.lse
    return _heads_first(out) if heads_first else out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
    heads_first: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias); dbias only if bias_grad. out and lse are recomputed from q, k and v, so
    that this can be differentiated again."""
    varlen = cu_seqlens_q is not None
    dtype = statistics_dtype(q)
    if heads_first:
        dout, q, k, v = (t.transpose(1, 2) for t in (dout, q, k, v))
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dbias = None
    if bias_grad and bias is not None:
        dbias = torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    for at in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, key_lengths):
        group = _Group(
            at, q, k, v, bias, key_padding_mask, varlen, causal, window_left, window_right,
            softcap, dropout_p, scale, dropout_seed, sequence_offset,
        )  # fmt: skip
        dout_BSHD = group.scores.rows(_batched(dout[group.at_q], dtype, q.shape[-2]))
        dv_BSHD = torch.einsum("bhqk,bqhd->bkhd", group.dropped, dout_BSHD)
        dp = torch.einsum("bqhd,bkhd->bhqk", dout_BSHD, group.v)
        dp = dp if group.mask is None else dp * group.mask
        delta = (group.p * dp).sum(-1)  # = Σ_D dout · out, [B, H, Sq]
        if dlse is not None:
            dlse_BHS = dlse[:, group.queries][None] if varlen else dlse[group.first : group.last]
            # lse = −inf in a row without keys: it is a constant, and p = 0 there.
            delta = delta - dlse_BHS.to(dtype).masked_fill(group.scores.empty, 0.0)
        ds = group.p * (dp - delta[..., None])
        if dbias is not None and group.bias is not None and ds.numel():
            part = _part_of_bias(dbias, group.first, group.last, *ds.shape[2:])
            part += ds.sum_to_size(part.shape)
        dx = group.scores.backward(ds)
        dq_BSHD = torch.einsum("bhqk,bkhd->bqhd", dx, group.k)
        dk_BSHD = torch.einsum("bhqk,bqhd->bkhd", dx, group.q)
        group.put(dq, group.at_q, dq_BSHD)
        group.put(dk, group.at_k, _sum_groups(dk_BSHD, k.shape[-2]))
        group.put(dv, group.at_k, _sum_groups(dv_BSHD, v.shape[-2]))
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    if heads_first:
        dq, dk, dv = (_heads_first(t) for t in (dq, dk, dv))
    return dq, dk, dv, dbias
