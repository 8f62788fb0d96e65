"""Tile sizes, warps and stages: every number that was chosen for speed, in one table.

A row is chosen by op, pass, head dim or row width, dtype, architecture and the sequence's own
length class. Never by batch, tokens or the longest sequence: these would change the order of
summation, and with it the bits of a result (batch invariance). Nothing is tried out at a first
call; `bertkern tune` measures on the user's own GPU, and what it stored takes a row's place
(tuning_file.py).

Legend: bytes = bytes of one element (2: fp16, bf16; 4: fp32, IEEE or tf32 by torch's setting);
architecture "sm80" (Ampere, Ada: a tile fits in Ada's 99 KB of shared memory), "sm90" (Hopper and
newer) or "interpreter" (small tiles, so that small tests have several of them). A row's last field
is the measurement that chose it. Those "not measured" follow the published tiles of
FlashAttention-2/3 and of Triton's tutorials, made smaller until the compile gate
(tests/kernels/gate.py) saw no spilled register.

Length class: a sequence is short for a pass when its own keys fit in one tile of the pass's short
row. D 32 and 64 with 16 bits: 128 keys; and so on, read from block_n.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from . import tuning_file

NOT_MEASURED = "not measured"


class AttentionTile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    measured: str = NOT_MEASURED


class GemmTile(NamedTuple):
    """BLOCK_M rows by BLOCK_N columns of the result, BLOCK_K of the summed dimension at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    measured: str = NOT_MEASURED


class RowTile(NamedTuple):
    """BLOCK_R rows by BLOCK_C columns."""

    block_r: int
    block_c: int
    warps: int
    measured: str = NOT_MEASURED


class DecodeTile(NamedTuple):
    """KEYS of the cache that one program reads at once."""

    keys: int
    warps: int
    measured: str = NOT_MEASURED


class Key(NamedTuple):
    """What names a row: `limit` is the largest head dim or width that it serves, 0 where any is."""

    op: str
    kernel: str
    bytes: int
    architecture: str
    limit: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


GROUP_M = (
    8  # GEMM: row blocks that share one pass over the columns, so that their operands stay in L2
)

# Backward of the LayerNorm family: programs, each with its own partial sum of dweight and dbias. A
# constant (twice Hopper's 132 SMs), because it fixes the order of the sum.
LAYER_NORM_PARTIALS = 264
LAYER_NORM_MAX_BLOCK = 8192  # widest tile: wider rows are read in pieces

# Attention. Long sequences: fwd, bwd_dq (owns queries), bwd_dkdv (owns keys). Short ones, whose
# keys all fit in one tile: fwd_short, bwd_short (owns the keys of a key/value head, walks over
# queries; dq, dk and dv in one launch). "biased": scores with a bias, a softcap or a scale <= 0,
# which need more registers. bwd_dbias owns a tile of the bias gradient, and is for both. "tf32":
# fp32 on tensor cores, where torch's setting allows it.
#
# (bytes, architecture) -> pass -> (block_m, block_n, warps, stages[, measurement]) for head dims up
# to 32, 64, 128 and 256.
_ATTENTION_ROWS: dict[tuple[int, str], dict[str, tuple[tuple[Any, ...], ...]]] = {
    (2, "sm90"): {
        "fwd": ((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "fwd_biased": ((128, 32, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (128, 16, 8, 2)),
        "fwd_short": ((64, 128, 4, 1), (64, 128, 4, 1), (64, 128, 4, 1), (64, 64, 4, 1)),
        "fwd_short_biased": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
        "bwd_dq": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
        "bwd_dq_biased": ((128, 32, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (128, 16, 8, 2)),
        "bwd_dkdv": ((32, 128, 8, 2), (32, 64, 4, 1), (16, 128, 8, 2), (32, 32, 8, 1)),
        "bwd_dkdv_biased": ((32, 128, 8, 2), (16, 128, 8, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
        "bwd_short": ((32, 128, 8, 1), (32, 128, 8, 1), (16, 128, 8, 1), (16, 32, 8, 1)),
        "bwd_short_biased": ((32, 128, 8, 1), (16, 128, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
        "bwd_dbias": ((64, 64, 8, 1), (64, 64, 8, 1), (128, 32, 8, 1), (64, 16, 8, 1)),
    },
    (2, "sm80"): {
        "fwd": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        "fwd_biased": ((128, 32, 8, 3), (128, 64, 8, 2), (64, 16, 4, 1), (32, 32, 8, 1)),
        "fwd_short": ((64, 128, 4, 1), (64, 128, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1)),
        "fwd_short_biased": ((64, 64, 4, 1), (64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
        "bwd_dq": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 1), (32, 32, 8, 2)),
        "bwd_dq_biased": ((64, 32, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 2)),
        "bwd_dkdv": ((16, 128, 8, 1), (16, 128, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1)),
        "bwd_dkdv_biased": ((16, 128, 8, 2), (16, 128, 8, 1), (32, 32, 8, 1), (16, 16, 4, 2)),
        "bwd_short": ((32, 128, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 2)),
        "bwd_short_biased": ((32, 128, 8, 1), (16, 64, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
        "bwd_dbias": ((64, 32, 4, 1), (32, 64, 8, 1), (64, 32, 8, 1), (16, 16, 4, 1)),
    },
    (4, "sm90"): {
        "fwd": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1)),
        "fwd_short": ((64, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "bwd_dq": ((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 3)),
        "bwd_dkdv": ((16, 16, 8, 2), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 8, 2)),
        "bwd_short": ((16, 32, 4, 1), (16, 16, 4, 2), (16, 16, 8, 3), (16, 16, 8, 2)),
        "bwd_dbias": ((32, 32, 8, 1), (64, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
        "fwd_tf32": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
        "fwd_short_tf32": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 8, 1)),
        "bwd_dq_tf32": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
        "bwd_dkdv_tf32": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 8, 3)),
        "bwd_short_tf32": ((16, 64, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 2)),
        "bwd_dbias_tf32": ((64, 32, 4, 1), (64, 32, 8, 1), (32, 16, 4, 1), (16, 32, 8, 1)),
    },
    (4, "sm80"): {
        "fwd": ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
        "fwd_short": ((64, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        "bwd_dq": ((32, 16, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
        "bwd_dkdv": ((16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 3), (16, 16, 8, 2)),
        "bwd_short": ((16, 32, 4, 1), (16, 16, 8, 2), (16, 16, 16, 2), (16, 16, 8, 2)),
        "bwd_dbias": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "fwd_tf32": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
        "fwd_short_tf32": ((64, 64, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1), (32, 32, 8, 1)),
        "bwd_dq_tf32": ((32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
        "bwd_dkdv_tf32": ((16, 16, 4, 3), (16, 32, 8, 2), (16, 16, 8, 3), (16, 16, 8, 2)),
        "bwd_short_tf32": ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 2), (16, 16, 8, 2)),
        "bwd_dbias_tf32": ((64, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    },
}
# (pass, bytes, architecture) -> head dim up to which the row serves -> tile.
ATTENTION: dict[tuple[str, int, str], dict[int, AttentionTile]] = {
    (_pass, _bytes, _architecture): {
        _limit: AttentionTile(*_tile)
        for _limit, _tile in zip((32, 64, 128, 256), _tiles, strict=True)
    }
    for (_bytes, _architecture), _passes in _ATTENTION_ROWS.items()
    for _pass, _tiles in _passes.items()
}
for _pass in ("fwd", "fwd_short", "bwd_dq", "bwd_dkdv", "bwd_short", "bwd_dbias"):
    for _bytes in (2, 4):
        ATTENTION[_pass, _bytes, "interpreter"] = {
            256: AttentionTile(32, 16, 4, 1) if _pass == "bwd_dq" else AttentionTile(16, 32, 4, 1)
        }

# attention_decode, (kind, bytes, architecture) -> head dim -> tile. "vector" has one query head for
# each key head: 32 KB of keys and 32 KB of values in flight, two programs an SM. "group" has
# several heads and with them twice the registers: half of that, three programs an SM.
ATTENTION_DECODE: dict[tuple[str, int, str], dict[int, DecodeTile]] = {
    (_kind, _bytes, _architecture): {
        _limit: DecodeTile(_in_flight // (_limit * _bytes), 8) for _limit in (32, 64, 128, 256)
    }
    for _kind, _in_flight in (("vector", 32768), ("group", 16384))
    for _bytes in (2, 4)
    for _architecture in ("sm80", "sm90")
}
for _kind in ("vector", "group"):
    for _bytes in (2, 4):
        ATTENTION_DECODE[_kind, _bytes, "interpreter"] = {256: DecodeTile(32, 4)}

# (kernel, bytes, architecture) -> any width -> tile. fwd: y = x wᵀ; bwd_input: dx = dz w;
# bwd_weight: dw = dzᵀ x, rows of the result = rows of w, summed over tokens.
GEMM: dict[tuple[str, int, str], dict[int, GemmTile]] = {
    ("fwd", 2, "sm90"): {0: GemmTile(128, 128, 64, 8, 3)},
    ("bwd_input", 2, "sm90"): {0: GemmTile(128, 64, 64, 8, 3)},
    ("bwd_weight", 2, "sm90"): {0: GemmTile(128, 128, 64, 8, 3)},
    ("fwd", 2, "sm80"): {0: GemmTile(128, 64, 64, 8, 3)},
    ("bwd_input", 2, "sm80"): {0: GemmTile(128, 64, 32, 8, 3)},
    ("bwd_weight", 2, "sm80"): {0: GemmTile(128, 128, 32, 8, 3)},
    ("fwd", 4, "sm90"): {0: GemmTile(64, 64, 32, 8, 3)},
    ("bwd_input", 4, "sm90"): {0: GemmTile(64, 64, 32, 8, 2)},
    ("bwd_weight", 4, "sm90"): {0: GemmTile(64, 64, 32, 8, 2)},
}
for _pass in ("fwd", "bwd_input", "bwd_weight"):
    GEMM[_pass, 4, "sm80"] = GEMM[_pass, 4, "sm90"]
    for _bytes in (2, 4):
        GEMM[_pass, _bytes, "interpreter"] = {0: GemmTile(32, 16, 32, 4, 1)}

# linear_cross_entropy. fwd: m, s of x wᵀ; bwd_dz: a chunk of dz, both as linear's fwd; bwd_dx:
# dx += dz w. Its weight gradient is linear's bwd_weight.
LINEAR_CROSS_ENTROPY: dict[tuple[str, int, str], dict[int, GemmTile]] = {
    ("fwd", 2, "sm90"): {0: GemmTile(128, 128, 64, 8, 3)},
    ("bwd_dz", 2, "sm90"): {0: GemmTile(128, 128, 64, 8, 3)},
    ("bwd_dx", 2, "sm90"): {0: GemmTile(128, 128, 64, 8, 3)},
    ("fwd", 2, "sm80"): {0: GemmTile(128, 64, 64, 8, 3)},
    ("bwd_dz", 2, "sm80"): {0: GemmTile(128, 64, 64, 8, 3)},
    ("bwd_dx", 2, "sm80"): {0: GemmTile(128, 64, 32, 8, 3)},
    ("fwd", 4, "sm90"): {0: GemmTile(64, 64, 32, 8, 3)},
    ("bwd_dz", 4, "sm90"): {0: GemmTile(64, 64, 32, 8, 3)},
    ("bwd_dx", 4, "sm90"): {0: GemmTile(64, 64, 32, 8, 3)},
}
for _pass in ("fwd", "bwd_dz", "bwd_dx"):
    LINEAR_CROSS_ENTROPY[_pass, 4, "sm80"] = LINEAR_CROSS_ENTROPY[_pass, 4, "sm90"]
    for _bytes in (2, 4):
        LINEAR_CROSS_ENTROPY[_pass, _bytes, "interpreter"] = {0: GemmTile(32, 16, 32, 4, 1)}

# Classes that one program of the forward walks: it fixes the order of the sum over classes. 2048
# make 15 splits of BERT's vocabulary, so that few rows still fill a GPU.
VOCABULARY_SPLIT = {"sm80": 2048, "sm90": 2048, "interpreter": 64}
# Classes of one chunk of the backward, (fewest, most), and the bytes of dz that it aims at. They
# decide memory and launches, and no result.
VOCABULARY_CHUNK = {"sm80": (2048, 8192), "sm90": (2048, 8192), "interpreter": (32, 128)}
VOCABULARY_CHUNK_BYTES = {"sm80": 64 << 20, "sm90": 64 << 20, "interpreter": 16 << 10}
COMBINE_ROWS = 128  # rows of one program that combines the splits

# (pass, architecture) -> columns up to which the row serves -> tile. Narrower rows take as many
# columns as they have (to the next power of two); rows wider than the widest are read in pieces of
# it. A tile is computed in fp32 whatever the dtype, so all dtypes share it.
LAYER_NORM: dict[tuple[str, str], dict[int, RowTile]] = {
    (_pass, _architecture): {
        256: RowTile(16, 256, _warps),
        512: RowTile(8, 512, _warps),
        1024: RowTile(4, 1024, _warps),
        2048: RowTile(2, 2048, _warps),
        4096: RowTile(1, 4096, _warps),
    }
    for _pass, _warps in (("fwd", 4), ("bwd", 8))
    for _architecture in ("sm80", "sm90")
}
LAYER_NORM["bwd", "sm80"][1024] = RowTile(2, 1024, 8)
LAYER_NORM["fwd", "sm90"][1024] = RowTile(2, 1024, 4)
for _architecture in ("sm80", "sm90"):
    LAYER_NORM["fwd", _architecture][LAYER_NORM_MAX_BLOCK] = RowTile(1, LAYER_NORM_MAX_BLOCK, 16)
for _pass in ("fwd", "bwd"):
    LAYER_NORM[_pass, "interpreter"] = {
        64: RowTile(16, 64, 4),
        128: RowTile(8, 128, 4),
        256: RowTile(4, 256, 4),
    }

# Elementwise kernels and the reduction of partial sums: architecture -> columns -> tile.
ELEMENTWISE: dict[str, dict[int, RowTile]] = {
    "sm80": {64: RowTile(32, 64, 4), 0: RowTile(16, 128, 4)},
    "sm90": {64: RowTile(32, 64, 4), 0: RowTile(16, 128, 4)},
    "interpreter": {0: RowTile(16, 64, 4)},
}

TABLES: dict[str, Mapping[Any, Mapping[int, Any]]] = {
    "attention": ATTENTION,
    "attention_decode": ATTENTION_DECODE,
    "linear": GEMM,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
    "layer_norm": LAYER_NORM,
    "elementwise": ELEMENTWISE,
}


def _key(op: str, name: Any, limit: int) -> Key:
    """The key of a row: `name` is what TABLES[op] calls its rows, with or without pass and
    bytes."""
    parts = name if isinstance(name, tuple) else (name,)
    numbers = [part for part in parts if isinstance(part, int)]
    return Key(
        op, parts[0] if len(parts) > 1 else "", numbers[0] if numbers else 0, parts[-1], limit
    )


def shipped() -> Iterator[tuple[Key, Any]]:
    """Every row of the table: the compile gate's cases and the rows that `bertkern tune`
    measures."""
    for op, table in TABLES.items():
        for name, rows in table.items():
            for limit, tile in rows.items():
                yield _key(op, name, limit), tile


_trial: dict[Key, Any] = {}  # rows under measurement, before all others


@contextmanager
def trial(key: Key, tile: Any) -> Iterator[None]:
    """Use `tile` for the row `key` within the block: how a candidate is measured."""
    _trial[key] = tile
    _forget()
    try:
        yield
    finally:
        del _trial[key]
        _forget()


def reread() -> None:
    """Forget the user's rows: the next call reads their file again."""
    tuning_file.rows_of_this_gpu.cache_clear()
    _forget()


def _forget() -> None:
    for lookup in (
        attention,
        attention_decode,
        gemm,
        linear_cross_entropy,
        layer_norm,
        elementwise,
    ):
        lookup.cache_clear()


def _row(op: str, name: Any, size: int) -> tuple[Any, int]:
    """The row of the smallest limit that holds `size`, or of the last one, and that limit."""
    rows = TABLES[op][name]
    limit = min((x for x in rows if size <= x), default=next(reversed(rows)))
    key = _key(op, name, limit)
    if key in _trial:
        return _trial[key], limit
    if key.architecture != "interpreter":
        found = tuning_file.rows_of_this_gpu().get(str(key))
        if found is not None and valid(key, found):
            return type(rows[limit])(*found, "bertkern tune"), limit
    return rows[limit], limit


def valid(key: Key, numbers: Any) -> bool:
    """Whether the numbers of a tile may stand in for the shipped row of `key`.

    Blocks and warps are powers of two that Triton can compile; what decides a length class (the
    keys of a short row) or the number of passes over a row (the columns) stays as shipped.
    """
    shipped_tile = dict(shipped()).get(key)
    if shipped_tile is None or not isinstance(numbers, list | tuple):
        return False
    fields = type(shipped_tile)._fields[:-1]
    if len(numbers) != len(fields) or not all(type(number) is int for number in numbers):
        return False
    tile = dict(zip(fields, numbers, strict=True))
    if not 1 <= tile.pop("stages", 1) <= 8 or tile.pop("warps") not in (1, 2, 4, 8, 16, 32):
        return False
    smallest = 1 if key.op in ("layer_norm", "elementwise") else 16
    if not all(smallest <= x <= 8192 and x & (x - 1) == 0 for x in tile.values()):
        return False
    fixed = "block_c" if key.op == "layer_norm" else "block_n" if "short" in key.kernel else ""
    return not fixed or tile[fixed] == getattr(shipped_tile, fixed)


def block_d(head_dim: int) -> int:
    """Head dim padded in registers: a power of two, at least the 16 of one mma step."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache(maxsize=1024)
def attention(
    kernel: str,
    head_dim: int,
    itemsize: int,
    architecture: str,
    biased: bool = False,
    precision: str = "ieee",
) -> AttentionTile:
    """The tile of `kernel`: "fwd", "bwd_dq", "bwd_dkdv"; "fwd_short" and "bwd_short" for a sequence
    whose keys fit in their one tile of block_n; "bwd_dbias".

    Args:
        biased: scale * q kᵀ is not the whole score, or scale is not positive (the kernels' FOLD is
            off). Tells rows of 16-bit dtypes apart.
        precision: "ieee" or "tf32" (the kernels' PRECISION). Tells rows of fp32 apart.
    """
    name = kernel
    if itemsize == 2 and biased:
        name = f"{kernel}_biased"
    elif itemsize == 4 and precision == "tf32":
        name = f"{kernel}_tf32"
    if (name, itemsize, architecture) not in ATTENTION:  # bwd_dbias; the interpreter
        name = kernel
    return _row("attention", (name, itemsize, architecture), head_dim)[0]


@lru_cache(maxsize=256)
def attention_decode(kind: str, head_dim: int, itemsize: int, architecture: str) -> DecodeTile:
    """The tile of `kind`: "vector" for one query head a key head, "group" for several."""
    return _row("attention_decode", (kind, itemsize, architecture), head_dim)[0]


@lru_cache(maxsize=256)
def gemm(kernel: str, itemsize: int, architecture: str) -> GemmTile:
    """The tile of `kernel` ("fwd", "bwd_input", "bwd_weight")."""
    return _row("linear", (kernel, itemsize, architecture), 0)[0]


@lru_cache(maxsize=256)
def linear_cross_entropy(kernel: str, itemsize: int, architecture: str) -> GemmTile:
    """The tile of `kernel` ("fwd", "bwd_dz", "bwd_dx")."""
    return _row("linear_cross_entropy", (kernel, itemsize, architecture), 0)[0]


def vocabulary_chunk(tokens: int, itemsize: int, architecture: str) -> int:
    """Classes whose dz the backward holds at a time, a multiple of the fewest."""
    fewest, most = VOCABULARY_CHUNK[architecture]
    fit = VOCABULARY_CHUNK_BYTES[architecture] // (tokens * itemsize)
    return max(fewest, min(fit // fewest * fewest, most))


@lru_cache(maxsize=1024)
def layer_norm(kernel: str, cols: int, architecture: str) -> RowTile:
    """The tile of `kernel` ("fwd", "bwd"): whole rows, several where they are short, in pieces
    where they are long."""
    tile, limit = _row("layer_norm", (kernel, architecture), cols)
    block_c = min(max(16, 1 << (cols - 1).bit_length()), limit)
    return tile._replace(block_c=block_c)


@lru_cache(maxsize=1024)
def elementwise(cols: int, architecture: str) -> RowTile:
    """The tile of the elementwise kernels and of the reduction of partial sums."""
    return _row("elementwise", architecture, cols)[0]
