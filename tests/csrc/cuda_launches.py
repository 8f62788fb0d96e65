"""Which kernels the launch code of csrc/cuda launches, with how many threads and how much memory.

The launch code itself says so: csrc/cuda/*.cu is compiled by the host's C++ compiler with a
launch.h that prints (launches/) and with the emulator's csrc/ptx, and every op is called in each of
its ways (launches/launches.cpp). The kernels' bodies are compiled, too, since their addresses are
taken, but nothing of the emulator's machine is linked, for none of them runs.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from csrc.cuda_binary import Missing, name_of

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
EMULATOR = HERE.parent / "emulator"


class Launch(NamedTuple):
    """How a kernel is launched at the most: `what` is the launch's own name for it."""

    what: str
    threads: int
    shared: int


def compiler():
    """The C++ compiler; raises Missing."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    for command in (configured.split()[0], "c++", "g++", "clang++"):
        if found := shutil.which(command):
            return found
    raise Missing("no C++ compiler: none of $CXX, c++, g++, clang++")


def launches():
    """{Name: Launch} of all that csrc/cuda launches."""
    cuda = {path: path.read_text() for path in sorted((CSRC / "cuda").glob("*.cu"))}
    # Launch code is plain C++; what includes CUDA's own headers asks the runtime other things.
    sources = [path for path, text in cuda.items() if "#include <cuda" not in text]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launches"
        command = [
            *(compiler(), "-std=c++17", "-O0", "-w"),
            *(f"-I{path}" for path in (HERE / "launches", EMULATOR, CSRC)),
            *("-x", "c++", *sources, HERE / "launches" / "launches.cpp", "-o", program),
            *("-rdynamic", "-Wl,--unresolved-symbols=ignore-all", "-ldl"),
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    found = {}
    for what, symbol, *numbers in map(str.split, lines.splitlines()):
        name = name_of(symbol)
        threads, shared = map(int, numbers)
        before = found.get(name, Launch(what, 0, 0))
        found[name] = Launch(what, max(before.threads, threads), max(before.shared, shared))
    return found
