"""Floors of attention on Hopper, counted on paper: what each unit of an SM must do, and how long.

    python benchmarks/roofline.py

prints the tables that docs/roofline.md holds between its markers, what the compiler made of the
kernels (docs/machine-code-cuda.md, of `make sass`) beside the paper's count among them;
tests/benchmarks/test_roofline.py compares the two.

S sequence length, d head dim, N keys a tile; a score is one element of S x S of one head. Clocks
are those of one SM. Slots are instructions of one thread that a score costs by design, as counted
in FORWARD and BACKWARD; what the compiler made of them is in docs/machine-code-cuda.md.
"""

import re
from pathlib import Path
from typing import NamedTuple

# H100 and H200 SXM (NVIDIA's data sheets; CUDA C++ Programming Guide, throughput of arithmetic
# instructions for compute capability 9.0). FLOP/s and clock belong together: 132 SMs at 4,096.
SMS, CLOCK = 132, 1.83e9
FLOPS = 4096  # dense 16-bit, of an SM in a clock
EXPONENTIALS, SLOTS, ALU, SHARED = 16, 128, 64, 128  # results, lanes, lanes, bytes in a clock
MEMORY = 4.8e12 / SMS / CLOCK  # bytes for one SM in a clock, H200

MACHINE_CODE = Path(__file__).resolve().parents[1] / "docs" / "machine-code-cuda.md"
HEAD_DIMS = (32, 64, 96, 128)
LENGTHS = (128, 256, 384, 512, 8192)
TOKENS, HIDDEN = 65536, 768  # the case of the floors: B S tokens, H d = 768 columns
KEYS = 128  # N

# Slots a score, as (what, slots, of them on the ALU).
FORWARD = (
    ("maximum, by integers three at a time", 0.5, 0.5),
    ("scale and subtract: one FFMA", 1, 0),
    ("exp2", 1, 0),
    ("sum", 1, 0),
    ("round and pack two", 0.5, 0.5),
    ("descriptors of the products, barriers, loop", 0.8, 0.1),
    ("reductions of a row", 0.3, 0.15),
)
BACKWARD = (
    ("scale and subtract lse: one FFMA", 1, 0),
    ("exp2", 1, 0),
    ("dp - delta, times p", 2, 0),
    ("round and pack p and ds", 1, 1),
    ("ds to shared memory", 0.2, 0),
    ("descriptors of the products, barriers, loop", 0.8, 0.1),
)
# More of it where a warp's rows are queries (attention_bwd_short.cuh), at S = 128: delta is a sum
# over the row, p goes to shared memory as well, and each tile's dq, dk and dv are scaled, rounded
# and stored, 3 d / 128 elements a score.
SHORT = (
    ("p dp, summed", 1, 0),
    ("p to shared memory", 0.2, 0),
)
STORED = 3 * (1 + 0.5 + 0.2)  # slots for d / 128: scale, round and pack two, through shared memory
# The hash of four scores and what is made of it (csrc/cuda/attention_score.cuh).
DROPOUT = (
    ("state of four scores", 1.5, 1.25),
    ("two halves", 1.5, 1),
    ("compare", 1, 1),
)
FORWARD_SELECTS, BACKWARD_SELECTS = 1, 2  # p; p and dp
# exp2 on the FMA pipe: clamp, round (3 FADD), 4 FFMA, power of two, FMUL; instead of one MUFU.
POLYNOMIAL_SLOTS, POLYNOMIAL_SHARE = 10, {32: 1 / 8, 64: 1 / 16, 96: 0.0, 128: 0.0}
HELD = 96  # up to this head dim q stays in registers


class Work(NamedTuple):
    """What one score costs one SM, in clocks of each unit."""

    tensor: float
    exponential: float
    issue: float
    alu: float
    shared: float

    @property
    def bound(self) -> str:
        """The unit with most to do."""
        return max(zip(self, self._fields, strict=True))[1]


def slots(parts: tuple[tuple[str, float, float], ...]) -> tuple[float, float]:
    """(slots, of them on the ALU) of all parts."""
    return sum(p[1] for p in parts), sum(p[2] for p in parts)


def forward(d: int, dropout: bool = False, rows: int = 128) -> Work:
    """A score of the forward; a block has `rows` queries, 64 for each warpgroup."""
    issue, alu = slots(FORWARD + (DROPOUT if dropout else ()))
    selects = FORWARD_SELECTS if dropout else 0
    share = 0.0 if dropout else POLYNOMIAL_SHARE[d]
    issue += selects + share * (POLYNOMIAL_SLOTS - 1)
    alu += selects + share
    # A warpgroup's tile: k and v (N x d), and q (64 x d) where it is not held; p is in registers.
    # The copies of k and v are written once for all warpgroups.
    groups = rows // 64
    moved = groups * 2 * ((0 if d <= HELD else 64 * d) + 2 * KEYS * d) + 2 * 2 * KEYS * d
    return Work(
        4 * d / FLOPS,
        (1 - share) / EXPONENTIALS,
        issue / SLOTS,
        alu / ALU,
        moved / SHARED / (rows * KEYS),
    )


def backward(d: int, dropout: bool = False) -> Work:
    """A score of the backward with five products: 128 keys a block, 64 for each warpgroup, walking
    over tiles of 128 queries."""
    issue, alu = slots(BACKWARD + (DROPOUT if dropout else ()))
    selects = BACKWARD_SELECTS if dropout else 0
    # A warpgroup: k and q for the scores, v and dout for dp; dout for dv and q for dk, whose left
    # operands stand in registers; ds, written and read, and k for dq. Copies of q and dout.
    products = 2 * (64 * d + 128 * d) + 2 * 128 * d + (128 * 64 + 128 * d)
    moved = 2 * 2 * (products + 128 * 64) + 2 * 2 * 128 * d
    return Work(
        10 * d / FLOPS,
        1 / EXPONENTIALS,
        (issue + selects) / SLOTS,
        (alu + selects) / ALU,
        moved / SHARED / (128 * 128),
    )


def short(d: int, dropout: bool = False) -> Work:
    """A score of the backward of S = 128 in one launch: a warpgroup has 64 queries by all keys for
    scores, dp and dq, and 64 keys for dk and dv."""
    issue, alu = slots(BACKWARD + SHORT + (DROPOUT if dropout else ()))
    selects = BACKWARD_SELECTS if dropout else 0
    issue += selects + STORED * d / 128
    alu += selects
    # A warpgroup: q and k, dout and v; p and ds written; k for dq, ds in registers; p and dout, ds
    # and q. The copies of all four, and what is stored passes through twice.
    products = 2 * (64 * d + 128 * d) + 128 * d + 2 * (128 * 64 + 128 * d)
    moved = 2 * 2 * (products + 2 * 128 * 64) + 2 * 4 * 128 * d + 2 * 2 * 3 * 128 * d
    return Work(
        10 * d / FLOPS,
        1 / EXPONENTIALS,
        issue / SLOTS,
        alu / ALU,
        moved / SHARED / (128 * 128),
    )


def floors(work: Work, length: int, d: int, tensors: int, flops: int) -> tuple[float, float, float]:
    """(µs of memory, µs of the busiest unit, TFLOP/s that the longer of them allows)."""
    heads = HIDDEN // d
    memory = (tensors * 2 * d + 4) * TOKENS * heads / (MEMORY * SMS * CLOCK)
    unit = max(work) * TOKENS * heads * length / (SMS * CLOCK)
    total = flops * d * TOKENS * heads * length
    return memory * 1e6, unit * 1e6, total / max(memory, unit) / 1e12


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def units() -> str:
    """Clocks of each unit for a tile of 128 x 128 scores."""
    rows = []
    functions = (("forward", forward), ("backward", backward), ("short backward", short))
    for name, function in functions:
        for d in HEAD_DIMS[:2] if function is short else HEAD_DIMS:
            for dropout in (False, True):
                work = function(d, dropout)
                label = f"{name}, d = {d}" + (", dropout" if dropout else "")
                clocks = [f"{128 * 128 * x:,.0f}" for x in work]
                rows.append([label, *clocks, f"{work.issue * SLOTS:.2f}", work.bound])
    return table(["128 x 128 scores", *Work._fields, "slots a score", "bound by"], rows)


def lengths(name: str) -> str:
    """Floors by length: memory / busiest unit in µs, and TFLOP/s."""
    function, tensors, flops = {"forward": (forward, 4, 4), "backward": (backward, 7, 10)}[name]
    rows = []
    for d in HEAD_DIMS:
        for dropout in (False, True):
            cells = []
            for length in LENGTHS:
                memory, unit, rate = floors(function(d, dropout), length, d, tensors, flops)
                cells.append(f"{memory:.0f} / {unit:,.0f}: {rate:.0f}")
            rows.append([f"d = {d}" + (", dropout" if dropout else ""), *cells])
    return table([name, *(f"S = {length}" for length in LENGTHS)], rows)


def rows_of_a_block() -> str:
    """What the number of queries in a block costs."""
    rows = []
    for queries in (64, 128, 192, 256):
        work = forward(64, rows=queries)
        waste = [f"{-(-length // queries) * queries / length:.2f}" for length in LENGTHS[:4]]
        cache = 2 * 2 * KEYS * 64 / (queries * KEYS * work.tensor)
        rows.append(
            [str(queries), *waste, f"{100 * work.shared / work.tensor:.0f} %", f"{cache:.1f}"]
        )
    head = ["queries", *(f"S = {length}" for length in LENGTHS[:4])]
    return table([*head, "shared memory / tensor", "bytes of k and v a clock"], rows)


def registers() -> str:
    """Registers of a consumer's thread that hold tiles: 64 queries a warpgroup, N keys."""
    rows = []
    for d in HEAD_DIMS:
        for keys in (64, 128, 176, 192):
            parts = (keys // 2, keys // 4, d // 2, d // 4 if d <= HELD else 0)
            rows.append([str(d), str(keys), *map(str, (*parts, sum(parts), sum(parts) + parts[0]))])
    return table(["d", "N", "scores", "p", "out", "q", "one tile of scores", "two"], rows)


def shared_memory() -> str:
    """Bytes of shared memory: two tiles of q, one of out, and stages of k and v."""
    rows = []
    for d in HEAD_DIMS:
        tile = 128 * d * 2
        stages = min(4, (227 * 1024 - 1024 - 3 * tile) // (2 * tile))
        rows.append([str(d), str(tile), str(stages), f"{(3 + 2 * stages) * tile:,}"])
    return table(["d", "a tile of 128 rows", "stages", "bytes in all"], rows)


def side_by_side() -> str:
    """Slots a score of whole tiles, bf16, by unit, as docs/machine-code-cuda.md has them."""
    text = MACHINE_CODE.read_text(encoding="utf-8")
    columns = ("MUFU", "FMA", "IMAD", "ALU", "conv", "smem", "rest", "bound")
    found = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "instantiation" and "bound" in cells:
            header = cells
        kernel = re.match(
            r"`(attention_\w+)<bf16, WarpgroupTile<(\d+), .*>, (\w+)(, \w+)?>`$", cells[0]
        )
        if kernel is None or len(cells) != len(header) or kernel[3] == "general":
            continue
        row = dict(zip(header, cells, strict=True))
        name = {", true": "attention_bwd_short"}.get(kernel[4], kernel[1])
        papers = {"attention_fwd": forward, "attention_bwd_short": backward}
        count = short if kernel[1] == "attention_bwd_short" else papers.get(name)
        work = count and count(int(kernel[2]), kernel[3] == "dropout")
        paper = f"{work.issue * SLOTS:.2f}" if work else ""
        besides = float(row["slots"]) - float(row["tensor"])
        cells = [name.removeprefix("attention_"), kernel[2], kernel[3], paper, f"{besides:.2f}"]
        found.append([*cells, row["tensor"], *(row[column] for column in columns)])
    order = {"fwd": 0, "bwd_short": 1, "bwd_queries": 2, "bwd_keys": 3}
    found.sort(key=lambda cells: (order[cells[0]], int(cells[1]), cells[2] != "plain"))
    head = ["kernel", "d", "variant", "paper", "but HGMMA", "HGMMA", *columns]
    return table(head, found)


def document() -> str:
    """All tables, each under its heading."""
    parts = (
        ("Clocks of a tile", units()),
        ("Floors of the forward", lengths("forward")),
        ("Floors of the backward", lengths("backward")),
        ("Queries in a block, forward, d = 64", rows_of_a_block()),
        ("Registers that hold tiles", registers()),
        ("Shared memory of the forward", shared_memory()),
        ("Paper and machine code: slots a score, bf16", side_by_side()),
    )
    return "\n\n".join(f"### {title}\n{text}" for title, text in parts) + "\n"


if __name__ == "__main__":
    print(document(), end="")
