"""Cases of attention. The table of the mutants' tiles makes 32 keys at D <= 64, and 80 at D <= 96,
those of one tile in the backward, on Hopper 64 and, without options, 128 at D > 64; the others walk
over tiles of 32 and 16. The file is long because it ends in one table, whose cases share how they
are drawn and poisoned."""

import math
from collections.abc import Callable
from itertools import product
from unittest import mock

import torch
from fuzz.softmax import Options, one_sequence

import bertkern
from bertkern.ops import _cuda_attention
from bertkern.reference.dropout import random_bits

from .cases import HALF, Case, Dice, Tensors

NAN = math.nan


def _by_head(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-3, -2)


def _rows_of_lse(t: torch.Tensor) -> torch.Tensor:
    return t[..., None]


VIEWS = {"q": _by_head, "k": _by_head, "v": _by_head, "out": _by_head, "lse": _rows_of_lse}


def edge_of_dropout(offset: int, batch: int, heads: int, queries: int, keys: int):
    """(seed, p) such that bits equal the threshold, which must keep them, in each of the four
    places {query's bit 3} x {key's bit 3} that the kernels compare on their own."""
    sequence, head, i, j = torch.meshgrid(
        *(torch.arange(n) for n in (batch, heads, queries, keys)), indexing="ij"
    )
    corner = (i >> 3 & 1) * 2 + (j >> 3 & 1)
    for seed in range(1000):
        bits = random_bits(torch.tensor([seed]), sequence + offset, head, i, j).long()
        hit = torch.ones(65536, dtype=torch.bool)
        for c in range(4):
            hit &= torch.bincount(bits[corner == c], minlength=65536) > 0
        hit[:8000] = hit[40000:] = False
        if hit.any():
            return torch.tensor([seed]), int(hit.nonzero()[0]) / 65536
    raise AssertionError("no seed has such a threshold")


def just_below(offset: int, batch: int, heads: int, queries: int, keys: int, bit: int):
    """(seed, p) such that the bits of a key with this bit 3 are one below the threshold, which must
    drop them, and so close to it as can be: the kernels compare them with what stands behind them,
    the key's bits xor those of the key with the other bit 3, where it has ones alone."""
    sequence, head, i, j = torch.meshgrid(
        *(torch.arange(n) for n in (batch, heads, queries, keys // 16 * 16)), indexing="ij"
    )
    for seed in range(2000):
        bits = random_bits(torch.tensor([seed]), sequence + offset, head, i, j).long()
        pairs = bits.reshape(-1, 2, 8)
        hit = (pairs[:, 0] ^ pairs[:, 1] == 0xFFFF) & (pairs[:, bit] > 8000)
        hit &= pairs[:, bit] < 40000
        if hit.any():
            return torch.tensor([seed]), (int(pairs[:, bit][hit][0]) + 1) / 65536
    raise AssertionError("no seed has such bits")


def _poisoned_bias(dice: Dice, sizes, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, some -Inf, NaN where no score reads them; a contiguous tensor."""
    if dtype == torch.bool:
        return dice.normal(*sizes) > -0.8
    bias = dice.normal(*sizes)
    bias[dice.normal(*sizes) > 1.3] = -math.inf
    for d, (n, m) in enumerate(zip(sizes, seen.shape, strict=True)):
        seen = seen if n == m else seen.any(d, keepdim=True)
    bias[~seen.expand(sizes)] = NAN
    return bias.to(dtype)


def _unread(empty: torch.Tensor) -> Tensors:
    """Rows of queries that see nothing, empty [B, H, S] or [H, T], in all that they hold."""
    rows = empty.transpose(-2, -1)[..., None]
    return {"q": rows, "out": rows, "lse": empty}


def batched(
    name: str,
    seed: int,
    queries: int,
    keys: int,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (2, 1),
    dim: int = 64,
    lengths: list[int] | None = None,
    holes: bool = False,
    bias: tuple[int, int, int, int] | None = None,
    bias_dtype: torch.dtype = HALF,
    dropout: bool = False,
    below: int | None = None,
    dlse: bool = True,
    loud: float = 1.0,
    scale: float | None = None,
    **options,
) -> Case:
    """Case of bertkern.attention; `bias` is its sizes, `below` the bit of just_below, `dlse` says
    whether lse has a gradient, `loud` how large v and dout are."""
    dice = Dice(seed)
    choice = Options(dim**-0.5 if scale is None else scale, **options)
    if dropout:
        choice.offset = 3
        choice.seed, choice.dropout_p = edge_of_dropout(3, batch, heads[0], queries, keys)
    if below is not None:
        choice.seed, choice.dropout_p = just_below(
            choice.offset, batch, heads[0], queries, keys, below
        )
    leaves = {
        "q": dice.rows(batch, queries, heads[0], dim),
        "k": dice.rows(batch, keys, heads[1], dim),
        "v": dice.rows(batch, keys, heads[1], dim, scale=loud),
    }
    keywords = choice.keywords() | {"return_lse": True}
    exists = torch.ones(batch, keys, dtype=torch.bool)
    if lengths is not None:
        keywords["key_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        exists &= torch.arange(keys) < torch.tensor(lengths)[:, None]
    if holes:
        kept = dice.normal(batch, keys) > -0.5
        kept[0, : keys // 3] = False  # left padding
        keywords["key_padding_mask"] = kept
        exists &= kept
    for key in ("k", "v"):
        leaves[key].masked_fill_(~exists[:, :, None, None], NAN)
    shape = (batch, heads[0], queries, keys)
    seen = (choice.seen(queries, keys) & exists[:, None, None]).expand(shape)
    mask = None
    if bias is not None:
        mask = _poisoned_bias(dice, bias, seen, bias_dtype)
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
        if mask.dtype != torch.bool:
            leaves["bias"], mask = mask, None
    unread = _unread(~seen.any(-1))
    all_heads = unread["q"].all(2, keepdim=True)
    leaves["q"].masked_fill_(all_heads, NAN)
    out = {
        "out": dice.rows(batch, queries, heads[0], dim, scale=loud),
        "lse": dice.normal(*shape[:3]),
    }
    if not dlse:
        del out["lse"]
    for key in out:
        out[key].masked_fill_(unread[key], NAN)

    def given(t: Tensors) -> dict:
        added = t.get("bias", mask)
        return {} if added is None else {"bias": added}

    def call(t: Tensors) -> Tensors:
        results = bertkern.attention(t["q"], t["k"], t["v"], **keywords, **given(t))
        return dict(zip(("out", "lse"), results, strict=True))

    def plain(t: Tensors) -> Tensors:
        full = given(t).get("bias")
        full = None if full is None else full.expand(shape)
        results = [
            one_sequence(
                t["q"][b],
                t["k"][b],
                t["v"][b],
                None if full is None else full[b],
                choice.seen(queries, keys),
                exists[b].nonzero()[:, 0],
                choice.keep(b, heads[0], queries, keys),
                choice,
            )
            for b in range(batch)
        ]
        return dict(zip(("out", "lse"), map(torch.stack, zip(*results, strict=True)), strict=True))

    unread["q"] = unread["q"] & all_heads
    cancels = ("bias",) if bias is not None and bias[3] == 1 else ()
    return Case(name, leaves, call, plain, out, HALF, unread, VIEWS, cancels)


def varlen(
    name: str,
    seed: int,
    lengths: list[tuple[int, int]],
    slack: tuple[int, int],
    *,
    heads: tuple[int, int] = (2, 1),
    dim: int = 64,
    bias: tuple[int, int] | None = None,
    dropout: bool = False,
    **options,
) -> Case:
    """Case of bertkern.attention_varlen; `bias` is its first two sizes."""
    dice = Dice(seed)
    choice = Options(dim**-0.5, **options)
    batch, longest = len(lengths), [max(pair[x] for pair in lengths) for x in (0, 1)]
    if dropout:
        choice.offset = 3
        choice.seed, choice.dropout_p = edge_of_dropout(3, batch, heads[0], *longest)
    starts = [[sum(pair[x] for pair in lengths[:b]) for b in range(batch + 1)] for x in (0, 1)]
    total = [starts[x][-1] + slack[x] for x in (0, 1)]
    leaves = {
        "q": dice.rows(total[0], heads[0], dim),
        "k": dice.rows(total[1], heads[1], dim),
        "v": dice.rows(total[1], heads[1], dim),
    }
    for key, x in (("q", 0), ("k", 1), ("v", 1)):
        leaves[key][starts[x][-1] :] = NAN
    if bias is not None:
        leaves["bias"] = dice.normal(*bias, *longest).to(HALF)
    cu = [torch.tensor(s, dtype=torch.int32) for s in starts]
    keywords = choice.keywords() | {"return_lse": True}
    empty = torch.ones(heads[0], total[0], dtype=torch.bool)
    for b, pair in enumerate(lengths):
        empty[:, starts[0][b] : starts[0][b + 1]] = ~choice.seen(*pair).any(-1)
    unread = _unread(empty)
    leaves["q"].masked_fill_(unread["q"], NAN)
    out = {"out": dice.rows(total[0], heads[0], dim), "lse": dice.normal(heads[0], total[0])}
    for key in out:
        out[key].masked_fill_(unread[key], NAN)

    def call(t: Tensors) -> Tensors:
        added = {"bias": t["bias"]} if "bias" in t else {}
        results = bertkern.attention_varlen(
            t["q"], t["k"], t["v"], *cu, *longest, **keywords, **added
        )
        return dict(zip(("out", "lse"), results, strict=True))

    def plain(t: Tensors) -> Tensors:
        outs, lses = [], []
        for b, (len_q, len_k) in enumerate(lengths):
            q, k, v = (
                t[key][starts[x][b] : starts[x][b + 1]] for key, x in (("q", 0), ("k", 1), ("v", 1))
            )
            added = None
            if "bias" in t:
                added = t["bias"][b if bias[0] > 1 else 0, :, :len_q, :len_k]
            keep = choice.keep(b, heads[0], len_q, len_k)
            seen = choice.seen(len_q, len_k)
            one = one_sequence(q, k, v, added, seen, torch.arange(len_k), keep, choice)
            outs.append(one[0])
            lses.append(one[1])
        rest = t["q"][starts[0][-1] :]
        outs.append(torch.zeros_like(rest))
        lses.append(outs[0].new_full((heads[0], len(rest)), -math.inf))
        return {"out": torch.cat(outs), "lse": torch.cat(lses, -1)}

    return Case(name, leaves, call, plain, out, HALF, unread, VIEWS)


class NanInside:
    """NaN in a query reaches its output and its lse, and no other query's."""

    name = "NaN in a query"

    def prepare(self) -> None:
        dice = Dice(23)
        self.q, self.k, self.v = (dice.rows(1, n, 1, 64) for n in (20, 40, 40))
        self.q[0, 5] = NAN

    def check(self) -> None:
        with torch.no_grad():
            for softcap in (0.0, 1.0):
                out, lse = bertkern.attention(
                    self.q, self.k, self.v, softcap=softcap, return_lse=True
                )
                wrong = torch.arange(20) == 5
                assert torch.equal(out.isnan().all(-1)[0, :, 0], wrong), "out"
                assert torch.equal(out.isnan().any(-1)[0, :, 0], wrong), "out"
                assert torch.equal(lse.isnan()[0, 0], wrong), "lse"


class NanInGradient:
    """NaN in a query, or in the gradient of its output, reaches no gradient of another query, nor,
    but where it is multiplied with 0, that of a key that the query does not see."""

    name = "NaN in a gradient"

    def prepare(self) -> None:
        dice = Dice(24)
        self.leaves = {
            keys: [dice.rows(1, n, 1, 64) for n in (20, keys, keys)] for keys in (40, 80)
        }
        self.out = dice.rows(1, 20, 1, 64)

    def check(self) -> None:
        for keys, general, in_query in product((40, 80), (False, True), (False, True)):
            q, k, v = (t.clone() for t in self.leaves[keys])
            out, unseen = self.out.clone(), slice(keys - 14, None)
            (q if in_query else out)[0, 5] = NAN
            leaves = [t.requires_grad_() for t in (q, k, v)]
            bias = torch.zeros(1, 1, 20, keys, requires_grad=True) if general else None
            got = bertkern.attention(q, k, v, causal=True, bias=bias)
            grads = torch.autograd.grad(got, [*leaves, bias] if general else leaves, out)
            wrong = torch.arange(20) == 5
            assert torch.equal(grads[0].isnan().any(-1)[0, :, 0], wrong), "d q"
            assert not grads[2 if in_query else 1][0, unseen].isnan().any(), "d v or d k"
            if general:
                assert torch.equal(grads[3][0, 0].isnan().any(-1), wrong), "d bias"
                assert not grads[3][0, 0, :, unseen].isnan().any(), "d bias, unseen"


class ManyKeys:
    """More heads than have their keys in the second-level cache, which take turns on Hopper."""

    name = "many keys"

    def prepare(self) -> None:
        dice = Dice(31)
        self.q = dice.rows(1, 70, 4, 96)
        self.k, self.v = (dice.rows(1, 20_000, 1, 96) for _ in range(2))
        self.lengths = torch.tensor([20], dtype=torch.int32)
        q, k, v = (t.double().transpose(1, 2) for t in (self.q, self.k[:, :20], self.v[:, :20]))
        self.expected = ((q @ k.mT) / 96**0.5).softmax(-1).matmul(v).transpose(1, 2)

    def check(self) -> None:
        with torch.no_grad():
            out = bertkern.attention(self.q, self.k, self.v, key_lengths=self.lengths, causal=True)
        assert torch.allclose(out.double(), self.expected, atol=2e-3), "out"


class LongestFirst:
    """On Hopper the sequences of a varlen batch are put in order; each is taken once. There may be
    more of them than a block has threads."""

    def __init__(self, batch: int) -> None:
        self.name, self.batch = f"longest first of {batch}", batch

    def prepare(self) -> None:
        dice = Dice(34)
        lengths = (torch.arange(self.batch) * 7 + 1) % 4
        self.cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        self.order = lengths.argsort(descending=True, stable=True).int()
        self.q, self.k, self.v = (dice.rows(int(lengths.sum()), 1, 8) for _ in range(3))
        self.expected = torch.zeros(self.q.shape, dtype=torch.float64)
        for first, end in zip(self.cu[:-1].tolist(), self.cu[1:].tolist(), strict=True):
            q, k, v = (t[first:end, 0].double() for t in (self.q, self.k, self.v))
            self.expected[first:end, 0] = ((q @ k.mT) / 8**0.5).softmax(-1) @ v

    def check(self) -> None:
        made: list[torch.Tensor] = []
        make = _cuda_attention._order

        def keep(*arguments):
            made.append(make(*arguments))
            return made[-1]

        with torch.no_grad(), mock.patch.object(_cuda_attention, "_order", keep):
            out = bertkern.attention_varlen(self.q, self.k, self.v, self.cu, self.cu, 3, 3)
        assert torch.allclose(out.double(), self.expected, atol=2e-3), "out"
        if (made[0] != -1).any():  # as memory is before: no kernel wants an order
            assert torch.equal(made[0], self.order), "order"


class InfiniteKey:
    """Scores of -Inf; behind the last query of the tile rows of zeros, which must not meet it."""

    def __init__(self, dim: int, keys: int) -> None:
        self.name, self.dim, self.keys = f"an infinite key, D {dim}", dim, keys

    def prepare(self) -> None:
        dice = Dice(24)
        q, k, v = (dice.rows(1, n, 1, self.dim) for n in (20, self.keys, self.keys))
        q.abs_().add_(0.1)
        k[0, 7, 0, 3] = -math.inf
        self.leaves = [t.requires_grad_() for t in (q, k, v)]
        self.dout = dice.rows(1, 20, 1, self.dim)

    def check(self) -> None:
        out = bertkern.attention(*self.leaves)
        for t in (out, *torch.autograd.grad(out, self.leaves, self.dout)[1:]):
            assert t.isfinite().all()


class OnlyKey:
    """Rows at an edge of the band that see one key of several tiles: their ds is 0, where delta
    summed over the rounded out would leave its rounding."""

    name = "one key at an edge"

    def prepare(self) -> None:
        dice = Dice(34)
        q, k, v = (dice.rows(1, 75, 1, 64, scale=loud) for loud in (1.0, 1.0, 4.0))
        self.leaves = [t.requires_grad_() for t in (q, k, v)]
        self.dout = dice.rows(1, 75, 1, 64, scale=4.0)

    def check(self) -> None:
        for options, queries, row in (({"causal": True}, 75, 0), ({"window": (0, 1)}, 61, 60)):
            q, *rest = self.leaves
            out = bertkern.attention(
                q[:, :queries], *rest, dropout_p=0.3, dropout_seed=torch.tensor([5]), **options
            )
            (dq,) = torch.autograd.grad(out, q, self.dout[:, :queries])
            assert (out[0, row] != 0).any()  # its key is kept
            assert dq[0, row].abs().max() < 2e-5


# The first ones are those that find most.
CASES: tuple[
    Callable[
        [], Case | InfiniteKey | LongestFirst | NanInside | NanInGradient | ManyKeys | OnlyKey
    ],
    ...,
] = (
    lambda: batched("short, causal, dropout", 1, 41, 29, dim=56, causal=True, dropout=True),
    lambda: batched("long, window, dropout", 2, 75, 71, dim=56, window=(20, 9), dropout=True),
    lambda: batched(
        "short, D 80, bias, holes", 3, 37, 50, dim=80, holes=True, bias=(2, 2, 37, 50), batch=2
    ),
    lambda: varlen(
        "varlen, causal",
        4,
        [(0, 40), (33, 40), (0, 5), (7, 0), (20, 20), (3, 33), (40, 17)],
        (70, 41),
        causal=True,
    ),
    lambda: batched(
        "long, D 96, bias of a head, softcap, dropout",
        5,
        50,
        83,
        dim=96,
        bias=(1, 2, 1, 83),
        bias_dtype=torch.float32,
        softcap=1.5,
        dropout=True,
    ),
    lambda: batched("long, lengths, holes", 6, 65, 66, batch=3, lengths=[65, 33, 0], holes=True),
    lambda: batched("whole tiles", 7, 64, 64, heads=(2, 2), dlse=False),
    lambda: batched("whole tiles, short", 8, 64, 32, heads=(2, 2), dlse=False),
    lambda: batched(
        "long, bias of a query, dropout",
        9,
        70,
        64,
        bias=(2, 1, 70, 1),
        causal=True,
        dropout=True,
    ),
    lambda: batched("bias of a sequence", 10, 35, 40, bias=(2, 1, 1, 1), bias_dtype=torch.float32),
    lambda: batched(
        "bool mask, holes, short",
        11,
        40,
        24,
        holes=True,
        bias=(1, 2, 40, 24),
        bias_dtype=torch.bool,
    ),
    lambda: varlen(
        "varlen, D 96, window, bias",
        12,
        [(0, 9), (20, 90), (70, 20), (16, 64), (0, 0), (65, 65)],
        (3, 7),
        dim=96,
        window=(12, 5),
        bias=(1, 2),
        dropout=True,
    ),
    lambda: varlen(
        "varlen, D 96, all short", 13, [(66, 75), (5, 1), (4, 0), (1, 17)], (40, 36), dim=96
    ),
    # Queries that see nothing, with NaN in q and dout: before the first key, one alone, behind the
    # last key, one alone there.
    lambda: batched("causal, left padding", 15, 66, 66, causal=True, holes=True),
    lambda: batched("short, causal, left padding", 35, 40, 40, causal=True, holes=True),
    lambda: batched("causal, one query too many", 16, 46, 45, causal=True),
    lambda: batched("short, causal, one query too many", 17, 32, 31, causal=True),
    lambda: batched("window, lengths", 18, 80, 80, window=(11, -1), lengths=[68, 40]),
    lambda: batched(
        "short, D 88, causal, one query too many", 37, 32, 31, dim=88, causal=True, dlse=False
    ),
    lambda: batched("short, window, lengths", 19, 30, 30, window=(4, 0), lengths=[25, 9]),
    # On Hopper by the kernels for any number of keys, whose tiles of v are not cleared.
    lambda: batched(
        "short, D 96, holes, softcap, scale below 0",
        22,
        35,
        20,
        dim=96,
        holes=True,
        softcap=2.0,
        scale=-0.2,
    ),
    NanInside,
    lambda: InfiniteKey(64, 64),
    lambda: InfiniteKey(96, 128),  # on Hopper with keys as rows
    NanInGradient,
    lambda: batched(
        "lengths beyond the last key, and one less", 21, 20, 36, batch=3, lengths=[50, 36, 35]
    ),
    # dp and delta are equal, and so is what delta is summed from.
    lambda: batched("one key each", 20, 40, 40, window=(0, 0), dropout=True, loud=4.0, dlse=False),
    lambda: batched(
        "long, one key each", 25, 20, 84, window=(0, 0), dropout=True, loud=4.0, dlse=False
    ),
    lambda: batched(
        "one key each, of two tiles",
        33,
        20,
        75,
        window=(0, 0),
        dropout=True,
        loud=4.0,
        dlse=False,
    ),
    OnlyKey,
    lambda: batched("just below the threshold", 26, 16, 16, below=0),
    lambda: batched("just below the threshold, bit 3", 27, 16, 16, below=1),
    # Maxima grow by more than a row keeps its factor for, and are below 0.
    lambda: batched("large scores", 28, 18, 64, scale=1.0),
    # The first query of a warp sees all keys of its last tile but one.
    lambda: batched("causal, all but one key", 32, 18, 64, batch=1, causal=True),
    lambda: varlen(
        "varlen, D 120, causal, dropout",
        29,
        [(70, 66), (9, 40)],
        (3, 4),
        dim=120,
        causal=True,
        dropout=True,
    ),
    lambda: varlen("varlen, keys that fill a tile", 36, [(30, 64), (5, 3)], (9, 11)),
    lambda: varlen("varlen, 32 sequences", 30, [(1, 2)] * 32, (1, 1), heads=(1, 1)),
    lambda: LongestFirst(129),
    lambda: LongestFirst(127),  # the last thread has no length
    ManyKeys,
    lambda: batched("D 8, one row", 14, 1, 1, dim=8, heads=(1, 1)),
)
