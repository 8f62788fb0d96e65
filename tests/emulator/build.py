"""Compiles bertkern's CUDA sources for the emulator: a Python module `_emulated` with the functions
cuda_* of bertkern._C, made by the host's C++ compiler alone.

    python tests/emulator/build.py      builds it and prints where it is

Kernels and the host code beside them are compiled with the callbacks of -fsanitize=thread, which
the machine defines (machine/watch.cpp); no sanitizer's runtime is linked. Objects are kept in
build/emulator under a hash of what they are made from.
"""

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"
JOBS = 2

COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
MACHINE = ("-O2", "-g1", "-Wall", "-Wno-psabi")
BINDINGS = ("-O0", "-w")
# Accesses stay as the source has them: none merged into wider ones, none turned into calls.
KERNELS = (
    *("-O1", "-g1", "-fsanitize=thread,alignment", "-w"),
    *("-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-strict-aliasing"),
    "-fno-optimize-sibling-calls",  # a return address is that of the kernel's call
)
GCC_KERNELS = ("-fno-store-merging", "-fno-tree-loop-distribute-patterns")
GCC_NO_ENTRIES = ("--param", "tsan-instrument-func-entry-exit=0")
CLANG_NO_ENTRIES = ("-mllvm", "-tsan-instrument-func-entry-exit=0")


class Missing(Exception):
    """What the emulator needs and is not there; the message says what."""


@functools.cache
def compiler() -> str:
    """The C++ compiler; raises Missing."""
    if sys.platform != "linux":
        raise Missing(f"the emulator is for Linux, not {sys.platform}")
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    for command in (configured.split()[0], "c++", "g++", "clang++"):
        if found := shutil.which(command):
            return found
    raise Missing("no C++ compiler: none of $CXX, c++, g++, clang++")


def check() -> None:
    """Raises Missing unless a module can be built."""
    compiler()
    if importlib.util.find_spec("pybind11") is None:
        raise Missing("pybind11 is not installed")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise Missing("Python's headers are not installed")


def _accepts(*flags: str) -> bool:
    command = [compiler(), *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


@functools.cache
def kernel_flags() -> tuple[str, ...]:
    extra = [f for f in GCC_KERNELS if _accepts("-Werror", f)]
    for flags in (GCC_NO_ENTRIES, CLANG_NO_ENTRIES):
        if _accepts("-fsanitize=thread", *flags):
            return (*KERNELS, *extra, *flags)
    return (*KERNELS, *extra)


@functools.cache
def _hash_of(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return "absent"


def compile_unit(source: Path, flags: tuple[str, ...]) -> Path:
    """An object, compiled anew unless its command and all that it was made from are the same.

    A record beside it holds the contents' hashes: times of files say nothing in a fresh checkout.
    """
    command = [
        compiler(),
        *COMMON,
        *flags,
        f"-I{HERE}",
        f"-I{CSRC}",
        "-x",
        "c++",
        "-c",
        str(source),
    ]
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}.o"
    record = target.with_suffix(".json")
    if target.exists() and record.exists():
        made_from = json.loads(record.read_text())
        if all(_hash_of(path) == value for path, value in made_from.items()):
            return target
    record.unlink(missing_ok=True)
    dependencies = target.with_suffix(".d")
    done = subprocess.run(
        [*command, "-o", str(target), "-MD", "-MF", str(dependencies)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")
    read = dependencies.read_text().replace("\\\n", " ").partition(": ")[2].split()
    record.write_text(json.dumps({path: _hash_of(path) for path in read}))
    return target


def link(objects: list[Path], target: Path) -> None:
    """Makes a module of objects.

    Those of the machine come first: of a function of a header that several have, the linker takes
    the first one's copy, and the machine's own must not be one that is watched.
    """
    machine = {path.stem for path in (HERE / "machine").glob("*.cpp")}
    ordered = sorted(objects, key=lambda path: path.name.rpartition("-")[0] not in machine)
    command = [compiler(), "-shared", "-o", str(target), *map(str, ordered), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build(
    name: str = "_emulated", kernels: tuple[Path, ...] = (), module: Path | None = None
) -> Path:
    """The path of a module; builds what is not there yet.

    Args:
        name: the module's.
        kernels: sources with kernels; by default all of csrc/cuda.
        module: the source that defines the module; by default module.cpp.
    """
    import pybind11

    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    units = [(path, MACHINE) for path in sorted((HERE / "machine").glob("*.cpp"))]
    if kernels:
        units += [(path, kernel_flags()) for path in kernels]
    else:
        # What talks to the CUDA runtime itself (device.cu) has a counterpart in module.cpp.
        sources = [
            p for p in sorted((CSRC / "cuda").glob("*.cu")) if "#include <cu" not in p.read_text()
        ]
        units += [(path, kernel_flags()) for path in sources]
        units.append((CSRC / "cuda" / "bindings.cpp", (*BINDINGS, *includes)))
    units.append((module or HERE / "module.cpp", (*BINDINGS, *includes)))
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run share the build
        slowest_first = sorted(units, key=lambda u: (u[0].suffix != ".cu", -u[0].stat().st_size))
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(lambda unit: compile_unit(*unit), slowest_first))
        contents = "".join(_hash_of(str(path)) for path in objects)
        key = hashlib.sha256(contents.encode()).hexdigest()[:16]
        folder = BUILD / f"{name}-{key}"
        target = folder / f"{name}.so"
        if not target.exists():
            for old in BUILD.glob(f"{name}-*"):
                if old.is_dir():
                    shutil.rmtree(old)
            folder.mkdir()
            partial = folder / "partial.so"
            link(objects, partial)
            partial.rename(target)
    return target


def load(path: Path) -> ModuleType:
    """The module at a path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
