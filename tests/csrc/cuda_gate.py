"""Compile gate of the CUDA C++ kernels: what csrc/cuda became for sm_80 and sm_90a.

    cd tests && PYTHONPATH=. python -m csrc.cuda_gate       (make sass)

reads the compiled extension and writes docs/machine-code-cuda.md; the exit code is 1 where a kernel
has a fault: spilled registers, too much shared memory, an instruction that should be there and is
not, products that ptxas has run one by one, a kernel that is launched and not compiled or the other
way round. No GPU is needed.
tests/csrc/test_cuda_gate.py holds the same faults, and the document to the extension.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from csrc import cuda_binary, cuda_launches

sass = cuda_binary.sass

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
DOCUMENT = ROOT / "docs" / "machine-code-cuda.md"
KERNEL = re.compile(r"^BERTKERN_KERNEL\(.*\)\n(\w+)_kernel\(", re.MULTILINE)
# By a kernel's folder in csrc/cuda: the targets that it is compiled for, and the most shared memory
# of a CTA, on Ada and GA10x (the least of all devices from sm_80 on) and on Hopper.
TARGETS = {"sm80": ("sm_80", "sm_90a"), "sm90": ("sm_90a",)}
SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024}

# Products of head dim length for one score; matrices [rows, cols] of the rows' type that pass
# between an SM and memory (of the embedding tables one, word: the others stay in the cache).
PRODUCTS = {
    "attention_fwd": 2,  # q·k, p·v
    "attention_bwd_short": 5,  # q·k, dout·v; dv, dk, dq
    "attention_bwd_queries": 3,  # q·k, dout·v; dq
    "attention_bwd_keys": 4,  # q·k, dout·v; dv, dk
    "attention_bwd_bias": 2,  # q·k, dout·v
}
MATRICES = {
    "layer_norm_fwd": 4,  # x, residual; y, z
    "layer_norm_bwd": 5,  # dy, dz, z; dx, dresidual
    "embedding_layer_norm_fwd": 2,  # word; y
    "embedding_layer_norm_bwd": 3,  # word, dy; dz
}
ATTENTION = "HMMA.16816.F32 LDSM.16.M88 LDGSTS.E.BYPASS.128 MUFU.EX2"
TRANSPOSED = "LDSM.16.MT88"  # where a product sums over the rows of a tile
NORM = "LDG.E.128 STG.E.128 SHFL.BFLY"
# wgmma, TMA, mbarriers (made, given, waited for), setmaxnreg both ways, stmatrix.
HOPPER = (
    "HGMMA UTMALDG SYNCS.EXCH SYNCS.ARRIVE SYNCS.PHASECHK USETMAXREG.DEALLOC USETMAXREG.TRY_ALLOC "
    "MUFU.EX2 STSM.16.M88"
)
# Kernels that make exponentials while a product of the same warpgroup runs.
OVERLAPPED = ("attention_fwd",)

# Issue slots for a score that Hopper's forward at head dim 64 is to need at most, without HGMMA.
GOALS = {"plain": 6.5, "dropout": 11.0}

# Published peaks: bytes of memory and dense 16-bit FLOP in a second (A100 80 GB SXM, H100 SXM data
# sheets). With sass.RATES they give the bytes that memory moves for one SM in one of its clocks.
PEAKS = {80: (2039e9, 312e12), 90: (3350e9, 989e12)}
MEMORY_BYTES = {
    arch: rate * 2 * sass.RATES[arch]["tensor"] / flop for arch, (rate, flop) in PEAKS.items()
}


class Kernel(NamedTuple):
    """A kernel as it was compiled for one target, and how it is launched at the most."""

    code: cuda_binary.Code
    launch: cuda_launches.Launch

    def __str__(self):
        return f"{self.code.name} on {self.code.target}"

    @property
    def warps(self):
        return self.launch.threads // 32

    @property
    def is_hopper(self):
        """Whether its warps have roles, and its products are wgmma's."""
        return self.is_attention and self.code.name.room == "sm90"

    @property
    def computing(self):
        """Threads that pass the main loop: on Hopper all but the warpgroup that has copies made."""
        return self.launch.threads - (128 if self.is_hopper else 0)

    @property
    def shared(self):
        """Bytes of a CTA, static and dynamic."""
        return self.code.static_shared + self.launch.shared

    @property
    def is_attention(self):
        return self.launch.what in PRODUCTS

    @property
    def work(self):
        """What a CTA does in a turn: scores, elements of a matrix, or words that it loads."""
        name = self.code.name
        if self.is_attention and self.is_hopper:
            _, warpgroups, columns, *_ = name.numbers("WarpgroupTile")
            return 64 * warpgroups * columns
        if self.is_attention:
            _, warps, row_tiles, columns = name.numbers("AttentionTile")
            return 16 * row_tiles * warps * columns
        if self.launch.what in MATRICES:
            return self.launch.threads * 8 * name.numbers("NormTile")[0]
        widths = (re.search(r"\.(64|128)", i.mnemonic) for i in self.code.turn if i.name == "LDG")
        return self.launch.threads * sum(int(w.group(1)) // 32 if w else 1 for w in widths)

    def slots(self, counts):
        """{unit: issue slots, of one thread each, for one of `work`}."""
        return {unit: n * self.computing / self.work for unit, n in counts.items()}

    def overlap(self, mnemonic=""):
        """The share of a turn's other instructions, or of those of one kind, that pass while the
        tensor cores work on a product of the same warpgroup."""
        pairs = zip(self.code.turn, cuda_binary.running(self.code.turn), strict=True)
        runs = [r for i, r in pairs if i.name != "HGMMA" and i.mnemonic.startswith(mnemonic)]
        return sum(runs) / max(1, len(runs))

    @property
    def residents(self):
        return sass.residents(self.code.registers, self.shared, self.warps, self.code.arch)

    @property
    def ctas(self):
        """CTAs that an SM holds."""
        return min(self.residents.values())

    def clocks(self):
        """Clocks for which each unit of an SM is busy with a turn; memory, too, but for attention,
        whose tiles come from the cache."""
        clocks = sass.clocks(self.code.turn, self.computing // 32, self.code.arch)
        if self.is_attention:
            return clocks
        size = 4 if "fp32" in self.code.name.arguments else 2
        moved = MATRICES[self.launch.what] * size if self.launch.what in MATRICES else 4
        return {**clocks, "memory": moved * self.work / MEMORY_BYTES[self.code.arch]}


def faults(kernel):
    """What is wrong with a kernel, in words; nothing if all is well."""
    code, found = kernel.code, []
    spilled = sum(n for m, n in code.mnemonics.items() if m.split(".")[0] in ("LDL", "STL"))
    if code.stack or spilled:
        found.append(f"spills: {code.stack} bytes of stack, {spilled} accesses")
    if code.static_shared:
        found.append(f"{code.static_shared} bytes of shared memory that no launch asks for")
    if kernel.shared > SHARED_LIMIT[code.name.room]:
        found.append(f"shared memory: {kernel.shared} > {SHARED_LIMIT[code.name.room]} bytes")
    if kernel.ctas == 0:
        found.append(f"does not fit an SM: {kernel.residents}")
    expected = []
    if kernel.is_hopper:
        expected = HOPPER.split()
    elif kernel.is_attention:
        expected = ATTENTION.split()
        expected += [] if kernel.launch.what == "attention_bwd_bias" else [TRANSPOSED]
    elif kernel.launch.what in MATRICES:
        expected = NORM.split()
    for mnemonic in expected:
        if not any(f"{m}.".startswith(f"{mnemonic}.") for m in code.mnemonics):
            found.append(f"no {mnemonic}")
    if kernel.is_attention:
        found += _attention_faults(kernel)
        found += _hopper_faults(kernel) if kernel.is_hopper else _copy_faults(kernel)
    return found


def _attention_faults(kernel):
    code, found = kernel.code, []
    needed, most = _products(kernel)
    done = sass.macs(code.turn, kernel.computing // 32)
    if not code.is_loop or not needed <= done <= most:
        found.append(f"a turn does {done} multiply-accumulates, its tile needs {needed}")
    bf16 = {m.endswith(".BF16") for m in code.mnemonics if m.startswith(("HMMA", "HGMMA"))}
    if bf16 != {"bf16" in code.name.arguments}:
        found.append("products of another type")
    draws = sum(
        i.name == "IMAD" and cuda_binary.HASH_MULTIPLIER in i.operands for i in code.turn
    )  # one for four scores
    if "dropout" in code.name.arguments and 4 * draws * kernel.computing < kernel.work:
        found.append(f"{draws} draws of dropout in a turn are too few")
    return found


def _products(kernel):
    """The multiply-accumulates that the tile of a turn needs, at the least and at the most, as the
    code of one warp counts them."""
    products, work = PRODUCTS[kernel.launch.what], kernel.work
    if not kernel.is_hopper:
        head_dim, *_ = kernel.code.name.numbers("AttentionTile")
        needed = products * head_dim * work
        # The warps of attention_bwd_short share out dq by whole fragments; the busiest is counted.
        return needed, needed * 9 // 8 if kernel.launch.what == "attention_bwd_short" else needed
    head_dim, warpgroups, _, _, span, _ = kernel.code.name.numbers("WarpgroupTile")
    needed = products * head_dim * work
    if kernel.launch.what == "attention_bwd_short" and kernel.code.name.function.endswith("_keys"):
        # The warpgroups share out dq by parts of its columns, of one span of the swizzle each.
        parts = 2 * head_dim // span
        needed += (warpgroups * -(-parts // warpgroups) - parts) * (span // 2) * work
    return needed, needed


def _copy_faults(kernel):
    # A turn copies two tiles of columns, for the bias's gradient two of rows, too; where rows of
    # threads do not divide a tile, with one copy more.
    head_dim, warps, row_tiles, columns = kernel.code.name.numbers("AttentionTile")
    tiles = [columns] * 2
    if kernel.launch.what == "attention_bwd_bias":
        tiles += [16 * row_tiles * warps] * 2
    least = sum(-(-rows * head_dim // (8 * kernel.launch.threads)) for rows in tiles)
    copies = sum(i.name == "LDGSTS" for i in kernel.code.turn)
    if least <= copies <= least + len(tiles):
        return []
    return [f"a turn makes {copies} copies of 16 bytes, its tiles need {least}"]


def _hopper_faults(kernel):
    code, found = kernel.code, []
    if code.serial:
        found.append(f"{code.serial} products are serialized: ptxas waits for each alone")
    if kernel.launch.what in OVERLAPPED and (share := kernel.overlap("MUFU.EX2")) < 1 / 2:
        found.append(f"{share:.0%} of the exponentials are made while a product runs")
    if kernel.ctas > 1:
        found.append(f"{kernel.ctas} CTAs an SM, but setmaxnreg deals out the registers of one")
    low, high = code.setmaxnreg if len(code.setmaxnreg) == 2 else (0, 0)
    dealt = low * (kernel.launch.threads - kernel.computing) + high * kernel.computing
    # A warpgroup waits for registers until others have given theirs back.
    if not (low <= code.registers <= high and dealt <= code.registers * kernel.launch.threads):
        found.append(
            f"setmaxnreg to {code.setmaxnreg} of {code.registers} registers for each of "
            f"{kernel.launch.threads} threads"
        )
    return found


def unmatched(codes, launched):
    """Faults of the whole: what is launched and what is compiled are the same, for each target, and
    they are all the kernels that the sources define."""
    wanted = {(name, target) for name in launched for target in TARGETS.get(name.room, ())}
    compiled = {(code.name, code.target) for code in codes}
    found = [f"{n} is not compiled for {t}, but launched" for n, t in wanted - compiled]
    found += [f"{n} is compiled for {t}, but not launched" for n, t in compiled - wanted]
    functions = {f"{name.room}/{name.function}" for name in launched}
    defined = set()
    for path in sorted((CSRC / "cuda").rglob("*.cuh")):
        defined |= {f"{path.parent.name}/{f}" for f in KERNEL.findall(path.read_text())}
    found += [f"{f}_kernel is launched, but not found in csrc/cuda" for f in functions - defined]
    found += [f"{f}_kernel is in csrc/cuda, but nothing launches it" for f in defined - functions]
    return sorted(found)


def read():
    """(kernels, faults of the whole, the assembler's version); raises cuda_binary.Missing."""
    try:
        from bertkern import _C
    except ImportError as error:
        raise cuda_binary.Missing(f"bertkern._C is not there: {error}") from error
    cuda = _C.build_info()["cuda"]
    if cuda.startswith("absent"):
        raise cuda_binary.Missing(f"bertkern._C is compiled without CUDA: {cuda}")
    launched = cuda_launches.launches()
    codes, version = cuda_binary.read(_C.__file__)
    kernels = [Kernel(code, launched[code.name]) for code in codes if code.name in launched]
    return kernels, unmatched(codes, launched), version


def main():
    """Write the document; exit code 1 where there is a fault."""
    from csrc import cuda_gate_document

    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    start = time.perf_counter()
    try:
        kernels, found, version = read()
    except cuda_binary.Missing as error:
        sys.exit(f"sass: {error}")
    DOCUMENT.write_text(cuda_gate_document.document(kernels, version), encoding="utf-8")
    found += [f"{kernel}: {fault}" for kernel in kernels for fault in faults(kernel)]
    for fault in found:
        print(fault, file=sys.stderr)
    print(
        f"sass: {len(kernels)} kernels, {len(found)} faults, "
        f"{time.perf_counter() - start:.0f} s; wrote {DOCUMENT.relative_to(ROOT)}"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
