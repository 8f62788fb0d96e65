"""attention_decode by its definition, a sequence and a head at a time, and inputs to try it on.

Legend: B batch, S keys that the cache has room for, H query heads, Hk key heads, D head dim.
"""

import math
from dataclasses import dataclass

import torch

from bertkern.reference.tolerance import assert_close


@dataclass(frozen=True)
class Case:
    """A batch of sequences by the lengths of their caches, and the options."""

    why: str
    lengths: tuple[int, ...]
    room: int = 0  # keys that the cache has room for beyond the longest
    key_heads: int = 2
    group: int = 1  # query heads of a key head
    head_dim: int = 32
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    scale: float | None = None
    bias: str = ""  # its dimensions that are not 1, of "bhs"; "" is none
    bias_kind: str = (
        "float"  # "float32", "bool", "rising" (later keys weigh more), "inf" (-inf in a
    )
    # third) or "nothing" (-inf for one head)
    layout: str = "BSHD"  # or "BHSD": the cache is kept head by head


class Inputs:
    """Random q, caches with NaN and Inf behind the lengths, lengths and bias of a case."""

    def __init__(self, case, dtype, device, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.case = case
        batch, heads = len(case.lengths), case.key_heads * case.group
        size = max(case.lengths) + case.room
        self.q = normal(batch, heads, case.head_dim)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        behind = torch.arange(size, device=device) >= self.lengths[:, None]  # [B, S]
        poison = torch.full((size,), math.nan, dtype=dtype, device=device)
        poison[1::2] = math.inf
        self.k, self.v = (
            torch.where(
                behind[:, :, None, None],
                poison[None, :, None, None],
                normal(batch, size, case.key_heads, case.head_dim),
            )
            for _ in range(2)
        )
        if case.layout == "BHSD":
            self.k, self.v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in self.kv)
        self.bias = None
        if case.bias:
            sizes = {"b": batch, "h": heads, "s": size}
            shape = [sizes[d] if d in case.bias else 1 for d in "bhs"]
            self.bias = normal(*shape).unsqueeze(2)  # [B, H, 1, S]
            if case.bias_kind == "float32":
                self.bias = self.bias.float()
            elif case.bias_kind == "bool":
                self.bias = self.bias > 0
            elif case.bias_kind == "rising":
                self.bias += torch.arange(size, device=device).to(dtype) / 20
            elif case.bias_kind == "inf":
                self.bias = self.bias.masked_fill(self.bias > 0.5, -math.inf)
            elif case.bias_kind == "nothing":  # head 0 of sequence 0 sees no key
                self.bias[:1, :1] = -math.inf

    @property
    def kv(self):
        return self.k, self.v

    @property
    def options(self):
        """The keyword arguments of the op."""
        case = self.case
        return dict(bias=self.bias, window=case.window, softcap=case.softcap, scale=case.scale)


def visible(case, length):
    """The first key that the query of a sequence of this length sees."""
    left = -1 if case.window is None else case.window[0]
    return max(0, length - 1 - left) if left >= 0 else 0


def plain(inputs, dtype):
    """(out [B, H, D], lse [B, H]) in plain torch in `dtype`; NaN where a query sees nothing."""
    case = inputs.case
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = torch.full(inputs.q.shape, math.nan, dtype=dtype, device=inputs.q.device)
    lse = torch.full(out.shape[:2], -math.inf, dtype=dtype, device=out.device)
    for b, length in enumerate(case.lengths):
        keys = slice(visible(case, length), length)
        for h in range(out.shape[1]) if length else ():
            k, v = (t[b, keys, h // case.group].to(dtype) for t in inputs.kv)  # [n, D]
            s = (k @ inputs.q[b, h].to(dtype)) * scale
            if case.softcap:
                s = case.softcap * torch.tanh(s / case.softcap)
            if inputs.bias is not None:
                bias = inputs.bias.expand(*out.shape[:2], 1, inputs.k.shape[1])[b, h, 0, keys]
                if bias.dtype == torch.bool:
                    s = s.masked_fill(~bias, -math.inf)
                else:
                    s = s + bias.to(dtype)
            out[b, h] = torch.softmax(s, 0) @ v
            lse[b, h] = torch.logsumexp(s, 0)
    return out, lse


def check(inputs, out, lse):
    """Holds (out, lse) of the op to the tolerance rule; rows that see nothing are 0 and -inf."""
    dtype = inputs.q.dtype
    exact, exact_lse = plain(inputs, torch.float64)
    same, _ = plain(inputs, dtype)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert_close(*(t.flatten(0, 1) for t in (out, exact, same)))  # a row is a query
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    # In fp32 whatever the dtype is: a few roundings of a number of this size. (The tolerance rule
    # compares with torch's error on the same few numbers, which may be none by chance.)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-6, rtol=1e-6)


# Keys of a split are 32 in the interpreter.
CASES = [
    Case("one key", (1, 1)),
    Case("empty, one, and the edges of a split", (0, 1, 31, 32, 33, 64)),
    Case("odd lengths, cache larger than any", (5, 77, 41), room=20, key_heads=1),
    Case("only empty sequences", (0, 0), room=3),
    Case("more splits than are combined at once", (530, 97), key_heads=1, head_dim=8),
    Case("later splits weigh more", (530, 97), key_heads=1, head_dim=8, bias="s",
         bias_kind="rising"),
    Case("cache head by head", (40, 17), layout="BHSD"),
    Case("head dim 1", (33, 9), head_dim=1),
    Case("head dim 20", (50, 7), head_dim=20, layout="BHSD"),
    Case("head dim 80", (37,), head_dim=80),
    Case("head dim 128", (40, 3), head_dim=128, key_heads=1),
    Case("head dim 256", (45,), head_dim=256, key_heads=1),
    Case("window", (0, 1, 10, 11, 12, 50, 96), window=(10, -1), key_heads=1),
    Case("window of one key", (0, 3, 40), window=(0, 0)),
    Case("window over three splits", (100, 97, 64, 65), window=(63, 5), key_heads=1),
    Case("window larger than any length", (70, 4), window=(1000, 0)),
    Case("softcap", (50, 8), softcap=1.5),
    Case("softcap of small products", (50,), softcap=30.0, scale=1e-3),
    Case("negative scale", (40,), scale=-0.7),
    Case("zero scale", (40,), scale=0.0),
    Case("bias of everything", (60, 20, 0), bias="bhs"),
    Case("bias of heads", (60, 20), bias="hs", bias_kind="float32", room=5),
    Case("bias of sequences", (60, 20), bias="bs", softcap=2.0),
    Case("bias without keys", (40,), bias="h"),
    Case("bias of -inf", (60, 20), bias="bhs", bias_kind="inf"),
    Case("bias that hides everything from one head", (60, 20), bias="bhs", bias_kind="nothing"),
    Case("bool bias", (60, 20), bias="bs", bias_kind="bool", window=(40, 0)),
    Case("grouped heads", (0, 33, 70), group=3, room=10),
    Case("grouped heads, all options", (50, 97, 1), group=2, window=(70, 0), softcap=3.0,
         bias="bhs", bias_kind="inf", layout="BHSD", head_dim=20),
    Case("grouped heads, bool bias of heads", (40, 5), group=2, bias="hs", bias_kind="bool"),
    Case("one key head for 5", (70, 32), key_heads=1, group=5, head_dim=64),
    Case("one key head for 17: two blocks of query heads", (40, 7), key_heads=1, group=17,
         head_dim=16, bias="bhs"),
    Case("grouped heads, head dim 256", (40,), key_heads=1, group=2, head_dim=256),
]  # fmt: skip
