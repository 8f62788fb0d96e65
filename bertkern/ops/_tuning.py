"""Measures tiles on the user's GPU: what `bertkern tune` does.

A row of the tuning table (kernels/tuning.py) is measured inside the op that uses it, so that the
time holds whatever the choice costs elsewhere: the op runs once with the shipped tile and once with
each candidate, a neighbour of it with one number halved, doubled, or one stage more or less. A
candidate counts only where its result agrees with the shipped tile's. The winner is stored when it
is MARGIN faster, since two runs of the same kernel differ by less.

Workloads are BERT's: 16,384 tokens, 768 columns of heads, dropout 0.1 (a sequence's length is the
class's: 1024 keys, or all that fit one tile of a short row).
"""

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertkern.kernels import tuning, tuning_file

from ._backend import backend
from .attention import attention
from .attention_decode import attention_decode
from .dropout_add_layer_norm import dropout_add_layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy

OPS = ("attention", "attention_decode", "linear", "linear_cross_entropy", "layer_norm")
MARGIN = 0.03
_TOKENS = 16384
_COLUMNS = 768
_LONG = 1024
_DROPOUT = 0.1

Measure = Callable[[tuning.Key, Any, Any], float]


class Row(NamedTuple):
    """What was found out about one row: microseconds of its op with the shipped tile and with the
    fastest."""

    key: tuning.Key
    shipped: Any
    best: Any
    shipped_us: float
    best_us: float
    tried: int
    rejected: int

    @property
    def wins(self) -> bool:
        """Whether the fastest tile is worth storing."""
        return self.best_us < self.shipped_us * (1 - MARGIN)


class Rejected(Exception):
    """A candidate that cannot be used here; the message says why."""


def rows(ops: tuple[str, ...], architecture: str, itemsize: int, limit: int) -> list[Any]:
    """(key, shipped tile) of the rows to measure; itemsize and limit 0 choose all.

    Raises:
        ValueError: nothing is left.
    """
    found = [
        (key, tile)
        for key, tile in tuning.shipped()
        if key.op in ops
        and key.architecture == architecture
        and itemsize in (0, key.bytes or itemsize)
        and limit in (0, key.limit)
    ]
    if not found:
        raise ValueError(
            f"the tuning table has no row of {', '.join(ops)} with {itemsize or 'any'} bytes and "
            f"limit {limit or 'any'} for {architecture}"
        )
    return found


def candidates(key: tuning.Key, tile: Any) -> Iterator[Any]:
    """The neighbours of a tile that may stand in its place."""
    for name in tile._fields[:-1]:
        number = getattr(tile, name)
        steps = (number - 1, number + 1) if name == "stages" else (number // 2, number * 2)
        for step in steps:
            candidate = tile._replace(**{name: step})
            if tuning.valid(key, candidate[:-1]):
                yield candidate


def tune(
    chosen: list[Any], measure: Measure, stored: dict[str, Any], store: Callable[[], None]
) -> Iterator[Row]:
    """Measure rows one after another; a winner enters `stored` and is written at once.

    Args:
        chosen: (key, shipped tile) of each row.
        measure: (key, tile, shipped tile) -> microseconds; raises Rejected for a bad candidate.
        stored: rows of the user's file by key; a row that the shipped tile wins leaves it.
        store: writes `stored`.
    """
    for key, shipped in chosen:
        best, rejected, tried = shipped, 0, 0
        shipped_us = best_us = measure(key, shipped, shipped)
        for candidate in candidates(key, shipped):
            tried += 1
            try:
                us = measure(key, candidate, shipped)
            except Rejected:
                rejected += 1
                continue
            if us < best_us:
                best, best_us = candidate, us
        row = Row(key, shipped, best, shipped_us, best_us, tried, rejected)
        stored.pop(str(key), None)
        if row.wins:
            stored[str(key)] = {
                "tile": list(best[:-1]),
                "microseconds": round(best_us, 2),
                "shipped": list(shipped[:-1]),
                "shipped_microseconds": round(shipped_us, 2),
                "date": datetime.date.today().isoformat(),
            }
        store()
        yield row


class OnGpu:
    """Measures on a CUDA device; keeps a row's inputs and the shipped tile's result."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._key: tuning.Key | None = None
        self._work: Callable[[], tuple[Tensor, ...]] | None = None
        self._expected: tuple[Tensor, ...] = ()

    def __call__(self, key: tuning.Key, tile: Any, shipped: Any) -> float:
        """Median microseconds of the row's op with a tile."""
        with torch.cuda.device(self._device):
            return self._measure(key, tile, shipped)

    def _measure(self, key: tuning.Key, tile: Any, shipped: Any) -> float:
        import triton

        if key != self._key:
            self._work = None  # the last row's tensors go before the next row's come
            self._work, self._key = workload(key, shipped), key
            with tuning.trial(key, shipped), backend("triton"):
                self._expected = self._work()
        assert self._work is not None
        with tuning.trial(key, tile), backend("triton"):
            if tile != shipped:
                try:
                    agree = all(map(_close, self._work(), self._expected))
                except Exception as error:  # the compiler's, the launcher's: all mean "not this"
                    raise Rejected(f"{type(error).__name__}: {error}") from error
                if not agree:
                    raise Rejected("its result differs from the shipped tile's")
            return 1000 * triton.testing.do_bench(self._work, return_mode="median")


def _close(out: Tensor, expected: Tensor) -> bool:
    """Two orders of one sum agree to some roundings of the larger values."""
    difference = (out.float() - expected.float()).abs().max()
    return bool(difference <= 0.02 * expected.float().abs().max())


def workload(key: tuning.Key, tile: Any) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs the op of a row once and returns its result."""
    dtype = torch.float32 if key.bytes == 4 else torch.bfloat16
    return _WORKLOADS[key.op](key, tile, dtype)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
    return x.requires_grad_()


def _forward_or_backward(
    key: tuning.Key, forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """The forward without a graph, or the backward alone of one forward."""
    if key.kernel.startswith("fwd"):

        def run_forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(),)

        return run_forward
    out = forward()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _attention(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    length = tile.block_n if "short" in key.kernel else _LONG
    heads = max(1, _COLUMNS // key.limit)
    shape = (_TOKENS // length, length, heads, key.limit)
    q, k, v = (_random(*shape, dtype=dtype) for _ in range(3))
    bias: Tensor | None = None
    inputs: tuple[Tensor, ...] = (q, k, v)
    if "bias" in key.kernel:
        bias = _random(1, heads, length, length, dtype=dtype)
        if key.kernel == "bwd_dbias":
            inputs = (*inputs, bias)
        else:
            bias = bias.detach()
    seed = torch.tensor(1, device="cuda")
    return _forward_or_backward(
        key,
        lambda: attention(q, k, v, bias=bias, dropout_p=_DROPOUT, dropout_seed=seed),
        inputs,
    )


def _attention_decode(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    heads = max(1, _COLUMNS // key.limit)
    key_heads = heads if key.kernel == "vector" else max(1, heads // 4)
    batch = 64
    q = _random(batch, heads, key.limit, dtype=dtype).detach()
    k, v = (_random(batch, _LONG, key_heads, key.limit, dtype=dtype).detach() for _ in range(2))
    lengths = torch.full((batch,), _LONG, dtype=torch.int32, device="cuda")
    return lambda: (attention_decode(q, k, v, lengths),)


def _linear(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    x = _random(_TOKENS, _COLUMNS, dtype=dtype)
    w = _random(4 * _COLUMNS, _COLUMNS, dtype=dtype)
    b = _random(4 * _COLUMNS, dtype=dtype)
    return _forward_or_backward(key, lambda: linear(x, w, b, activation="gelu"), (x, w, b))


def _linear_cross_entropy(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    x = _random(_TOKENS // 8, _COLUMNS, dtype=dtype)
    w = _random(30522, _COLUMNS, dtype=dtype)
    target = torch.arange(_TOKENS // 8, device="cuda")
    return _forward_or_backward(key, lambda: linear_cross_entropy(x, w, None, target), (x, w))


def _layer_norm(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    x, residual = (_random(_TOKENS, key.limit, dtype=dtype) for _ in range(2))
    weight, bias = (_random(key.limit, dtype=torch.float32) for _ in range(2))
    seed = torch.tensor(1, device="cuda")

    def forward() -> Tensor:
        y = dropout_add_layer_norm(x, residual, weight, bias, dropout_p=_DROPOUT, dropout_seed=seed)
        assert isinstance(y, Tensor)  # two of them only with prenorm
        return y

    return _forward_or_backward(key, forward, (x, residual, weight, bias))


_WORKLOADS: dict[str, Callable[[tuning.Key, Any, torch.dtype], Any]] = {
    "attention": _attention,
    "attention_decode": _attention_decode,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "layer_norm": _layer_norm,
}


def this_gpu(device: torch.device) -> tuple[str, str]:
    """(name, architecture of the tuning table) of this machine's GPU.

    Raises:
        ValueError: the device is none, or several models are visible.
    """
    if device.type != "cuda":
        raise ValueError("bertkern tune measures on a CUDA GPU, and torch sees none here")
    name = tuning_file.gpu_name()
    if name is None:
        raise ValueError(
            "several models of GPU are visible and a file serves one: name one in "
            "CUDA_VISIBLE_DEVICES"
        )
    from bertkern.kernels.device import architecture

    found = architecture(torch.empty(0, device=device))
    if found == "interpreter":
        raise ValueError("TRITON_INTERPRET=1 is set: kernels run in the interpreter, not on a GPU")
    return name, found


def stored(gpu: str) -> tuple[dict[str, Any], Path, Callable[[], None]]:
    """(rows of the GPU's file, the file, a function that writes the rows and puts them to use)."""
    path = tuning_file.path_of(gpu)
    found = tuning_file.read(path)

    def store() -> None:
        tuning_file.write(path, gpu, found)
        tuning.reread()

    return found, path, store


def files() -> list[Path]:
    """The stored files, of every GPU and Triton version."""
    return sorted(tuning_file.folder().glob("tuning-*.json"))
