"""Tile sizes, warps and stages: every number that was chosen for speed, in one place.

No row is measured yet ("not measured"): they follow the published tiles of FlashAttention-2/3,
Triton's tutorials and the register and shared memory budgets that the compile gate checks
(tests/kernels/gate.py).

Legend: bytes = bytes of one element (2: fp16, bf16; 4: fp32); architecture "sm80" (Ampere, Ada),
"sm90" (Hopper and newer) or "interpreter" (small tiles, so that small tests have several of them).

A row is chosen by head dim or by row width, dtype, options and architecture only, never by batch,
tokens or the longest sequence: these would change the order of summation, and with it the bits of a
result (batch invariance).
"""

from typing import NamedTuple


class AttentionTile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class GemmTile(NamedTuple):
    """BLOCK_M rows by BLOCK_N columns of the result, BLOCK_K of the summed dimension at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class RowTile(NamedTuple):
    """BLOCK_R rows by BLOCK_C columns."""

    block_r: int
    block_c: int
    warps: int


GROUP_M = (
    8  # GEMM: row blocks that share one pass over the columns, so that their operands stay in L2
)

# Backward of the LayerNorm family: programs, each with its own partial sum of dweight and dbias. A
# constant (twice Hopper's 132 SMs), because it fixes the order of the sum.
LAYER_NORM_PARTIALS = 264
LAYER_NORM_MAX_BLOCK = 8192  # wider rows are read in pieces

# (pass, bytes, architecture) -> head dim up to which the row serves -> tile.            All rows:
# not measured.
ATTENTION: dict[tuple[str, int, str], dict[int, AttentionTile]] = {
    ("fwd", 2, "sm90"): {
        64: AttentionTile(128, 128, 8, 3),
        128: AttentionTile(128, 128, 8, 2),
        256: AttentionTile(128, 32, 8, 2),
    },
    ("bwd_dkdv", 2, "sm90"): {
        64: AttentionTile(64, 128, 8, 2),
        128: AttentionTile(32, 128, 8, 2),
        256: AttentionTile(32, 32, 8, 2),
    },
    ("bwd_dq", 2, "sm90"): {
        64: AttentionTile(128, 64, 8, 3),
        128: AttentionTile(128, 64, 8, 2),
        256: AttentionTile(128, 32, 8, 2),
    },
    ("fwd", 2, "sm80"): {
        64: AttentionTile(128, 64, 8, 3),
        128: AttentionTile(128, 64, 8, 2),
        256: AttentionTile(64, 64, 8, 1),
    },
    ("bwd_dkdv", 2, "sm80"): {
        64: AttentionTile(32, 128, 8, 2),
        128: AttentionTile(32, 64, 8, 2),
        256: AttentionTile(32, 32, 8, 1),
    },
    ("bwd_dq", 2, "sm80"): {
        64: AttentionTile(128, 64, 8, 2),
        128: AttentionTile(64, 64, 8, 2),
        256: AttentionTile(32, 32, 8, 1),
    },
    # Two stages even where one tile is all: loads through shared memory take no registers.
    ("fwd", 4, "sm90"): {
        64: AttentionTile(64, 32, 8, 2),
        128: AttentionTile(32, 32, 8, 2),
        256: AttentionTile(32, 16, 8, 2),
    },
    ("bwd_dkdv", 4, "sm90"): {
        64: AttentionTile(32, 32, 8, 2),
        128: AttentionTile(16, 32, 8, 2),
        256: AttentionTile(16, 16, 8, 2),
    },
    ("bwd_dq", 4, "sm90"): {
        64: AttentionTile(32, 32, 8, 2),
        128: AttentionTile(32, 32, 8, 2),
        256: AttentionTile(16, 16, 8, 2),
    },
}
for _pass in ("fwd", "bwd_dkdv", "bwd_dq"):
    ATTENTION[_pass, 4, "sm80"] = ATTENTION[_pass, 4, "sm90"]  # FFMA on both: the same budget
    for _bytes in (2, 4):
        ATTENTION[_pass, _bytes, "interpreter"] = {
            256: AttentionTile(32, 16, 4, 1) if _pass == "bwd_dq" else AttentionTile(16, 32, 4, 1)
        }

# (kernel, bytes, architecture) -> tile.                                                 All rows:
# not measured. linear: y = x wᵀ and dx = dz w;  weight: dw = dzᵀ x, rows of the result = rows of w,
# summed over tokens.
GEMM: dict[tuple[str, int, str], GemmTile] = {
    ("fwd", 2, "sm90"): GemmTile(128, 128, 64, 8, 3),
    ("bwd_input", 2, "sm90"): GemmTile(128, 128, 64, 16, 3),
    ("bwd_weight", 2, "sm90"): GemmTile(128, 128, 64, 8, 3),
    ("fwd", 2, "sm80"): GemmTile(128, 64, 64, 8, 3),
    ("bwd_input", 2, "sm80"): GemmTile(128, 64, 32, 8, 3),
    ("bwd_weight", 2, "sm80"): GemmTile(128, 128, 32, 8, 3),
    ("fwd", 4, "sm90"): GemmTile(64, 64, 32, 8, 3),
    ("bwd_input", 4, "sm90"): GemmTile(64, 64, 32, 8, 2),
    ("bwd_weight", 4, "sm90"): GemmTile(64, 64, 32, 8, 2),
}
for _kernel in ("fwd", "bwd_input", "bwd_weight"):
    GEMM[_kernel, 4, "sm80"] = GEMM[_kernel, 4, "sm90"]
    for _bytes in (2, 4):
        GEMM[_kernel, _bytes, "interpreter"] = GemmTile(32, 16, 32, 4, 1)

# Elements of one tile of a LayerNorm kernel and its warps, by architecture.             All rows:
# not measured.
LAYER_NORM: dict[tuple[str, str], tuple[int, int]] = {
    ("fwd", "sm90"): (4096, 4),
    ("bwd", "sm90"): (4096, 8),
    ("fwd", "sm80"): (4096, 4),
    ("bwd", "sm80"): (4096, 8),
    ("fwd", "interpreter"): (1024, 4),
    ("bwd", "interpreter"): (1024, 4),
}


def block_d(head_dim: int) -> int:
    """Head dim padded in registers: a power of two, at least the 16 of one mma step."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention(kernel: str, head_dim: int, itemsize: int, architecture: str) -> AttentionTile:
    """The tile of `kernel` ("fwd", "bwd_dkdv", "bwd_dq")."""
    rows = ATTENTION[kernel, itemsize, architecture]
    return rows[min(limit for limit in rows if head_dim <= limit)]


def gemm(kernel: str, itemsize: int, architecture: str) -> GemmTile:
    """The tile of `kernel` ("fwd", "bwd_input", "bwd_weight")."""
    return GEMM[kernel, itemsize, architecture]


def layer_norm(kernel: str, cols: int, architecture: str) -> RowTile:
    """The tile of `kernel` ("fwd", "bwd"): whole rows, several where they are short, in pieces
    where they are long."""
    elements, warps = LAYER_NORM[kernel, architecture]
    limit = 256 if architecture == "interpreter" else LAYER_NORM_MAX_BLOCK
    block_c = min(max(16, 1 << (cols - 1).bit_length()), limit)
    block_r = max(1, min(16, elements // block_c))
    return RowTile(
        block_r, block_c, max(warps, min(16, block_r * block_c // 512)) if block_c > 4096 else warps
    )


def elementwise(cols: int, architecture: str) -> RowTile:
    """The tile of the elementwise kernels and of the reduction of partial sums."""
    if architecture == "interpreter":
        return RowTile(16, 64, 4)
    return RowTile(16, 128, 4) if cols > 64 else RowTile(32, 64, 4)
