"""The test kernels of kernels/ as Python functions: small kernels that are right or have one fault,
products, boxes, casts."""

import functools
import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from emulator import build
from torch import Tensor

KERNELS = build.HERE / "kernels"
SEEDS = range(10)


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
    cluster: int = 1,
    resident_blocks: int = 2,
    find_races: bool = True,
    x: Tensor | None = None,
    counters: bool = False,
    y_is_written: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x, y) after a kernel of *faults.cu.

    Before it x is 0, 1, ... unless given, or integers that are 0 where it holds counters; y is NaN.
    """
    if x is None:
        x = torch.zeros(512, dtype=torch.int32) if counters else torch.arange(512.0)
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
        cluster,
    )
    return x, y


@functools.cache
def _source_of(kernel: str) -> tuple[str, int, list[str]]:
    """(file, number of the first line, lines) of a kernel."""
    for path in KERNELS.glob("*faults.cu"):
        source = path.read_text()
        start = re.search(rf"BERTKERN_KERNEL\(\d+\)\s*{kernel}\(", source)
        if start is not None:
            end = source.index("\n}\n", start.end())
            first = source.count("\n", 0, start.start()) + 1
            return path.name, first, source[start.start() : end].splitlines()
    raise ValueError(f"no kernel {kernel}")


def lines(kernel: str, marker: str) -> set[str]:
    """ "faults.cu:12" of each line of a kernel that ends in the comment `marker`."""
    file, first, body = _source_of(kernel)
    found = {f"{file}:{first + i}" for i, line in enumerate(body) if line.endswith(f"// {marker}")}
    assert found, f"{kernel} has no line that is marked {marker}"
    return found


@dataclass(frozen=True)
class Case:
    """A kernel with a fault: what the error says, and the marked lines that it names."""

    kernel: str
    fault: int
    says: str
    names: tuple[str, ...] = ()
    how: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kernel}-{self.fault}"

    def check_found(self, seeds: range = SEEDS) -> None:
        """Under every seed the machine says what is wrong, and where."""
        for seed in seeds:
            with pytest.raises(RuntimeError, match=f"(?s)^{self.kernel}: .*{self.says}") as raised:
                run(self.kernel, self.fault, seed=seed, **self.how)
            named = set(re.findall(r"\w+\.cu:\d+", str(raised.value)))
            for marker in self.names:
                assert named & lines(self.kernel, marker), (seed, marker, raised.value)


def check_right(kernel: str, seeds: range = SEEDS, **how: Any) -> tuple[Tensor, Tensor]:
    """Without a fault a kernel passes and gives the same under every seed; what it gives."""
    ends = [run(kernel, seed=seed, **how) for seed in seeds]
    for x, y in ends:
        assert torch.equal(x.nan_to_num(-1), ends[0][0].nan_to_num(-1))
        assert torch.equal(y.nan_to_num(-1), ends[0][1].nan_to_num(-1))
    return ends[0]
