"""Reads machine code (SASS): instructions, loops, and how long each unit of an SM works on a loop.

Legend: SM streaming multiprocessor, CTA block of threads, MAC multiply-accumulate; lanes are
threads of a warp. HGMMA is wgmma of Hopper (one warpgroup = 4 warps), HMMA mma.sync (one warp).

An inner loop is found by its backward branch: a branch at address b to t <= b closes the loop [t,
b]. Branches to one t close one loop; a loop that holds no other is an inner loop. Of several inner
loops the main one is the one with the most multiply-accumulates, and of equals the shortest: for
attention the loop over blocks of keys (queries in bwd_dkdv) that need no mask. A kernel without a
loop is counted whole.
"""

import re
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*);")
UNITS = {
    "tensor": "HGMMA HMMA QGMMA IGMMA IMMA",
    "mufu": "MUFU",
    "fma": "FFMA FMUL FADD HFMA2 HMUL2 HADD2",
    "imad": "IMAD",
    "alu": (
        "IADD3 IADD VIADD LOP3 LOP SHF SHL SHR ISETP FSETP ISEL SEL FSEL FMNMX FMNMX3 IMNMX VIMNMX "
        "VIADDMNMX PRMT MOV LEA PLOP3 P2R R2P IABS POPC BREV FLO SGXT BMSK HSETP2 HMNMX2 FCHK "
        "CS2R VOTE VIMNMX3"
    ),
    "conversion": "F2F F2FP F2I I2F I2FP FRND I2I",
    "shared": "LDS STS LDSM STSM LDGSTS ATOMS",
    "global": "LDG STG LD ST ATOMG ATOM RED",
    "shuffle": "SHFL",
    "spill": "LDL STL",
}
UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names.split()}

# Results of one SM in one clock (CUDA C++ Programming Guide, throughput of arithmetic
# instructions); tensor: 16-bit MACs, by the products' published dense rates (A100 312 TFLOP/s,
# H100 SXM 989 TFLOP/s), tf32 the half of it.
RATES = {
    80: {"tensor": 1024, "fma": 64, "mufu": 16, "alu": 64, "imad": 64, "shuffle": 32},
    90: {"tensor": 2048, "fma": 128, "mufu": 16, "alu": 64, "imad": 64, "shuffle": 32},
}
ISSUE = 128  # lanes: four schedulers, each one instruction of a warp in one clock
SHARED_BYTES = 128  # of an SM in one clock


class Instruction(NamedTuple):
    """`name` is the mnemonic up to its first dot, `guard` the predicate it is executed under."""

    address: int
    name: str
    mnemonic: str
    operands: str
    guard: str = ""


class SmLimits(NamedTuple):
    """What an SM shares out among its CTAs (CUDA C++ Programming Guide, technical
    specifications)."""

    shared: int  # bytes; each CTA takes 1024 more than it asks for
    registers: int = 65536
    warps: int = 64
    ctas: int = 32


SM = {80: SmLimits(164 * 1024), 90: SmLimits(228 * 1024)}


def instructions(sass):
    """The instructions of one kernel, in order, as cuobjdump prints them."""
    return [
        Instruction(
            int(address, 16), mnemonic.split(".")[0], mnemonic, operands.strip(), guard.strip()
        )
        for address, guard, mnemonic, operands in INSTRUCTION.findall(sass)
    ]


def loops(code):
    """(start, end) addresses of the inner loops; see the head of this file."""
    spans = {}
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        if instruction.name != "BRA" or target is None:
            continue
        start = int(target.group(1), 16)
        if start < instruction.address:  # a branch to itself is the padding after the end
            spans[start] = max(instruction.address, spans.get(start, 0))
    found = sorted(spans.items())
    return [
        (start, end)
        for start, end in found
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in found)
    ]


def main_loop(code):
    """The instructions of the main inner loop, and whether there is one. Loops beside products that
    stand outside all loops (the zeroing of slack rows) do not count."""
    bodies = [[i for i in code if start <= i.address <= end] for start, end in loops(code)]
    heaviest = max(bodies, key=_weight, default=[])
    if not heaviest or (macs(code, 4) and not macs(heaviest, 4)):
        return code, False
    return heaviest, True


def _weight(body):
    return macs(body, 4), fmas(body), -len(body)


def fmas(body):
    """How many instructions multiply and accumulate in fp32."""
    return sum(i.name == "FFMA" for i in body)


def macs(body, warps):
    """MACs of a CTA's tensor cores in a body, each HGMMA counted once for a warpgroup."""
    total = 0
    for i in body:
        if i.name == "HGMMA":
            m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", i.mnemonic).groups())
            total += m * n * k * warps // 4
        elif i.name == "HMMA":
            shape = re.search(r"\.(1688|16816|1684)\b", i.mnemonic).group(1)
            total += 16 * 8 * int(shape[3:]) * warps
    return total


def shared_bytes(body):
    """Bytes a thread moves between registers or global and shared memory, by explicit
    instructions."""
    total = 0
    for i in body:
        parts = i.mnemonic.split(".")
        if i.name in ("LDSM", "STSM"):  # .4: four matrices of 8 x 8 16-bit values for a warp
            total += 4 * (int(parts[-1]) if parts[-1] in ("2", "4") else 1)
        elif UNIT_OF.get(i.name) == "shared":  # the width may stand before .ZFILL
            total += next((int(part) // 8 for part in parts if part in ("64", "128")), 4)
    return total


def mix(body):
    """Instructions of a body by unit; "all" counts each, "other" those of no unit named here."""
    counts = dict.fromkeys([*UNITS, "other"], 0)
    for i in body:
        counts[UNIT_OF.get(i.name, "other")] += 1
    return {"all": len(body), **counts}


def clocks(body, warps, arch, tf32=False):
    """Clocks for which each unit of an SM is busy while one CTA runs a body once.

    FFMA, FMUL, FADD and IMAD share the FMA pipe, and IMAD only goes through half of it on sm_90.
    Conversions are counted at the ALU's rate. The wgmma operands in shared memory are not counted.
    """
    counts, rates = mix(body), RATES[arch]
    lanes = 32 * warps
    return {
        "tensor": macs(body, warps) / rates["tensor"] * (2 if tf32 else 1),
        "MUFU": counts["mufu"] * lanes / rates["mufu"],
        "FMA": max(
            (counts["fma"] + counts["imad"]) * lanes / rates["fma"],
            counts["imad"] * lanes / rates["imad"],
        ),
        "ALU": (counts["alu"] + counts["conversion"]) * lanes / rates["alu"],
        "shared": shared_bytes(body) * lanes / SHARED_BYTES
        + counts["shuffle"] * lanes / rates["shuffle"],
        "issue": counts["all"] * lanes / ISSUE,
    }


def residents(registers, shared, warps, arch):
    """CTAs that an SM could hold at once by each thing that they share. Registers are dealt out by
    256 a warp, shared memory by 128 bytes."""
    sm = SM[arch]
    per_warp = -(-registers * 32 // 256) * 256
    return {
        "registers": sm.registers // per_warp // warps,
        "shared": sm.shared // (-(-(shared + 1024) // 128) * 128),
        "warps": sm.warps // warps,
        "CTAs": sm.ctas,
    }


def occupancy(registers, shared, warps, arch):
    """CTAs that an SM holds at once."""
    return min(residents(registers, shared, warps, arch).values())
