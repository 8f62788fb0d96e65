"""Reads the CUDA kernels in the compiled extension: resources, instructions, one turn of the loop.

The machine code is taken out of bertkern._C itself by cuobjdump (beside nvcc, or in Triton's
wheel), one cubin for each source and target, and read by two processes.
"""

import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from csrc.code_paths import Paths


def _reader():
    """The reader of machine code, tests/kernels/sass.py, whose folder is no package; under a name
    of its own, since its instructions are sent between processes."""
    path = Path(__file__).resolve().parents[1] / "kernels" / "sass.py"
    spec = importlib.util.spec_from_file_location("csrc_sass", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sass = _reader()
PROCESSES = 2
TYPES = {
    r"__half|bertkern::ptx::half": "fp16",
    r"__nv_bfloat16|bertkern::ptx::bfloat16": "bf16",
    r"float": "fp32",
    r"\(bertkern::AttentionVariant\)0": "plain",
    r"\(bertkern::AttentionVariant\)1": "dropout",
    r"\(bertkern::AttentionVariant\)2": "general",
}
HASH_MULTIPLIER = "0x7feb352d"  # kHashMulA of csrc/common/dropout.h: one product for each hash


class Missing(Exception):
    """What is needed to read the extension and is not there; the message says what."""


class Name(NamedTuple):
    """A kernel: its function, its template arguments as they stand in the source, and the folder of
    csrc/cuda, a namespace, too, that it is defined in."""

    function: str
    arguments: tuple
    room: str = "sm80"

    def __str__(self):
        return f"{self.function}<{', '.join(self.arguments)}>" if self.arguments else self.function

    def numbers(self, template):
        """The arguments of the tile `template`<...>, as integers."""
        text = next(a for a in self.arguments if a.startswith(f"{template}<"))
        words = re.findall(r"\w+", text)[1:]
        return tuple(int({"true": 1, "false": 0}.get(word, word)) for word in words)


class Code(NamedTuple):
    """What a kernel became for one target. `turn`: of Paths.turn, `spare` without dropout;
    `setmaxnreg`: the registers of a thread that it asks for, in rising order; `serial`: products of
    wgmma that are waited for alone, see serial_products."""

    name: Name
    target: str
    registers: int
    stack: int
    static_shared: int
    mnemonics: Counter
    turn: list
    spare: list
    is_loop: bool
    loop_size: int
    setmaxnreg: tuple = ()
    serial: int = 0

    @property
    def arch(self):
        """80 or 90."""
        return int(re.search(r"\d+", self.target).group())


def cuobjdump():
    """The program's path; raises Missing."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    for path in (shutil.which("cuobjdump"), *(folder / "cuobjdump" for folder in folders)):
        if path and os.access(path, os.X_OK):
            return str(path)
    raise Missing("no cuobjdump: not on PATH, not in CUDA_HOME, and no Triton for NVIDIA")


def demangled(symbol):
    """The C++ name of a symbol, by the C++ runtime that the extension itself is linked to."""
    runtime, libc = ctypes.CDLL("libstdc++.so.6"), ctypes.CDLL(None)
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        libc.free(text)


def name_of(symbol):
    """The Name in a kernel's symbol, alike for nvcc and for the host's compiler."""
    text = demangled(symbol)
    found = re.fullmatch(r"(?:void )?bertkern::(sm\d+)::(\w+?)(?:_kernel)?(?:<(.*)>)?\(.*\)", text)
    if found is None:
        return Name(text, ())
    room, function, arguments = found.groups(default="")
    arguments = re.split(r", (?![^<]*>)", arguments) if arguments else []
    for pattern, short in TYPES.items():
        arguments = [short if re.fullmatch(pattern, a) else a for a in arguments]
    # A swizzle's value is its span in bytes.
    arguments = (re.sub(r"\(bertkern::Swizzle\)|bertkern::", "", a).strip() for a in arguments)
    return Name(function, tuple(arguments), room)


def wanted(name, dropout):
    """How much an instruction is wanted on a turn's way; see code_paths.

    Attention: the products, the copies of the tile after, the lse and delta of its queries; in the
    dropout variant the draws, in the general one a bias in the tensors' dtype. On Hopper, where one
    warp has the copies made for all others: the products, which also say which of the kernel's
    loops it is, and the signals that a tile is used up. LayerNorm: whole vectors, all operands that
    are optional, dropout on or (`dropout` False) off. Else: loads.
    """
    draws = "dropout" in name.arguments or (dropout and "layer_norm" in name.function)
    biased = "general" in name.arguments or name.function == "attention_bwd_bias"
    tiled = any(a.startswith(("AttentionTile<", "NormTile<")) for a in name.arguments)

    def of(i):
        if draws and i.name == "IMAD" and HASH_MULTIPLIER in i.operands:
            return 1
        if "attention" in name.function:
            if biased and i.mnemonic == "LDG.E.U16":
                return 2
            if name.room == "sm90":
                shape = re.fullmatch(r"HGMMA\.64x(\d+)x16\..*", i.mnemonic)
                return int(shape.group(1)) if shape else i.mnemonic.startswith("SYNCS.ARRIVE")
            return i.name in ("HMMA", "LDGSTS") or i.mnemonic == "LDG.E"
        if tiled:
            return i.mnemonic in ("LDG.E.128", "STG.E.128")
        return i.name == "LDG"

    return of


def shunned(name):
    """What a turn's way leaves out where it can; see code_paths. Hopper's forward goes from tile to
    tile in one loop: where queries end it stores their output and asks shared memory for the
    next."""
    ends = name.room == "sm90" and name.function == "attention_fwd"
    return lambda i: ends and i.name in ("LDS", "STS", "LDSM", "STSM", "STG")


def serial_products(code):
    """How many products of wgmma ptxas has run one by one.

    Where registers of a running product may be touched it gives up on letting products run: it ends
    a group ("gsb0") with each, waits for it, and says so in its log (C7508 and up, "wgmma.mma_async
    instructions are serialized"). Every product of the kernels is several instructions that add to
    the same registers, so a group of one is none of theirs.
    """
    ends = [True, *("gsb" in i.operands for i in code if i.name == "HGMMA")]
    return sum(before and end for before, end in itertools.pairwise(ends))


def running(turn):
    """Of each instruction of a loop's turn, whether a product of wgmma that the warpgroup started
    runs while it passes."""
    committed, started, found = 0, False, []
    for i in [*turn, *turn]:  # products may be waited for in the turn after
        if i.name == "HGMMA":
            started = "gsb" not in i.operands
            committed += not started
        elif i.mnemonic.startswith("WARPGROUP.DEPBAR"):
            committed = min(committed, int(i.operands.rpartition("0x")[2], 16))
        found.append(started or committed > 0)
    return found[len(turn) :]


def read_cubin(tool, path, target):
    """The Code of each kernel in a cubin."""
    usage = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True)
    resources = dict(re.findall(r"Function (\S+):\s*\n\s*(.*)", usage.stdout))
    found, symbol, lines = [], None, []

    def finish():
        if symbol is not None:
            found.append(_code(symbol, target, resources[symbol], "".join(lines)))

    with subprocess.Popen([tool, "-sass", path], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "Function : " in line:
                finish()
                symbol, lines = line.split(":")[1].strip(), []
            elif line.startswith("        /*"):  # the lines between hold only the encoding
                lines.append(line)
        finish()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return found


def _code(symbol, target, resources, text):
    name, code = name_of(symbol), sass.instructions(text)
    usage = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", resources)}
    paths = Paths(code)
    # ptxas may take the first and the last turn of a loop apart: it then holds a third of all.
    turn, is_loop, size = paths.turn(
        wanted(name, dropout=True), shunned(name), 1 / 4 if name.room == "sm90" else 1 / 2
    )
    spare = paths.turn(wanted(name, dropout=False))[0] if "layer_norm" in name.function else turn
    # For sm_90 cuobjdump counts the 1024 bytes that the system takes of each CTA.
    static = usage["SHARED"] - (1024 if target.startswith("sm_9") else 0)
    dealt = (int(i.operands.rpartition("0x")[2], 16) for i in code if i.name == "USETMAXREG")
    return Code(
        *(name, target, usage["REG"], usage["STACK"], static),
        *(Counter(i.mnemonic for i in code), turn, spare, is_loop, size),
        *(tuple(sorted(dealt)), serial_products(code)),
    )


def read(extension):
    """(all Codes in a compiled extension, the version of the assembler that made them)."""
    tool = cuobjdump()
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "-xelf", "all", str(Path(extension).resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda p: -p.stat().st_size)
        versions = {_assembler(path.read_bytes()) for path in cubins}
        if len(versions) != 1:
            raise Missing(f"{extension} holds machine code of {sorted(versions) or 'no assembler'}")
        targets = [path.name.split(".")[-2] for path in cubins]
        with ProcessPoolExecutor(PROCESSES) as pool:
            parts = list(pool.map(read_cubin, [tool] * len(cubins), map(str, cubins), targets))
    return [code for part in parts for code in part], versions.pop()


def _assembler(cubin):
    """The version that ptxas notes in its output (.note.nv.tkinfo)."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, (V[\d.]+)", cubin)
    return found.group(1).decode() if found else "unknown"
