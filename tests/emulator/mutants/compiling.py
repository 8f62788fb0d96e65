"""Compiles all mutants into one module: each site chooses at run time what it does, so a mutant
costs a run and no compilation (Untch, Offutt, Harrold 1993, "Mutation Analysis Using Mutant
Schemata").

A folder with the changed kernels stands first on the include path, then overlay/ with its small
tables of instantiations, then what the emulator is made of.
"""

import fcntl
import hashlib
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from emulator import build

from .sites import SOURCES, Mutant, sources

OVERLAY = Path(__file__).resolve().parent / "overlay"
UNITS = (  # of csrc/cuda
    "attention",
    "attention_bwd_sm90",
    "attention_sm90",
    "layer_norm",
    "embedding_layer_norm",
)
FOLDER = build.BUILD / "mutants"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _choice(original: str, others: list[tuple[int, str]]) -> str:
    """Source text that does `original`, or another of (number, text) in that mutant."""
    if original.endswith(";"):
        chain = "".join(f"if (mutant({number})) {text} else " for number, text in others)
        return f"{{ {chain}{original} }}"
    chain = "".join(f"mutant({number}) ? ({text}) : " for number, text in others)
    return f"({chain}({original}))"


def with_choices(text: str, numbered: Sequence[tuple[int, Mutant]]) -> str:
    """A file's text with all of its mutants, each under its number; lines stay where they are.

    A site may lie inside another; the outer one's other texts are then without the inner faults.
    """
    sites: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for number, mutant in numbered:
        end = mutant.start + len(mutant.before)
        assert text[mutant.start : end] == mutant.before, mutant.name
        sites.setdefault((mutant.start, -end), []).append((number, _one_line(mutant.after)))
    ordered = sorted(sites)  # an outer one before those inside

    def render(start: int, end: int, at: int) -> tuple[str, int]:
        """Text from start to end, whose sites begin at ordered[at]; and the first one after it."""
        parts, position = [], start
        while at < len(ordered) and ordered[at][0] < end:
            first, last = ordered[at][0], -ordered[at][1]
            if last > end:
                raise ValueError(f"two sites overlap: {text[first:last]!r}")
            inside, following = render(first, last, at + 1)
            parts += [text[position:first], _choice(inside, sites[ordered[at]])]
            position, at = last, following
        return "".join([*parts, text[position:end]]), at

    return '#include "mutant.h"\n#line 1\n' + render(0, len(text), 0)[0]


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def module_of(mutants: Sequence[Mutant]) -> Path:
    """The path of a module with all of them; the first one's number is 1. Kept as build.build()
    keeps its own."""
    import pybind11

    for file in sources():
        text = (SOURCES / file).read_text()
        numbered = [(n, m) for n, m in enumerate(mutants, 1) if m.file == file]
        _write(FOLDER / "cuda" / file, with_choices(text, numbered))
    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    overlaid = ("-Og", "-w", f"-I{FOLDER}", f"-I{OVERLAY}")
    units = [(path, build.MACHINE) for path in sorted((build.HERE / "machine").glob("*.cpp"))]
    units.append((OVERLAY / "mutant.cpp", build.MACHINE))
    for path in (build.HERE / "module.cpp", build.CSRC / "cuda" / "bindings.cpp"):
        units.append((path, (*build.MACHINE, *python)))
    kernels = (*build.kernel_flags(), *overlaid)
    units += [(build.CSRC / "cuda" / f"{unit}.cu", kernels) for unit in UNITS]
    with open(build.BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [build.compile_unit(*unit) for unit in units]
        contents = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in objects)
        key = hashlib.sha256(contents.encode()).hexdigest()[:16]
        target = FOLDER / key / "_emulated.so"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            build.link(objects, target)
    return target
