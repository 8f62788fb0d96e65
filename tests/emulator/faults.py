"""The test kernels of kernels/ as Python functions: small kernels that are right or have one fault,
products of one warp, casts."""

import functools
import re
from types import ModuleType

import torch
from emulator import build
from torch import Tensor

KERNELS = build.HERE / "kernels"
SOURCE = KERNELS / "faults.cu"


@functools.cache
def module() -> ModuleType:
    """The module, on a machine of its own."""
    sources = tuple(sorted(KERNELS.glob("*.cu")))
    return build.load(build.build("_faults", sources, KERNELS / "module.cpp"))


def register(name: str, tensor: Tensor, initialised: bool = True) -> int:
    """Makes a tensor global memory; its address."""
    module().register_memory(
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.element_size(),
        initialised,
        name,
    )
    return tensor.data_ptr()


def run(
    name: str,
    fault: int = 0,
    *,
    seed: int = 0,
    blocks: int = 1,
    threads: int = 128,
    shared_bytes: int = 4096,
    resident_blocks: int = 2,
    find_races: bool = True,
    x: Tensor | None = None,
    y_is_written: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x, y) after a kernel of faults.cu; x is 0, 1, ... unless given, y NaN before."""
    x = torch.arange(512.0) if x is None else x
    y = torch.full((128,), float("nan"))
    machine = module()
    machine.configure(seed, resident_blocks, find_races)
    machine.clear_memory()
    machine.fault(
        name,
        register("x", x),
        register("y", y, initialised=y_is_written),
        fault,
        blocks,
        threads,
        shared_bytes,
    )
    return x, y


def lines(name: str, marker: str) -> list[str]:
    """ "faults.cu:12" of each line of a kernel that ends in the comment `marker`."""
    source = SOURCE.read_text()
    start = re.search(rf"BERTKERN_KERNEL\(\d+\)\s*{name}\(", source)
    assert start is not None, name
    end = source.index("\n}\n", start.end())
    first = source.count("\n", 0, start.start()) + 1
    body = source[start.start() : end].splitlines()
    return [
        f"{SOURCE.name}:{first + i}" for i, line in enumerate(body) if line.endswith(f"// {marker}")
    ]
