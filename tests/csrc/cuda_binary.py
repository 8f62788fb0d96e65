"""Reads the CUDA kernels in the compiled extension: resources, instructions, one turn of the loop.

The machine code is taken out of bertkern._C itself by cuobjdump (beside nvcc, or in Triton's
wheel), one cubin for each source and target, and read by two processes.
"""

import ctypes
import importlib.util
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
    """A kernel: its function and its template arguments as they stand in the source."""

    function: str
    arguments: tuple

    def __str__(self):
        return f"{self.function}<{', '.join(self.arguments)}>" if self.arguments else self.function

    def numbers(self, template):
        """The arguments of the tile `template`<...>, as integers."""
        text = next(a for a in self.arguments if a.startswith(f"{template}<"))
        words = re.findall(r"\w+", text)[1:]
        return tuple(int({"true": 1, "false": 0}.get(word, word)) for word in words)


class Code(NamedTuple):
    """What a kernel became for one target. `turn`: of Paths.turn, `spare` without dropout."""

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
    found = re.fullmatch(r"(?:void )?bertkern::sm\d+::(\w+?)(?:_kernel)?(?:<(.*)>)?\(.*\)", text)
    if found is None:
        return Name(text, ())
    arguments = re.split(r", (?![^<]*>)", found.group(2)) if found.group(2) else []
    for pattern, short in TYPES.items():
        arguments = [short if re.fullmatch(pattern, a) else a for a in arguments]
    return Name(found.group(1), tuple(a.replace("bertkern::", "").strip() for a in arguments))


def wanted(name, dropout):
    """How much an instruction is wanted on a turn's way; see code_paths.

    Attention: the products, the copies of the tile after, the lse and delta of its queries; in the
    dropout variant the draws, in the general one a bias in the tensors' dtype. LayerNorm: whole
    vectors, all operands that are optional, dropout on or (`dropout` False) off. Else: loads.
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
            return i.name in ("HMMA", "HGMMA", "LDGSTS") or i.mnemonic == "LDG.E"
        if tiled:
            return i.mnemonic in ("LDG.E.128", "STG.E.128")
        return i.name == "LDG"

    return of


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
    turn, is_loop, size = paths.turn(wanted(name, dropout=True))
    spare = paths.turn(wanted(name, dropout=False))[0] if "layer_norm" in name.function else turn
    # For sm_90 cuobjdump counts the 1024 bytes that the system takes of each CTA.
    static = usage["SHARED"] - (1024 if target.startswith("sm_9") else 0)
    return Code(
        *(name, target, usage["REG"], usage["STACK"], static),
        *(Counter(i.mnemonic for i in code), turn, spare, is_loop, size),
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
