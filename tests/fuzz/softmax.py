"""Attention of one sequence in plain torch, and the options that its faces share.

Legend: B batch, S sequence, T total tokens, H query heads, Hk key heads, GROUP = H / Hk, D head
dim; i a query, j a key, counted in their own sequence. s = bias + softcap(scale * q k),
p = exp(s - lse), out = (p * keep) v. The keys that may be attended to are picked by their index, so
that what lies elsewhere may hold anything.
"""

import math
from dataclasses import dataclass, field

import torch

from bertkern.reference.dropout import random_bits

EPS = torch.finfo(torch.float32).eps


@dataclass
class Options:
    """What all faces of attention share."""

    scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    offset: int = 0

    def seen(self, queries: int, keys: int, top_left: bool = False) -> torch.Tensor:
        """Which keys a query sees by position alone, [queries, keys]."""
        j = torch.arange(keys)[None, :]
        i = torch.arange(queries)[:, None] + (0 if top_left else keys - queries)
        seen = j <= i if self.causal else torch.ones(queries, keys, dtype=torch.bool)
        left, right = self.window
        if left >= 0:
            seen = seen & (j >= i - left)
        if right >= 0:
            seen = seen & (j <= i + right)
        return seen

    def keep(self, sequence: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
        """Factor 0 or 1 / (share really kept) of each probability [H, Sq, Sk], fp64."""
        if not self.dropout_p:
            return None
        dropped = round(self.dropout_p * 65536)
        head, i, j = (torch.arange(n) for n in (heads, queries, keys))
        sequence = torch.tensor(sequence + self.offset)
        bits = random_bits(self.seed.cpu(), sequence, head[:, None, None], i[:, None], j)
        return (bits >= dropped).double() * (65536 / (65536 - dropped) if dropped < 65536 else 0.0)

    def keywords(self) -> dict:
        """For bertkern.attention and attention_varlen; defaults are left out."""
        given: dict = {"scale": self.scale}
        if self.causal:
            given["causal"] = True
        if self.window != (-1, -1):
            given["window"] = self.window
        if self.softcap:
            given["softcap"] = self.softcap
        if self.dropout_p:
            given |= {"dropout_p": self.dropout_p, "dropout_seed": self.seed}
        if self.offset:
            given["sequence_offset"] = self.offset
        return given


def one_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    seen: torch.Tensor,
    keys: torch.Tensor,
    keep: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [Sq, H, D], lse [H, Sq]) of q [Sq, H, D] over the keys at positions `keys` of k, v
    [Sk, Hk, D].

    bias and seen: [H or 1, Sq, Sk]. A query that sees nothing: 0 and -inf.
    """
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    heads, queries = q.shape[1], q.shape[0]
    if not len(keys):
        return torch.zeros_like(q), q.new_full((heads, queries), -math.inf)
    k, v = (t[keys].repeat_interleave(group, 1) for t in (k, v))
    seen = seen[..., keys].expand(heads, queries, len(keys))
    s = torch.einsum("ihd,jhd->hij", q, k) * options.scale
    if options.softcap:
        s = options.softcap * torch.tanh(s / options.softcap)
    if bias is not None:
        bias = bias[..., keys]
        if bias.dtype == torch.bool:
            seen = seen & bias
        else:
            seen = seen & (bias != -math.inf)
            s = s + torch.where(seen, bias.expand(seen.shape), 0)
    empty = ~seen.any(-1, keepdim=True)
    s = torch.where(empty, 0, torch.where(seen, s, -math.inf))
    if s.dtype == torch.float64:
        e = torch.exp(s - s.detach().amax(-1, keepdim=True))
        p = e / e.sum(-1, keepdim=True)
        lse = s.detach().amax(-1) + e.sum(-1).log()
    else:
        p, lse = torch.softmax(s, -1), torch.logsumexp(s.float(), -1)
        # Torch's softmax over one key is 1 without rounding. A kernel's exp(s - lse) errs by what s
        # and lse are rounded by; the second term has value 0 and this slope.
        error = torch.where(seen.sum(-1, keepdim=True) == 1, EPS * (2 + s.detach().abs()), 0)
        error = torch.where(seen, error, 0).to(s.dtype)
        finite = torch.where(seen, s, 0)
        p = p * (1 + error) + error * (finite - finite.detach())
    p = torch.where(seen, p, 0)
    if keep is not None:
        p = p * keep[..., keys].to(p.dtype)
    return torch.einsum("hij,jhd->ihd", p, v), lse.masked_fill(empty[..., 0], -math.inf)
