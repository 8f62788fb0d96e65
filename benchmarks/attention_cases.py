"""The table of cases of attention.

    B batch, S sequence, T total tokens, H heads, D head dim

FLOPs: two products of 2 S S D a head forward; the backward counts its five (one recomputes the
scores), as the papers do; causal half of it; padded batches what their real tokens need. Bytes: q,
k, v and the output once, and in the backward those, the output's gradient and three gradients.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bertkern
from bertkern.ops import _backend

from . import peers as others
from .harness import Case, Peer
from .peers import Peers

HIDDEN = 768  # heads times head dim of BERT-base
FORWARD = ("forward",)
EAGER_BYTES = {"cpu": 2**29, "cuda": 4 * 2**30}  # larger scores are not made by eager ops


def normal(
    *shapes: Sequence[int], device: torch.device | str = "cpu"
) -> Callable[[int], list[Tensor]]:
    """Leaf tensors of N(0, 1), made on the device; the same draw is the same in every run there."""

    def make(draw: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(draw)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": device}
        return [torch.randn(shape, **options) for shape in shapes]

    return make


def mixed_lengths(count: int, longest: int, mean: float = 0.6) -> list[int]:
    """Lengths spread evenly around mean * longest, the last one longest, in a fixed shuffled
    order."""
    shortest = max(1, round((2 * mean - 1) * longest)) if count > 1 else longest
    lengths = torch.linspace(shortest, longest, count).round().long()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return lengths[order].tolist()


def own_peers(
    op: str,
    function: Callable[..., Tensor],
    checked: Callable[..., Tensor] | None,
    device: torch.device,
) -> dict[str, Peer]:
    """bertkern by the backend that it picks; on a GPU also by its Triton kernels, where it picks
    others."""
    peers = {"bertkern": Peer(function, checked=checked)}
    if "triton" not in _backend.backends_of(op, device.type)[1:]:
        return peers

    def by_triton(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(*tensors: Tensor) -> Tensor:
            with bertkern.backend("triton"):
                return run(*tensors)

        return inner

    peers["bertkern [triton]"] = Peer(
        by_triton(function), checked=None if checked is None else by_triton(checked)
    )
    return peers


def attention(
    batch: int,
    seqlen: int,
    dtype: torch.dtype,
    who: Peers,
    *,
    head_dim: int = 64,
    heads: int | None = None,
    causal: bool = False,
    padded: bool = False,
    bias: bool = False,
    dropout_p: float = 0.0,
    curve: str = "",
    passes: tuple[str, ...] = ("forward", "forward+backward"),
) -> Case:
    """Self-attention of [B, S, H, D]; `padded`: sequences of 60 % of S on average."""
    device, heads = who.device, heads or HIDDEN // head_dim
    lengths = mixed_lengths(batch, seqlen) if padded else [seqlen] * batch
    key_lengths = torch.tensor(lengths, dtype=torch.int32, device=device) if padded else None
    seen = None
    if key_lengths is not None:
        seen = (torch.arange(seqlen, device=device) < key_lengths[:, None])[:, None, None, :]

    def variants(make: Callable[[float], Callable[..., Tensor]]) -> Peer:
        """With dropout, the check is of the same function without."""
        return Peer(make(dropout_p), checked=make(0.0) if dropout_p else None)

    def own(p: float) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return bertkern.attention(
                q, k, v, key_lengths=key_lengths, bias=bias, causal=causal, dropout_p=p
            )

        return run

    peers = own_peers("attention", own(dropout_p), own(0.0) if dropout_p else None, device)
    size = torch.empty((), dtype=dtype).element_size()
    if "sdpa" in who:
        peers["torch sdpa"] = variants(lambda p: others.sdpa(seen, causal, p))
        # On a CPU two backends exist, and a mask or dropout leaves no choice.
        names = list(others.SDPA_BACKENDS) if device.type == "cuda" else ["math"]
        for name in names if not curve or device.type == "cuda" else []:
            peers[f"torch sdpa {name}"] = variants(
                lambda p, name=name: others.sdpa(seen, causal, p, name)  # type: ignore[misc]
            )
    if "eager" in who and batch * heads * seqlen * seqlen * size <= EAGER_BYTES[device.type]:
        peers["torch eager"] = variants(lambda p: others.eager(seen, causal, p))
    plain = not (bias or dropout_p)
    on_gpu = device.type == "cuda"
    # On a CPU it has no backward, and compiles for 20 s a shape: two shapes.
    if "flex" in who and plain and (on_gpu or (seqlen == 512 and head_dim == 64 and not curve)):
        peers["FlexAttention"] = Peer(
            others.flex(key_lengths, causal, seqlen),
            passes=("forward", "forward+backward") if on_gpu else FORWARD,
        )
    if not (padded or bias):
        for group in others.FLASH:
            if group in who and (not dropout_p or group in others.FLASH_WITH_DROPOUT):
                peers[others.GROUPS[group][1]] = variants(
                    lambda p, group=group: others.flash_attention(group, causal, p)  # type: ignore[misc]
                )
        if "xformers" in who:
            peers["xFormers"] = variants(lambda p: others.xformers(None, causal, p))
        if "transformer-engine" in who:
            peers["Transformer Engine"] = variants(
                lambda p: others.transformer_engine(heads, head_dim, causal, p)
            )

    product = 2.0 * heads * head_dim * sum(n * n for n in lengths) * (0.5 if causal else 1.0)
    tensor_bytes = float(sum(lengths) * heads * head_dim * size)
    bias_bytes = float(heads * seqlen * seqlen * size) if bias else 0.0
    shape: dict[str, int | str] = {"B": batch, "S": seqlen, "H": heads, "D": head_dim}
    if causal:
        shape["causal"] = "yes"
    if padded:
        shape["padding"] = "40%"
    if bias:
        shape["bias"] = "1HSS"
    if dropout_p:
        shape["dropout"] = str(dropout_p)
    tensors = [(batch, seqlen, heads, head_dim)] * 3
    large = seqlen > 2048 and not (padded or bias)

    def one_head(t: Tensor) -> Tensor:
        return t[:1, :, :1]

    return Case(
        op="attention",
        shape=shape,
        dtype=dtype,
        inputs=normal(*tensors, *[(1, heads, seqlen, seqlen)] * bias, device=device),
        plain=others.eager(seen, causal, 0.0),
        peers=peers,
        flops={"forward": 2 * product, "forward+backward": 7 * product},
        bytes={
            "forward": 4 * tensor_bytes + bias_bytes,
            "forward+backward": 12 * tensor_bytes + 3 * bias_bytes,
        },
        passes=passes,
        part=one_head if large else lambda t: t,
        out_like=0,
        items=float(sum(lengths)),
        unit="tokens",
        curve=curve,
    )


def attention_varlen(
    lengths: Sequence[int], dtype: torch.dtype, who: Peers, dropout_p: float = 0.0
) -> Case:
    """Self-attention of mixed lengths: packed, against torch's on padded tensors with a mask."""
    device, head_dim = who.device, 64
    heads = HIDDEN // head_dim
    batch, longest, total = len(lengths), max(lengths), sum(lengths)
    here = torch.tensor(lengths, device=device)
    rows = torch.arange(longest, device=device) < here[:, None]  # [B, S] real tokens
    cu_seqlens = F.pad(here.cumsum(0), (1, 0)).int()

    def pad(packed: Tensor) -> Tensor:  # [T, H, D] -> [B, S, H, D]
        padded = packed.new_zeros(batch, longest, *packed.shape[1:])
        padded[rows] = packed
        return padded

    def unpad(padded: Tensor) -> Tensor:
        return padded[rows]

    def own(p: float) -> Callable[..., Tensor]:
        return lambda q, k, v: bertkern.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=p
        )

    single = others.eager(None, False, 0.0)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True)
        return torch.cat([single(a[None], b[None], c[None])[0] for a, b, c in parts])

    def padded_peer(make: Callable[[float], Callable[..., Tensor]]) -> Peer:
        checked = make(0.0) if dropout_p else None
        return Peer(make(dropout_p), enter=pad, leave=unpad, checked=checked)

    seen = rows[:, None, None, :]
    peers = own_peers("attention", own(dropout_p), own(0.0) if dropout_p else None, device)
    if "sdpa" in who:
        peers["torch sdpa, padded"] = padded_peer(lambda p: others.sdpa(seen, False, p))
    if "eager" in who:
        peers["torch eager, padded"] = padded_peer(lambda p: others.eager(seen, False, p))
    if "flex" in who and not dropout_p and device.type == "cuda":
        mask = others.flex(here, False, longest)
        peers["FlexAttention, padded"] = Peer(mask, enter=pad, leave=unpad)
    for group in others.FLASH:
        if group in who and (not dropout_p or group in others.FLASH_WITH_DROPOUT):
            packed = functools.partial(others.flash_attention_varlen, group, cu_seqlens, longest)
            peers[others.GROUPS[group][1]] = Peer(
                packed(dropout_p), checked=packed(0.0) if dropout_p else None
            )

    size = torch.empty((), dtype=dtype).element_size()
    tensor_bytes = float(total * heads * head_dim * size)
    product = 2.0 * heads * head_dim * sum(length**2 for length in lengths)
    shape: dict[str, int | str] = {"B": batch, "S": f"{min(lengths)}..{longest}", "T": total}
    shape |= {"H": heads, "D": head_dim}
    if dropout_p:
        shape["dropout"] = str(dropout_p)
    return Case(
        op="attention_varlen",
        shape=shape,
        dtype=dtype,
        inputs=normal(*[(total, heads, head_dim)] * 3, device=device),
        plain=one_by_one,
        peers=peers,
        flops={"forward": 2 * product, "forward+backward": 7 * product},
        bytes={"forward": 4 * tensor_bytes, "forward+backward": 12 * tensor_bytes},
        items=float(total),
        unit="tokens",
    )


def cases(who: Peers, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Every case of attention, sized for the device: 1,024 tokens on a CPU, 65,536 on a GPU."""
    if who.device.type == "cuda":
        yield from _gpu_cases(who, dtype, quick)
    else:
        yield from _cpu_cases(who, dtype, quick)


def _cpu_cases(who: Peers, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    tokens = 1024
    for head_dim in (64,) if quick else (32, 64, 128):
        for seqlen in (128, 512) if head_dim == 64 else (256,):
            yield attention(tokens // seqlen, seqlen, dtype, who, head_dim=head_dim)
    if not quick:
        yield attention(2, 512, dtype, who, causal=True)
    for dropout_p in (0.1,) if quick else (0.0, 0.1):
        yield attention(8, 128, dtype, who, padded=True, dropout_p=dropout_p)
        yield attention_varlen(mixed_lengths(4, 512), dtype, who, dropout_p)
    yield attention(8, 128, dtype, who, bias=True)
    if quick:
        return
    for seqlen in (32, 128, 256, 512, 1024):
        yield attention(2048 // seqlen, seqlen, dtype, who, curve="S")
    for batch in (1, 32):
        yield attention(batch, 128, dtype, who, curve="B")
    for seqlen in (4096, 16384):
        yield attention(1, seqlen, dtype, who, heads=1, curve="S", passes=FORWARD)


def _gpu_cases(who: Peers, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    short, long = (128, 256, 384, 512), (1024, 2048, 4096, 8192, 16384)
    if quick:
        short, long = (128, 512), (4096, 16384)
    for head_dim in (64,) if quick else (64, 32, 128):
        for causal in (False, True):
            for seqlen in short if not causal else ():
                yield attention(
                    65536 // seqlen, seqlen, dtype, who, head_dim=head_dim, causal=causal, curve="S"
                )
            for seqlen in long:
                yield attention(
                    16384 // seqlen, seqlen, dtype, who, head_dim=head_dim, causal=causal, curve="S"
                )
    for seqlen in short:
        for dropout_p in (0.1,) if quick else (0.0, 0.1):
            batch = 65536 // seqlen
            yield attention(batch, seqlen, dtype, who, padded=True, dropout_p=dropout_p)
            yield attention_varlen(mixed_lengths(batch, seqlen), dtype, who, dropout_p)
    yield attention(64, 128, dtype, who, bias=True)
    for batch in (1, 8) if quick else (1, 2, 4, 8, 32, 128):
        yield attention(batch, 128, dtype, who, curve="B")
