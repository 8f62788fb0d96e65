"""Makes the backend "cuda" work on CPU tensors: its kernels run on the emulator's machine.

`with emulated(seed): ...` puts the emulated module in the place of bertkern._C in the modules of
the backend, tells the machine of every tensor whose address they take, and fills the memory that
they ask torch for with NaN. Everything is as before afterwards.

What it cannot show: registers and spills, bank conflicts and speed; how tensor cores round a sum,
and how far the special-function unit is off; accesses that the host's compiler removes or the
device's adds.
"""

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from emulator import build
from torch import Tensor

from bertkern.ops import _backend

MODULES = sorted(path.stem for path in Path(_backend.__file__).parent.glob("_cuda*.py"))


@functools.cache
def module() -> ModuleType:
    """The emulated module; raises build.Missing where it cannot be built."""
    return build.load(build.build())


@functools.cache
def unusable() -> str | None:
    """Why the emulator cannot work on this machine; None when it can."""
    _, reason = _backend.native()
    if reason is not None:
        return reason
    try:
        build.check()
    except build.Missing as error:
        return str(error)
    return None


class _Overlay:
    """A module with some of its names replaced."""

    def __init__(self, under: ModuleType, **names: Any) -> None:
        self._under = under
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


def _bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class _Memory:
    """The tensors of a call, as the machine knows them."""

    def __init__(self, machine: ModuleType) -> None:
        self.machine = machine
        self.known: dict[tuple[Any, ...], Tensor] = {}  # of the call that is being prepared
        self.fresh: dict[int, Tensor] = {}  # by storage: those that no kernel has had yet

    def empty(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._poisoned(torch.empty(*args, **kwargs))

    def empty_strided(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._poisoned(torch.empty_strided(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._poisoned(torch.empty_like(*args, **kwargs))

    def _poisoned(self, tensor: Tensor) -> Tensor:
        if tensor.numel():
            _bytes(tensor).fill_(0xFF)  # NaN in every float format
            self.fresh[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.known:
            self.known[key] = tensor
            fresh = self.fresh.get(tensor.untyped_storage().data_ptr())
            initialised = fresh is None or bool((_bytes(fresh) != 0xFF).any())
            self.machine.register_memory(
                tensor.data_ptr(),
                tensor.shape,
                tensor.stride(),
                tensor.element_size(),
                initialised,
                "a tensor",
            )
        return tensor.data_ptr()

    def name(self, name: str, value: Any) -> None:
        """Tells the machine what an argument is called, if it is an address or some of them."""
        if isinstance(value, list | tuple):
            for i, part in enumerate(value):
                self.name(f"{name}[{i}]", part)
        elif isinstance(value, int) and any(key[0] == value for key in self.known):
            self.machine.name_memory(value, name)

    def forget(self) -> None:
        """The call is over."""
        self.machine.clear_memory()
        for tensor in self.known.values():
            self.fresh.pop(tensor.untyped_storage().data_ptr(), None)
        self.known.clear()


def argument_names(function: Any) -> list[str]:
    """Of a function of the module; its docstring begins `f(name: type, name: type) -> type`."""
    return re.findall(r"[(,] ?(\w+): ", function.__doc__.splitlines()[0])


class _Calls:
    """The functions cuda_* of the emulated module, everything else of bertkern._C."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self._extension = importlib.import_module("bertkern._C")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda_"):
            return getattr(self._extension, name)
        function = getattr(self._memory.machine, name)
        arguments = argument_names(function)
        if "stream" not in arguments:  # a question, no launch
            return function

        def call(*values: Any) -> Any:
            for argument, value in zip(arguments, values, strict=True):
                self._memory.name(argument, value)
            try:
                return function(*values)
            finally:
                self._memory.forget()

        return call


def _place(tensor: Tensor) -> tuple[int, int]:
    return 0, 0


@contextlib.contextmanager
def emulated(
    seed: int, resident_blocks: int = 2, find_races: bool = True, capability: int = 80
) -> Iterator[None]:
    """Inside, bertkern.backend("cuda") computes on CPU tensors.

    Args:
        seed: of the order in which threads run and copies arrive.
        resident_blocks: how many blocks of a grid run at the same time: multiprocessors.
        find_races: whether accesses are compared with those of other threads.
        capability: of the device, 10 times its major number and its minor one.
    """
    machine = module()
    machine.configure(
        seed=seed, resident_blocks=resident_blocks, find_races=find_races, capability=capability
    )
    memory = _Memory(machine)
    usable = _backend.unusable

    def unusable_here(name: str, device_type: str) -> str | None:
        return None if (name, device_type) == ("cuda", "cpu") else usable(name, device_type)

    # Last, so that it is chosen only where it is forced.
    preference = {**_backend._PREFERENCE, "cpu": (*_backend._PREFERENCE["cpu"], "cuda")}
    seams = {
        "_C": _Calls(memory),
        "address": memory.address,
        "place": _place,
        "torch": _Overlay(
            torch,
            empty=memory.empty,
            empty_like=memory.empty_like,
            empty_strided=memory.empty_strided,
        ),
    }
    with contextlib.ExitStack() as stack:
        for name in MODULES:
            users = importlib.import_module(f"bertkern.ops.{name}")
            for seam, value in seams.items():
                if hasattr(users, seam):
                    stack.enter_context(mock.patch.object(users, seam, value))
        stack.enter_context(mock.patch.object(_backend, "unusable", unusable_here))
        stack.enter_context(mock.patch.object(_backend, "_PREFERENCE", preference))
        stack.callback(_backend._choose.cache_clear)
        _backend._choose.cache_clear()
        yield
