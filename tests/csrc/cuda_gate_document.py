"""Writes docs/machine-code-cuda.md from the gate's kernels, and reads its figures back.

Nothing in the document is typed by hand.
"""

import re

from csrc import cuda_gate

sass = cuda_gate.sass

HEAD = """\
# What the CUDA C++ kernels become

Written by `make sass` (tests/csrc/cuda_gate.py) from the machine code in `bertkern._C`, as ptxas
{version} of CUDA made it; do not edit it. {kernels} kernels: {instantiations} instantiations, those
of csrc/cuda/sm80 for {sm80_targets}, those of csrc/cuda/sm90 for
{sm90_targets} alone. {spills} {serial}

## How to read it
Nothing here is timed: the figures are read from the code, without a GPU.

**A kernel's resources.**
- **instantiation**: types, tile and variant as in the source. `AttentionTile<head dim, warps, row
  tiles of 16 a warp, columns walked over at a time>`; `WarpgroupTile<head dim, warpgroups of 64
  rows, columns walked over at a time, stages, bytes of the swizzle's span, registers of a thread
  that has the copies made>`. `plain` has causal, window, lengths and padding, `dropout` that and
  dropout, `general` bias, cap and any scale, too;
  `attention_bwd_short` is `attention_bwd_keys<..., true>` but for the square tiles of sm90, which
  have a kernel of that name. `NormTile<vectors of 8 elements a
  thread, whether a row takes the whole block>`.
- **sm**: the target. **threads** of a CTA, **regs** of a thread (of 255), **spill** bytes of stack;
  all must be 0. **shared**: bytes that the launch code asks for, for LayerNorm at the widest row
  that the tile takes. No kernel has static shared memory. At most {limit} bytes, so that the tiles
  fit Ada and GA10x, too; on Hopper {hopper_limit}, all that a CTA can have.
- **setmaxnreg**: registers of a thread, in the warpgroup that has the copies made / in those that
  compute; **regs** are then those that a thread has at the start.
- **CTAs**: how many an SM holds, by registers / shared memory / threads; **warps**: of 64, what the
  least of the three leaves. An SM of sm_80 has {sm80},
  of sm_90 {sm90}.

**The inner loop.** A loop holds code that most turns jump over: masks of tiles at the diagonal,
options that are off. A turn is counted along one way round: with all products, with the copies of
the next tile, and with the fewest instructions otherwise. That is a tile where every score counts;
in the `dropout` kernels with dropout, in the `general` ones and `attention_bwd_bias` with a bias in
the tensors' type and without cap and dropout. In `attention_bwd_short` and `attention_bwd_keys` it
is a turn of the warps that also fetch what belongs to the next queries (lse, delta, keys of their
dropout). In the kernels of sm90 it is a turn of the warpgroups that compute: in the forward from a
tile of keys to the next one of the same queries, in `attention_bwd_keys<..., true>` of the
warpgroup that has more columns of dq, in `attention_bwd_short` a tile of queries that is the last
one of its keys, with all that is stored. The LayerNorm kernels are counted on aligned rows with
everything on: residual, dropout, fp32 weight and bias, and all gradients.
- **slots**: instructions of all threads in a turn for one score (attention), for one element of the
  row (LayerNorm), or for one word of 4 bytes that is loaded (the kernels that sum). They are shared
  out over **tensor** HMMA, HGMMA, **MUFU** exp2 and reciprocals, **FMA** FFMA, FMUL, FADD, **IMAD**
  (moves, too), **ALU** IADD3, LOP3, SHF, ISETP, FSEL, FMNMX, PRMT ..., **conv** conversions,
  **smem** LDS, STS, LDSM, STSM, LDGSTS, SHFL, **gmem** LDG, STG, and **rest** barriers, branches,
  uniform registers. **no drop**: slots without dropout. HGMMA is one instruction of a warp for
  64 x N x 16 multiply-accumulates of its warpgroup.
- **overlap** (sm90): the share of a turn's instructions, and of its exponentials alone (**of
  EX2**), that pass between the start of a product of the same warpgroup and the wait for it. The
  other warpgroup's products are not in it.
- **turn / loop**: instructions of a warp in a turn, and in all code of the loop; a turn may be more
  where it passes an inner loop several times. "-": no loop holds the wanted instructions, and the
  kernel is counted from start to end.
- **bound**: the unit that is busy longest, and for how many clocks of an SM in a turn of one CTA.
  "issue": the four schedulers are what is full; no unit is, but every instruction takes its slot.
  "memory": the bytes that must pass, at the published bandwidth.
- **tensor share** (attention): the tensor cores' clocks of those. It is the share of their peak
  that the loop can reach at the most: what takes it down is the other instructions. On sm_90 it is
  counted at wgmma's rate, which mma.sync, the instruction of the kernels of sm80, does not reach.
  **memory share** (all others): memory's clocks of those: below 100 % the kernel cannot keep up
  with memory, whatever its latencies.

Rates of an SM in one clock, sm_80 / sm_90: tensor {tensor80} / {tensor90} 16-bit
multiply-accumulates, FMA {fma80} / {fma90}, ALU 64, IMAD 64, MUFU 16, issue 128 lanes, shared
memory 128 bytes (CUDA C++ Programming Guide; tensor rates from the published peaks), memory
{memory80:.1f} / {memory90:.1f} bytes (A100 80 GB, H100 SXM: published bandwidth over the clocks of
the published tensor peak). Bank conflicts, latencies and what wgmma reads of shared memory are not
in it: these are the clocks below which a loop cannot go.

**In short**, below: over the instantiations of a kernel, from the least to the greatest; **KB** is
shared memory, **share** the tensor or memory share.
"""

GOAL = """
## The forward on Hopper beside its goal
Slots for a score at head dim 64, HGMMA's aside: at most {plain} without dropout, {dropout} with.

"""

RESOURCES = ["instantiation", "sm", "threads", "regs", "spill", "shared", "CTAs", "warps"]
UNITS = ["MUFU", "FMA", "IMAD", "ALU", "conv", "smem", "gmem", "rest"]
TURN = ["slots", "tensor", *UNITS, "turn / loop", "bound"]
ATTENTION = [*RESOURCES, *TURN, "tensor share"]
HOPPER = [*RESOURCES, "setmaxnreg", *TURN, "tensor share", "overlap", "of EX2"]
NORM = [*RESOURCES, "no drop", *TURN, "memory share"]
BESIDE_GOAL = ["instantiation", "goal", "slots", *UNITS, "EX2 overlapped"]
SUMMARY = ["kernel", "sm", "instantiations", "regs", "KB", "warps", "slots", "bound by", "share"]
WORDS = {"instantiation", "kernel", "sm", "bound", "bound by"}  # columns of text, not of numbers


def document(kernels, version):
    """The text, from the gate's kernels and the assembler's version."""
    sections = {}
    for kernel in kernels:
        sections.setdefault(f"{kernel.code.name.room}/{kernel.launch.what}", []).append(kernel)
    rates = sass.RATES
    text = HEAD.format(
        version=version,
        kernels=len(kernels),
        instantiations=len({kernel.code.name for kernel in kernels}),
        sm80_targets=" and ".join(cuda_gate.TARGETS["sm80"]),
        sm90_targets=" and ".join(cuda_gate.TARGETS["sm90"]),
        spills=_spills(kernels),
        serial=_serial(kernels),
        limit=cuda_gate.SHARED_LIMIT["sm80"],
        hopper_limit=cuda_gate.SHARED_LIMIT["sm90"],
        sm80=_sm(80),
        sm90=_sm(90),
        tensor80=rates[80]["tensor"],
        tensor90=rates[90]["tensor"],
        fma80=rates[80]["fma"],
        fma90=rates[90]["fma"],
        memory80=cuda_gate.MEMORY_BYTES[80],
        memory90=cuda_gate.MEMORY_BYTES[90],
    )
    text += "\n## In short\n" + _heading(SUMMARY)
    for what in sorted(sections):
        for target in sorted({kernel.code.target for kernel in sections[what]}):
            own = [kernel for kernel in sections[what] if kernel.code.target == target]
            text += _summary(what, target, own)
    text += GOAL.format(**cuda_gate.GOALS) + _heading(BESIDE_GOAL)
    for kernel in sorted(sections.get("sm90/attention_fwd", []), key=_order):
        *_, variant = kernel.code.name.arguments
        if kernel.code.name.numbers("WarpgroupTile")[0] == 64 and variant in cuda_gate.GOALS:
            text += _beside_goal(kernel, cuda_gate.GOALS[variant])
    for what in sorted(sections):
        own = sections[what]
        columns = HOPPER if own[0].is_hopper else ATTENTION if own[0].is_attention else NORM
        text += f"\n## {what}\n" + _heading(columns)
        text += "".join(_row(kernel) for kernel in sorted(own, key=_order))
    return text


def figures(text):
    """(the assembler's version, {(kernel, target): (registers, spilled bytes, shared bytes)}) of a
    document."""
    version = re.search(r"ptxas\s+(\S+) of CUDA", text)
    rows = re.findall(r"^\| `(.+?)` \| (sm_\w+) \| \d+ \| (\d+) \| (\d+) \| (\d+) \|", text, re.M)
    return version and version.group(1), {
        (name, target): tuple(map(int, numbers)) for name, target, *numbers in rows
    }


def figures_of(kernel):
    """A kernel's entry in figures()."""
    code = kernel.code
    return (str(code.name), code.target), (code.registers, code.stack, kernel.shared)


def _sm(arch):
    sm = sass.SM[arch]
    return f"{sm.registers} registers, {sm.shared // 1024} KB and {sm.warps * 32} threads"


def _spills(kernels):
    spilled = [kernel for kernel in kernels if kernel.code.stack]
    if not spilled:
        return "No register is spilled."
    return f"Registers are spilled in: {'; '.join(map(str, spilled))}."


def _serial(kernels):
    serial = [kernel for kernel in kernels if kernel.code.serial]
    if not serial:
        return "No wgmma is serialized."
    return f"wgmma is serialized in: {'; '.join(map(str, serial))}."


def _percent(share):
    return f"{100 * share:.0f} %"


def _line(cells):
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _heading(columns):
    return _line(columns) + "".join("|---" if c in WORDS else "|---:" for c in columns) + "|\n"


def _order(kernel):
    name = kernel.code.name
    numbers = [int(n) for n in re.findall(r"\d+", " ".join(a for a in name.arguments if "<" in a))]
    return numbers, name.arguments, kernel.code.target


def _span(values, form="{:.0f}"):
    low, high = (form.format(f(values)) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def _bound(kernel):
    """(the unit that is busy longest, its clocks in a turn, what share of them is the floor's)."""
    clocks = kernel.clocks()
    unit = max(clocks, key=clocks.get)
    return unit, clocks[unit], clocks["tensor" if kernel.is_attention else "memory"] / clocks[unit]


def _slots(kernel, body):
    return kernel.slots({"all": len(body)})["all"]


def _summary(what, target, kernels):
    bounds = [_bound(k) for k in kernels]
    cells = [
        what, target, len(kernels), _span([k.code.registers for k in kernels]),
        _span([k.shared / 1024 for k in kernels]), _span([k.ctas * k.warps for k in kernels]),
        _span([_slots(k, k.code.turn) for k in kernels], "{:.1f}"),
        ", ".join(sorted({unit for unit, *_ in bounds})),
        _span([100 * share for *_, share in bounds]) + " %",
    ]  # fmt: skip
    return _line(cells)


def _units(kernel):
    """Slots of a turn by the columns TURN begins with."""
    mix = sass.mix(kernel.code.turn)
    counts = [
        *(mix["all"], mix["tensor"], mix["mufu"], mix["fma"], mix["imad"], mix["alu"]),
        *(mix["conversion"], mix["shared"] + mix["shuffle"], mix["global"]),
        mix["other"] + mix["spill"],
    ]
    return kernel.slots(dict(zip(["slots", "tensor", *UNITS], counts, strict=True)))


def _beside_goal(kernel, goal):
    units = _units(kernel)
    units["slots"] -= units.pop("tensor")
    numbers = [f"{n:.2f}" for n in units.values()]
    return _line([f"`{kernel.code.name}`", goal, *numbers, _percent(kernel.overlap("MUFU.EX2"))])


def _row(kernel):
    code, residents = kernel.code, kernel.residents
    threads = min(residents["warps"], residents["CTAs"])
    unit, clocks, share = _bound(kernel)
    cells = [
        f"`{code.name}`", code.target, kernel.launch.threads, code.registers, code.stack,
        kernel.shared, f"{residents['registers']} / {residents['shared']} / {threads}",
        kernel.ctas * kernel.warps,
    ]  # fmt: skip
    if kernel.is_hopper:
        cells.append(" / ".join(map(str, code.setmaxnreg)))
    if not kernel.is_attention:
        cells.append(f"{_slots(kernel, code.spare):.2f}")
    cells += [f"{n:.2f}" for n in _units(kernel).values()]
    cells += [f"{len(code.turn)} / {code.loop_size if code.is_loop else '-'}"]
    cells += [f"{unit} {clocks:.0f}", _percent(share)]
    if kernel.is_hopper:
        cells += [_percent(kernel.overlap()), _percent(kernel.overlap("MUFU.EX2"))]
    return _line(cells)
