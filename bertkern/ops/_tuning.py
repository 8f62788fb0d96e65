"""Measures tiles and backends on the user's GPU: what `bertkern tune` does.

A row of the tuning table (kernels/tuning.py) is measured inside the op that uses it, so that the
time holds whatever the choice costs elsewhere: the op runs once with the shipped tile and once with
each candidate, a neighbour of it with one number halved, doubled, or one stage more or less. A
candidate counts only where its result agrees with the shipped tile's. The winner is stored when it
is MARGIN faster, since two runs of the same kernel differ by less.

Workloads are BERT's: 16,384 tokens, 768 columns of heads, dropout 0.1 (a sequence's length is the
class's: 1024 keys, or all that fit one tile of a short row).

Attention in 16 bits has CUDA kernels beside Triton's. Each pass and head dim of it is timed with
both, over sequences of 128 and of 512 tokens, and the faster one is stored; CUDA's is only where
its results agree with Triton's. A head dim has one backend for all lengths: a sequence's bits must
not depend on those beside it.
"""

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertkern.kernels import tuning, tuning_file

from ._backend import MEASURED_HEAD_DIMS, backend, cannot, forget_choices, measured_row
from .attention import attention
from .attention_decode import attention_decode
from .dropout_add_layer_norm import dropout_add_layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy

OPS = ("attention", "attention_decode", "linear", "linear_cross_entropy", "layer_norm")
MARGIN = 0.03
_DEVICE = "cuda"
_TOKENS = 16384
_COLUMNS = 768
_LONG = 1024
_DROPOUT = 0.1

_LENGTHS = (128, 512)  # of the sequences that backends are compared on

Measure = Callable[[tuning.Key, Any, Any], float]
# (backend, "fwd" or "bwd", head dim) -> microseconds
MeasureBackend = Callable[[str, str, int], float]


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


class Choice(NamedTuple):
    """Which backend of a pass of attention is faster, and the microseconds of both; `refused`: why
    CUDA's does not count."""

    row: str
    backend: str
    cuda_us: float | None
    triton_us: float
    refused: str


def backend_rows(itemsize: int, limit: int, device: torch.device) -> list[tuple[str, int]]:
    """(pass, head dim) of attention that both backends have here; itemsize and limit 0 choose
    all."""
    if itemsize not in (0, 2) or cannot("cuda", "attention", torch.bfloat16, device, 64):
        return []
    dims = [d for d in MEASURED_HEAD_DIMS if limit in (0, d)]
    return [(direction, d) for d in dims for direction in ("fwd", "bwd")]


def choose_backends(
    chosen: list[tuple[str, int]],
    measure: MeasureBackend,
    stored: dict[str, Any],
    store: Callable[[], None],
) -> Iterator[Choice]:
    """Measure backends one pass and head dim after another; each choice is written at once.

    Args:
        chosen: (pass, head dim), as of `backend_rows`.
        measure: (backend, pass, head dim) -> microseconds; Triton's comes first, and raises
            Rejected for a CUDA kernel that does not agree with it.
        stored, store: as in `tune`.
    """
    for direction, head_dim in chosen:
        key = measured_row(f"attention_{direction}", head_dim)
        triton_us, cuda_us, refused = measure("triton", direction, head_dim), None, ""
        try:
            cuda_us = measure("cuda", direction, head_dim)
        except Rejected as error:
            refused = str(error)
        wins = cuda_us is not None and cuda_us < triton_us
        name, other = ("cuda", "triton") if wins else ("triton", "cuda")
        times = {"cuda": cuda_us, "triton": triton_us}
        stored[key] = {
            "backend": name,
            "microseconds": _rounded(times[name]),
            "other": other,
            "other_microseconds": _rounded(times[other]),
            "date": datetime.date.today().isoformat(),
        }
        store()
        yield Choice(key, name, cuda_us, triton_us, refused)


def _rounded(microseconds: float | None) -> float | None:
    return None if microseconds is None else round(microseconds, 2)


class BackendsOnGpu:
    """Measures backends of attention on a CUDA device; keeps Triton's results of a row."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._expected: list[tuple[Tensor, ...]] = []

    def __call__(self, name: str, direction: str, head_dim: int) -> float:
        """Median microseconds of all lengths together."""
        import triton

        total = 0.0
        if name == "triton":
            self._expected = []
        with torch.cuda.device(self._device), backend(name):
            for at, length in enumerate(_LENGTHS):
                try:
                    work = _attention_pass(direction, length, head_dim, torch.float16)
                    results = work()
                except Exception as error:  # a launch that fails means "not this"
                    if name == "triton":
                        raise
                    raise Rejected(f"{type(error).__name__}: {error}") from error
                if name == "triton":
                    self._expected.append(results)
                elif not all(map(_close, results, self._expected[at])):
                    raise Rejected(f"its result differs from Triton's at {length} tokens")
                total += 1000 * triton.testing.do_bench(work, return_mode="median")
        return total


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


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(_DEVICE).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=_DEVICE, dtype=dtype)
    return x.requires_grad_()


def _forward_or_backward(
    kernel: str, forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """The forward without a graph, or the backward alone of one forward."""
    if kernel.startswith("fwd"):

        def run_forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(),)

        return run_forward
    out = forward()
    dout = _random(*out.shape, dtype=out.dtype, seed=3).detach()
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _attention(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    length = tile.block_n if "short" in key.kernel else _LONG
    return _attention_pass(key.kernel, length, key.limit, dtype)


def _attention_pass(
    kernel: str, length: int, head_dim: int, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    heads = max(1, _COLUMNS // head_dim)
    shape = (_TOKENS // length, length, heads, head_dim)
    q, k, v = (_random(*shape, dtype=dtype, seed=n) for n in range(3))
    bias: Tensor | None = None
    inputs: tuple[Tensor, ...] = (q, k, v)
    if "bias" in kernel:
        bias = _random(1, heads, length, length, dtype=dtype)
        if kernel == "bwd_dbias":
            inputs = (*inputs, bias)
        else:
            bias = bias.detach()
    seed = torch.tensor(1, device=_DEVICE)
    return _forward_or_backward(
        kernel,
        lambda: attention(q, k, v, bias=bias, dropout_p=_DROPOUT, dropout_seed=seed),
        inputs,
    )


def _attention_decode(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    heads = max(1, _COLUMNS // key.limit)
    key_heads = heads if key.kernel == "vector" else max(1, heads // 4)
    batch = 64
    q = _random(batch, heads, key.limit, dtype=dtype).detach()
    k, v = (_random(batch, _LONG, key_heads, key.limit, dtype=dtype).detach() for _ in range(2))
    lengths = torch.full((batch,), _LONG, dtype=torch.int32, device=_DEVICE)
    return lambda: (attention_decode(q, k, v, lengths),)


def _linear(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    x = _random(_TOKENS, _COLUMNS, dtype=dtype)
    w = _random(4 * _COLUMNS, _COLUMNS, dtype=dtype)
    b = _random(4 * _COLUMNS, dtype=dtype)
    return _forward_or_backward(key.kernel, lambda: linear(x, w, b, activation="gelu"), (x, w, b))


def _linear_cross_entropy(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    x = _random(_TOKENS // 8, _COLUMNS, dtype=dtype)
    w = _random(30522, _COLUMNS, dtype=dtype)
    target = torch.arange(_TOKENS // 8, device=_DEVICE)
    return _forward_or_backward(
        key.kernel, lambda: linear_cross_entropy(x, w, None, target), (x, w)
    )


def _layer_norm(key: tuning.Key, tile: Any, dtype: torch.dtype) -> Any:
    x, residual = (_random(_TOKENS, key.limit, dtype=dtype) for _ in range(2))
    weight, bias = (_random(key.limit, dtype=torch.float32) for _ in range(2))
    seed = torch.tensor(1, device=_DEVICE)

    def forward() -> Tensor:
        y = dropout_add_layer_norm(x, residual, weight, bias, dropout_p=_DROPOUT, dropout_seed=seed)
        assert isinstance(y, Tensor)  # two of them only with prenorm
        return y

    return _forward_or_backward(key.kernel, forward, (x, residual, weight, bias))


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
        forget_choices()

    return found, path, store


def files() -> list[Path]:
    """The stored files, of every GPU and Triton version."""
    return sorted(tuning_file.folder().glob("tuning-*.json"))


def as_shown(row: dict[str, Any]) -> tuple[Any, ...]:
    """(what was chosen, its microseconds, instead of what, its microseconds, the date) of a stored
    row."""
    loser = "other" if "backend" in row else "shipped"
    names = ("microseconds", loser, f"{loser}_microseconds", "date")
    return tuning_file.chosen(row), *(row[name] for name in names)
