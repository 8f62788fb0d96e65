"""The table of cases of the ops: shapes, peers, and what the mathematics costs. Attention's are in
attention_cases.py.

    N tokens, C columns, K and F input and hidden columns of the FFN, V words of the vocabulary

FLOPs: a product of [m, k] by [k, n] is 2 m k n. Bytes: every tensor that must be read or written,
once, in the tested dtype. Where an op drops, so do its peers, and all are checked without.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import bertkern

from . import attention_cases
from . import peers as others
from .attention_cases import normal, own_peers
from .harness import Case, Peer
from .peers import Peers, compiled

HIDDEN, FFN_HIDDEN, VOCABULARY, POSITIONS = 768, 3072, 30522, 512  # BERT-base
LAYER_NORM_EPS = 1e-12


def size_of(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty((), dtype=dtype).element_size()


def torch_peers(
    plain: Callable[..., Tensor],
    who: Peers,
    checked: Callable[..., Tensor] | None = None,
    curve: str = "",
) -> dict[str, Peer]:
    """The plain ops, as they are and compiled; on a CPU, where every shape of a curve would be
    compiled for ten seconds, not compiled in curves."""
    peers = {}
    if "eager" in who:
        peers["torch eager"] = Peer(plain, checked=checked)
    if "compile" in who and (who.device.type == "cuda" or not curve):
        peers["torch.compile"] = Peer(compiled(plain), checked=checked)
    return peers


def layer_norm(rows: int, columns: int, dtype: torch.dtype, who: Peers, curve: str = "") -> Case:
    """LayerNorm over the last dimension."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (columns,), weight, bias, LAYER_NORM_EPS)

    def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bertkern.layer_norm(x, weight, bias, LAYER_NORM_EPS)

    peers = own_peers("layer_norm", own, None, who.device) | torch_peers(plain, who, curve=curve)
    if "liger" in who:
        peers["Liger-Kernel"] = Peer(others.liger_layer_norm(LAYER_NORM_EPS))
    if "transformer-engine" in who:
        peers["Transformer Engine"] = Peer(
            others.transformer_engine_layer_norm(columns, LAYER_NORM_EPS)
        )
    tensor_bytes = float(rows * columns * size_of(dtype))
    return Case(
        op="layer_norm",
        shape={"N": rows, "C": columns},
        dtype=dtype,
        inputs=normal((rows, columns), (columns,), (columns,), device=who.device),
        plain=plain,
        peers=peers,
        flops={"forward": 8.0 * rows * columns, "forward+backward": 20.0 * rows * columns},
        bytes={"forward": 2 * tensor_bytes, "forward+backward": 5 * tensor_bytes},
        items=float(rows),
        unit="tokens",
        curve=curve,
    )


def dropout_add_layer_norm(
    rows: int, columns: int, dtype: torch.dtype, who: Peers, dropout_p: float
) -> Case:
    """LayerNorm(residual + dropout(x)): the end of each half of a BERT layer."""

    def plain_with(p: float) -> Callable[..., Tensor]:
        def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            dropped = F.dropout(x, p) if p else x
            return F.layer_norm(residual + dropped, (columns,), weight, bias, LAYER_NORM_EPS)

        return plain

    def own_with(p: float) -> Callable[..., Tensor]:
        def own(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return bertkern.dropout_add_layer_norm(x, residual, weight, bias, p, LAYER_NORM_EPS)

        return own

    plain, own = plain_with(0.0), own_with(0.0)
    drops = dropout_p > 0
    tensor_bytes = float(rows * columns * size_of(dtype))
    shape: dict[str, int | str] = {"N": rows, "C": columns}
    if drops:
        shape["dropout"] = str(dropout_p)
    return Case(
        op="dropout_add_layer_norm",
        shape=shape,
        dtype=dtype,
        inputs=normal(*[(rows, columns)] * 2, (columns,), (columns,), device=who.device),
        plain=plain,
        peers=own_peers(
            "dropout_add_layer_norm", own_with(dropout_p), own if drops else None, who.device
        )
        | torch_peers(plain_with(dropout_p), who, plain if drops else None),
        flops={"forward": 9.0 * rows * columns, "forward+backward": 22.0 * rows * columns},
        bytes={"forward": 3 * tensor_bytes, "forward+backward": 8 * tensor_bytes},
        items=float(rows),
        unit="tokens",
    )


def embedding_layer_norm(batch: int, seqlen: int, dtype: torch.dtype, who: Peers) -> Case:
    """The three embeddings of BERT summed and normalised."""
    rows, device = batch * seqlen, who.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows,), generator=generator).to(device)
    positions = torch.arange(seqlen).repeat(batch).to(device)
    types = torch.zeros(rows, dtype=torch.int64, device=device)

    def plain(word: Tensor, position: Tensor, kind: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = F.embedding(ids, word) + F.embedding(positions, position) + F.embedding(types, kind)
        return F.layer_norm(x, (HIDDEN,), weight, bias, LAYER_NORM_EPS)

    def own(*tables: Tensor) -> Tensor:
        return bertkern.embedding_layer_norm(ids, positions, types, *tables, LAYER_NORM_EPS)

    size = size_of(dtype)
    row_bytes, words = float(rows * HIDDEN * size), float(VOCABULARY * HIDDEN * size)
    return Case(
        op="embedding_layer_norm",
        shape={"N": rows, "C": HIDDEN, "V": VOCABULARY},
        dtype=dtype,
        inputs=normal(
            *((n, HIDDEN) for n in (VOCABULARY, POSITIONS, 2)), (HIDDEN,), (HIDDEN,), device=device
        ),
        plain=plain,
        peers=own_peers("embedding_layer_norm", own, None, device) | torch_peers(plain, who),
        flops={"forward": 10.0 * rows * HIDDEN, "forward+backward": 24.0 * rows * HIDDEN},
        # the gradient of the word table is dense: it is written once
        bytes={"forward": 2 * row_bytes, "forward+backward": 4 * row_bytes + words},
        items=float(rows),
        unit="tokens",
    )


def linear(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, who: Peers, activation: str | None
) -> Case:
    """activation(x w^T + b): the projections, and the first half of the FFN."""

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, w, b)
        return F.gelu(y) if activation else y

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return bertkern.linear(x, w, b, activation=activation)

    size = size_of(dtype)
    product = 2.0 * rows * inputs * outputs
    x, w, y = rows * inputs, inputs * outputs, rows * outputs
    return Case(
        op=f"linear+{activation}" if activation else "linear",
        shape={"N": rows, "K": inputs, "F": outputs},
        dtype=dtype,
        inputs=scaled((rows, inputs), (outputs, inputs), (outputs,), device=who.device),
        plain=plain,
        peers=own_peers("linear", own, None, who.device) | torch_peers(plain, who),
        flops={"forward": product, "forward+backward": 3 * product},
        bytes={
            "forward": float(size * (x + w + y)),
            "forward+backward": float(size * (3 * x + 3 * w + 2 * y)),
        },
        items=float(rows),
        unit="tokens",
    )


def ffn(rows: int, dtype: torch.dtype, who: Peers, dropout_p: float = 0.0, curve: str = "") -> Case:
    """dropout(gelu(x w1^T + b1) w2^T + b2)."""

    def plain_with(p: float) -> Callable[..., Tensor]:
        def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            y = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
            return F.dropout(y, p) if p else y

        return plain

    def own_with(p: float) -> Callable[..., Tensor]:
        return lambda x, w1, b1, w2, b2: bertkern.ffn(x, w1, b1, w2, b2, dropout_p=p)

    size = size_of(dtype)
    drops = dropout_p > 0
    product = 2.0 * rows * HIDDEN * FFN_HIDDEN
    x, w = rows * HIDDEN, HIDDEN * FFN_HIDDEN
    shape: dict[str, int | str] = {"N": rows, "K": HIDDEN, "F": FFN_HIDDEN}
    if drops:
        shape["dropout"] = str(dropout_p)
    plain = plain_with(0.0)
    return Case(
        op="ffn",
        shape=shape,
        dtype=dtype,
        inputs=scaled(
            (rows, HIDDEN),
            (FFN_HIDDEN, HIDDEN),
            (FFN_HIDDEN,),
            (HIDDEN, FFN_HIDDEN),
            (HIDDEN,),
            device=who.device,
        ),
        plain=plain,
        peers=own_peers("ffn", own_with(dropout_p), own_with(0.0) if drops else None, who.device)
        | torch_peers(plain_with(dropout_p), who, plain if drops else None, curve),
        flops={"forward": 2 * product, "forward+backward": 6 * product},
        bytes={
            "forward": float(size * (2 * x + 2 * w)),
            "forward+backward": float(size * (5 * x + 6 * w)),
        },
        items=float(rows),
        unit="tokens",
        curve=curve,
    )


def linear_cross_entropy(rows: int, dtype: torch.dtype, who: Peers) -> Case:
    """Mean loss of a masked-LM head: each of the rows predicts one of BERT's words."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(VOCABULARY, (rows,), generator=generator).to(who.device)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(x, w, b)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, target)

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return bertkern.linear_cross_entropy(x, w, b, target)

    peers = own_peers("linear_cross_entropy", own, None, who.device) | torch_peers(plain, who)
    if "eager" in who and hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        peers["torch linear_cross_entropy"] = Peer(
            lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b)
        )
    if "liger" in who:
        peers["Liger-Kernel"] = Peer(others.liger_linear_cross_entropy(target))
    size = size_of(dtype)
    product = 2.0 * rows * HIDDEN * VOCABULARY
    x, w = rows * HIDDEN, HIDDEN * VOCABULARY
    return Case(
        op="linear_cross_entropy",
        shape={"N": rows, "K": HIDDEN, "V": VOCABULARY},
        dtype=dtype,
        inputs=scaled((rows, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,), device=who.device),
        plain=plain,
        peers=peers,
        flops={"forward": product, "forward+backward": 3 * product},
        bytes={
            "forward": float(size * (x + w)),
            "forward+backward": float(size * 3 * (x + w)),
        },
        items=float(rows),
        unit="predictions",
    )


def scaled(
    *shapes: Sequence[int], device: torch.device | str = "cpu"
) -> Callable[[int], list[Tensor]]:
    """As `normal`, with weights of size 1/sqrt(fan in), so that activations stay of size 1."""
    make = normal(*shapes, device=device)

    def make_scaled(draw: int) -> list[Tensor]:
        x, *parameters = make(draw)
        return [x, *(p * p.shape[-1] ** -0.5 for p in parameters)]

    return make_scaled


def cases(who: Peers, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Every case of the ops, sized for the device: 1,024 tokens on a CPU, 16,384 on a GPU."""
    yield from attention_cases.cases(who, dtype, quick)
    tokens = 16384 if who.device.type == "cuda" else 1024
    yield layer_norm(tokens, HIDDEN, dtype, who)
    for dropout_p in (0.1,) if quick else (0.0, 0.1):
        yield dropout_add_layer_norm(tokens, HIDDEN, dtype, who, dropout_p)
    yield embedding_layer_norm(tokens // 128, 128, dtype, who)
    yield linear(tokens, HIDDEN, FFN_HIDDEN, dtype, who, "gelu")
    yield ffn(tokens, dtype, who, 0.0)
    predicted = tokens // 8  # 1 in 8 words is masked
    if quick and who.device.type == "cpu":
        predicted //= 4
    yield linear_cross_entropy(predicted, dtype, who)
    if quick:
        return
    if who.device.type == "cuda":
        yield layer_norm(tokens, 1024, dtype, who)
    yield linear(tokens, HIDDEN, 3 * HIDDEN, dtype, who, None)
    yield ffn(tokens, dtype, who, 0.1)
    for rows in (tokens // 64, tokens // 16, tokens // 4, tokens * 4):
        yield layer_norm(rows, HIDDEN, dtype, who, curve="N")
    for rows in (tokens // 64, tokens // 16, tokens // 4):
        yield ffn(rows, dtype, who, curve="N")
