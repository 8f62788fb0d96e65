"""Writes docs/machine-code.md from the compile gate's results: what each kernel became.

It shows the results of the newest Triton, and of the older ones what differs in kind: registers and
the instruction of the products. Nothing in it is typed by hand.
"""

import gate_cases
import sass

HEAD = """\
# What the Triton kernels become

Written by `make gate` (tests/kernels/gate.py) from the machine code that Triton {newest} makes; do
not edit it. {passed}

## How to read it
Nothing here is timed: the numbers are read from the code, without a GPU.

- **row**: pass and the largest head dim (or width) that the row of the tuning table
  (`kernels/tuning.py`) serves; **tile** and **warps** are that row's numbers.
- **options**: `all` has every option on that costs registers and that the row serves (window, key
  padding, dropout; bias and softcap in the `biased` rows and in fp32); `train` and `infer` are what
  BERT runs with, variable length with and without dropout; `padded` is `all` with a head dim below
  its power of two; `pieces` is a LayerNorm row wider than one tile.
- **regs** registers of a thread (at most 255, none spilled), **KB** shared memory of a CTA,
  **CTAs** how many of them an SM holds at once, **warps/SM** of 64.
- **loop**: instructions of a warp in one turn of the main inner loop. An inner loop is a span of
  code that a backward branch closes and that holds no other; the main one has the most
  multiply-accumulates, and among equals the fewest instructions (the loop over blocks that need no
  mask). "-": the products stand in no loop (or there is none), and the whole kernel is counted.
- **tensor** HGMMA or HMMA, **MUFU** exp2 and reciprocals, **FMA** FFMA, FMUL, FADD, **IMAD**
  (moves, too), **ALU** IADD3, LOP3, SHF, ISETP, SEL, FMNMX, PRMT ..., **conv** conversions,
  **smem** LDS, STS, LDSM, LDGSTS, **gmem** LDG, STG, **rest** barriers, branches, uniform
  registers.
- **bound**: the unit that is busy longest in one turn, and for how many clocks of an SM; then the
  tensor cores' clocks. Rates of an SM in one clock, sm_80 / sm_90: tensor {tensor80} / {tensor90}
  16-bit multiply-accumulates (half in tf32), FMA {fma80} / {fma90}, ALU 64, IMAD 64, MUFU 16, issue
  128 lanes, shared memory 128 bytes (CUDA C++ Programming Guide; tensor rates from the published
  peaks). "issue" means that the four schedulers are what is full: no unit is, but every instruction
  takes its slot. Bank conflicts, latencies and the operands of wgmma in shared memory are not in
  it, so these are the clocks below which the loop cannot go.
- **twice** (attention, where it is not 1): multiply-accumulates done for one needed. A tile with
  fewer rows than its warps cover computes some of them twice.

Shared memory of the sm80 rows: at most {shared80:.0f} KB, so they run on Ada and GA10x (99 KB),
too.
"""

SCORES = """
## Attention: issue slots for one score
Instructions of one turn of the main inner loop, of all threads, divided by the scores of the tile.
At 128 lanes a clock, {example} slots a score are {clocks:.3f} clocks of an SM; the two products of
the forward at head dim 64 take 256 FLOP, 1/16 = 0.0625 clocks on sm_90.

| kernel | row | sm | options | slots | MUFU | FMA | IMAD | ALU | conv | memory | rest |
|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""

TABLE = """
## {title}
| row | sm | dtype | options | tile | warps | regs | KB | CTAs | warps/SM | loop | tensor | MUFU \
| FMA | IMAD | ALU | conv | smem | gmem | rest | bound | tensor clocks | twice |
|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:\
|---|---:|---:|
"""


def document(results):
    """The text, from {triton version: results}; the last version is the newest."""
    newest = list(results)[-1]
    rows = results[newest]
    rates = sass.RATES
    text = HEAD.format(
        newest=newest,
        passed=_passed(results),
        tensor80=rates[80]["tensor"],
        tensor90=rates[90]["tensor"],
        fma80=rates[80]["fma"],
        fma90=rates[90]["fma"],
        shared80=max(r["shared"] for r in rows if r["arch"] == 80) / 1024,
    )
    text += _scores(rows)
    for name in gate_cases.KERNELS:
        own = sorted((r for r in rows if r["kernel"] == name), key=_order)
        if own:
            text += TABLE.format(title=name) + "".join(map(_row, own))
    return text + _older(results)


def _passed(results):
    parts = [f"{len(rows)} with Triton {version}" for version, rows in results.items()]
    return f"Compiled, without a spilled register: {', '.join(parts)}."


def _order(r):
    return (
        r["row"].split("/")[1],
        -r["arch"],
        r["dtype"],
        r["precision"],
        r["limit"],
        r["variant"],
    )


def _dtype(r):
    return "tf32" if r["precision"] == "tf32" else r["dtype"]


def _name(r):
    return f"{r['row'].split('/')[1] or 'any'} {r['limit'] or ''}".strip()


def _twice(r):
    """Multiply-accumulates done for one needed, None where the loop is not one tile of scores."""
    products = gate_cases.KERNELS[r["kernel"]].products
    if not r["row"].startswith("attention/") or not r["matrix"]:
        return None
    block_d = max(16, 1 << (r["size"] - 1).bit_length())
    return r["macs"] / (products * block_d * r["tile"][0] * r["tile"][1])


def _row(r):
    mix, clocks, warps = r["loop"], r["clocks"], r["warps"]
    bound = max(clocks, key=clocks.get)
    twice = _twice(r)
    matrix = "+".join(r["matrix"])
    cells = [
        _name(r), r["arch"], _dtype(r), r["variant"], "x".join(map(str, _blocks(r))), warps,
        r["registers"], f"{r['shared'] / 1024:.0f}", r["ctas"], r["ctas"] * warps,
        mix["all"] if r["is_loop"] else f"- {mix['all']}",
        f"{mix['tensor']} {matrix}" if matrix else 0, mix["mufu"], mix["fma"], mix["imad"],
        mix["alu"], mix["conversion"], mix["shared"], mix["global"],
        mix["other"] + mix["shuffle"], f"{bound} {clocks[bound]:.0f}", f"{clocks['tensor']:.0f}",
        "" if twice is None or abs(twice - 1) < 0.01 else f"{twice:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _blocks(r):
    return r["tile"][: len(gate_cases.KERNELS[r["kernel"]].blocks)]


def _scores(rows):
    """Slots of one score, of the 16-bit attention kernels as BERT runs them and with all on."""
    lines, example = "", None
    for r in rows:
        products = gate_cases.KERNELS[r["kernel"]].products
        if not r["row"].startswith("attention/") or r["dtype"] != "bf16" or not products:
            continue
        if r["variant"] == "padded":
            continue
        of_score = 32 * r["warps"] / (r["tile"][0] * r["tile"][1])
        mix = r["loop"]
        memory = mix["shared"] + mix["global"]
        units = [mix[k] for k in ("all", "mufu", "fma", "imad", "alu", "conversion")]
        rest = mix["other"] + mix["shuffle"] + mix["tensor"]
        numbers = " | ".join(f"{n * of_score:.2f}" for n in [*units, memory, rest])
        lines += f"| {r['kernel']} | {_name(r)} | {r['arch']} | {r['variant']} | {numbers} |\n"
        if (r["kernel"], r["limit"], r["arch"], r["variant"]) == ("attention_fwd", 64, 90, "train"):
            example = example or mix["all"] * of_score
    if example is None:
        return ""
    return SCORES.format(example=f"{example:.1f}", clocks=example / 128) + lines


def _older(results):
    """How the older Tritons' code differs from the newest's."""
    *older, newest = results
    now = {r["name"]: r for r in results[newest]}
    text = ""
    for version in older:
        changed = [
            (r, now[r["name"]])
            for r in results[version]
            if r["name"] in now
            and (
                r["matrix"] != now[r["name"]]["matrix"]
                or r["ctas"] != now[r["name"]]["ctas"]
                or abs(r["loop"]["all"] - now[r["name"]]["loop"]["all"])
                > 0.1 * now[r["name"]]["loop"]["all"]
            )
        ]
        text += f"\n## Where Triton {version} differs\n"
        text += (
            f"Other products, another number of CTAs, or an inner loop more than a tenth longer or "
            f"shorter: {len(changed)} of {len(results[version])}.\n\n"
            f"| kernel and row | regs {version} | {newest} | CTAs {version} | {newest} "
            f"| loop {version} | {newest} | products {version} | {newest} |\n"
            "|---|---:|---:|---:|---:|---:|---:|---|---|\n"
        )
        for old, new in changed:
            cells = [old["name"]]
            for pick in (
                lambda r: r["registers"],
                lambda r: r["ctas"],
                lambda r: r["loop"]["all"],
                lambda r: "+".join(r["matrix"]),
            ):
                cells += [pick(old), pick(new)]
            text += "| " + " | ".join(map(str, cells)) + " |\n"
    return text
