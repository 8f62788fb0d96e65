"""The table of cases of the ops: shapes, peers, and what the mathematics costs.

    B batch, S sequence, T total tokens, H heads, D head dim
    N tokens, C columns, K and F input and hidden columns of the FFN, V words of the vocabulary

FLOPs: a product of [m, k] by [k, n] is 2 m k n. Attention's backward counts its five products (one
recomputes the scores), as the papers do. Bytes: every tensor that must be read or written, once, in
the tested dtype.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import bertkern

from .harness import Case, Peer

HEADS, HEAD_DIM = 12, 64  # BERT-base
HIDDEN, FFN_HIDDEN, VOCABULARY = 768, 3072, 30522
LAYER_NORM_EPS = 1e-12


def random(*shapes: Sequence[int], seed: int = 0) -> Callable[[], list[Tensor]]:
    """Leaf tensors of N(0, 1), the same in every run."""

    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    return make


def sdpa_BSHD(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention on [B, S, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def eager_BSHD(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in three torch ops."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    probabilities = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (probabilities @ v).transpose(1, 2)


def attention(batch: int, seqlen: int, dtype: torch.dtype) -> Case:
    """Self-attention of full sequences."""
    size = torch.empty((), dtype=dtype).element_size()
    tensor_bytes = batch * seqlen * HEADS * HEAD_DIM * size
    product = 2.0 * batch * HEADS * seqlen * seqlen * HEAD_DIM
    shape = (batch, seqlen, HEADS, HEAD_DIM)
    return Case(
        op="attention",
        shape={"B": batch, "S": seqlen, "H": HEADS, "D": HEAD_DIM},
        dtype=dtype,
        inputs=random(shape, shape, shape),
        plain=eager_BSHD,
        peers={
            "bertkern": Peer(bertkern.attention),
            "torch sdpa": Peer(sdpa_BSHD),
            "torch eager": Peer(eager_BSHD),
        },
        flops={"forward": 2 * product, "forward+backward": 7 * product},
        bytes={"forward": 4.0 * tensor_bytes, "forward+backward": 12.0 * tensor_bytes},
    )


def attention_varlen(lengths: Sequence[int], dtype: torch.dtype) -> Case:
    """Self-attention of mixed lengths: packed, against torch's on padded tensors with a mask."""
    batch, longest, total = len(lengths), max(lengths), sum(lengths)
    rows = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]  # [B, S] real tokens
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    on_device: dict[tuple[str, torch.device], Tensor] = {}

    def here(name: str, tensor: Tensor, device: torch.device) -> Tensor:
        return on_device.setdefault((name, device), tensor.to(device))

    def pad(packed: Tensor) -> Tensor:  # [T, H, D] -> [B, S, H, D]
        padded = packed.new_zeros(batch, longest, *packed.shape[1:])
        padded[here("rows", rows, packed.device)] = packed
        return padded

    def unpad(padded: Tensor) -> Tensor:
        return padded[here("rows", rows, padded.device)]

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu = here("cu_seqlens", cu_seqlens, q.device)
        return bertkern.attention_varlen(q, k, v, cu, cu, longest, longest)

    def padded_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = here("rows", rows, q.device)[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True)
        return torch.cat([eager_BSHD(a[None], b[None], c[None])[0] for a, b, c in parts])

    size = torch.empty((), dtype=dtype).element_size()
    tensor_bytes = total * HEADS * HEAD_DIM * size
    product = 2.0 * HEADS * HEAD_DIM * sum(length**2 for length in lengths)
    shape = (total, HEADS, HEAD_DIM)
    return Case(
        op="attention_varlen",
        shape={
            "B": batch,
            "S": f"{min(lengths)}..{longest}",
            "T": total,
            "H": HEADS,
            "D": HEAD_DIM,
        },
        dtype=dtype,
        inputs=random(shape, shape, shape),
        plain=one_by_one,
        peers={
            "bertkern": Peer(varlen),
            "torch sdpa, padded": Peer(padded_sdpa, enter=pad, leave=unpad),
            "torch eager, one by one": Peer(one_by_one),
        },
        flops={"forward": 2 * product, "forward+backward": 7 * product},
        bytes={"forward": 4.0 * tensor_bytes, "forward+backward": 12.0 * tensor_bytes},
    )


def layer_norm(rows: int, columns: int, dtype: torch.dtype) -> Case:
    """LayerNorm over the last dimension."""

    def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (columns,), weight, bias, LAYER_NORM_EPS)

    def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bertkern.layer_norm(x, weight, bias, LAYER_NORM_EPS)

    tensor_bytes = rows * columns * torch.empty((), dtype=dtype).element_size()
    return Case(
        op="layer_norm",
        shape={"N": rows, "C": columns},
        dtype=dtype,
        inputs=random((rows, columns), (columns,), (columns,)),
        plain=torch_layer_norm,
        peers={"bertkern": Peer(own), "torch": Peer(torch_layer_norm)},
        flops={"forward": 8.0 * rows * columns, "forward+backward": 20.0 * rows * columns},
        bytes={"forward": 2.0 * tensor_bytes, "forward+backward": 5.0 * tensor_bytes},
    )


def dropout_add_layer_norm(rows: int, columns: int, dtype: torch.dtype) -> Case:
    """LayerNorm(residual + x), dropout off: the end of each half of a BERT layer at inference."""

    def torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(residual + x, (columns,), weight, bias, LAYER_NORM_EPS)

    def own(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bertkern.dropout_add_layer_norm(x, residual, weight, bias, 0.0, LAYER_NORM_EPS)

    tensor_bytes = rows * columns * torch.empty((), dtype=dtype).element_size()
    return Case(
        op="dropout_add_layer_norm",
        shape={"N": rows, "C": columns},
        dtype=dtype,
        inputs=random((rows, columns), (rows, columns), (columns,), (columns,)),
        plain=torch_add_norm,
        peers={"bertkern": Peer(own), "torch": Peer(torch_add_norm)},
        flops={"forward": 9.0 * rows * columns, "forward+backward": 22.0 * rows * columns},
        bytes={"forward": 4.0 * tensor_bytes, "forward+backward": 8.0 * tensor_bytes},
    )


def linear_gelu(rows: int, dtype: torch.dtype) -> Case:
    """gelu(x w^T + b), the first half of the FFN."""

    def torch_linear_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w, b))

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return bertkern.linear(x, w, b, activation="gelu")

    size = torch.empty((), dtype=dtype).element_size()
    product = 2.0 * rows * HIDDEN * FFN_HIDDEN
    x, w, y = rows * HIDDEN, HIDDEN * FFN_HIDDEN, rows * FFN_HIDDEN
    return Case(
        op="linear+gelu",
        shape={"N": rows, "K": HIDDEN, "F": FFN_HIDDEN},
        dtype=dtype,
        inputs=scaled((rows, HIDDEN), (FFN_HIDDEN, HIDDEN), (FFN_HIDDEN,)),
        plain=torch_linear_gelu,
        peers={"bertkern": Peer(own), "torch": Peer(torch_linear_gelu)},
        flops={"forward": product, "forward+backward": 3 * product},
        bytes={
            "forward": float(size * (x + w + y)),
            "forward+backward": float(size * (3 * x + 3 * w + 2 * y)),
        },
    )


def ffn(rows: int, dtype: torch.dtype) -> Case:
    """gelu(x w1^T + b1) w2^T + b2."""

    def torch_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    size = torch.empty((), dtype=dtype).element_size()
    product = 2.0 * rows * HIDDEN * FFN_HIDDEN
    x, w = rows * HIDDEN, HIDDEN * FFN_HIDDEN
    return Case(
        op="ffn",
        shape={"N": rows, "K": HIDDEN, "F": FFN_HIDDEN},
        dtype=dtype,
        inputs=scaled(
            (rows, HIDDEN), (FFN_HIDDEN, HIDDEN), (FFN_HIDDEN,), (HIDDEN, FFN_HIDDEN), (HIDDEN,)
        ),
        plain=torch_ffn,
        peers={"bertkern": Peer(bertkern.ffn), "torch": Peer(torch_ffn)},
        flops={"forward": 2 * product, "forward+backward": 6 * product},
        bytes={
            "forward": float(size * (2 * x + 2 * w)),
            "forward+backward": float(size * (5 * x + 6 * w)),
        },
    )


def linear_cross_entropy(rows: int, dtype: torch.dtype) -> Case:
    """Mean loss of a masked-LM head: each of the rows predicts one of BERT's words."""
    targets = torch.randint(VOCABULARY, (rows,), generator=torch.Generator().manual_seed(0))
    on_device: dict[torch.device, Tensor] = {}

    def target(x: Tensor) -> Tensor:
        return on_device.setdefault(x.device, targets.to(x.device))

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return bertkern.linear_cross_entropy(x, w, b, target(x))

    def torch_loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(x, w, b)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, target(x))

    size = torch.empty((), dtype=dtype).element_size()
    product = 2.0 * rows * HIDDEN * VOCABULARY
    x, w = rows * HIDDEN, HIDDEN * VOCABULARY
    return Case(
        op="linear_cross_entropy",
        shape={"N": rows, "K": HIDDEN, "V": VOCABULARY},
        dtype=dtype,
        inputs=scaled((rows, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)),
        plain=torch_loss,
        peers={"bertkern": Peer(own), "torch": Peer(torch_loss)},
        flops={"forward": product, "forward+backward": 3 * product},
        bytes={
            "forward": float(size * (x + w)),
            "forward+backward": float(size * 3 * (x + w)),
        },
    )


def scaled(*shapes: Sequence[int]) -> Callable[[], list[Tensor]]:
    """As `random`, with weights of size 1/sqrt(fan in), so that activations stay of size 1."""
    make = random(*shapes)

    def make_scaled() -> list[Tensor]:
        x, *parameters = make()
        return [x, *(p * p.shape[-1] ** -0.5 for p in parameters)]

    return make_scaled


def mixed_lengths(count: int, longest: int) -> list[int]:
    """Lengths spread evenly over longest/16 .. longest, in a shuffled order that never changes."""
    shortest = max(1, longest // 16)
    lengths = torch.linspace(shortest, longest, count).round().long()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return lengths[order].tolist()


def ops(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Iterator[Case]:
    """Every case of the ops, sized for the device: 1,024 tokens on a CPU, 16,384 on a GPU."""
    tokens = 16384 if device.type == "cuda" else 1024
    for seqlen in (128, 512) if quick else (32, 64, 128, 256, 512):
        yield attention(tokens // seqlen, seqlen, dtype)
    yield attention_varlen(mixed_lengths(tokens // 256 or 1, 512), dtype)
    yield layer_norm(tokens, HIDDEN, dtype)
    yield dropout_add_layer_norm(tokens, HIDDEN, dtype)
    yield linear_gelu(tokens, dtype)
    yield ffn(tokens, dtype)
    yield linear_cross_entropy(tokens // 8, dtype)  # 1 in 8 words is masked
