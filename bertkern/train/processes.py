"""The processes of a run: one, or those that `torchrun` or `accelerate launch` started.

A step's batch is divided by tokens over processes, and by each process into as many pieces as
gradients are accumulated over. The pieces keep the dropout masks and the weight in the loss that
they have in the whole batch, so n processes compute what one would.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertkern.data.packing import Batch, PackedBatch
from bertkern.nn import DecoderLayer, EncoderLayer

Value = TypeVar("Value")


class Processes:
    """This process among those of the run.

    The process group that is formed here is left when the program ends; one that was there before
    stays its maker's.

    Args:
        device: where to compute. With several processes, a CUDA device without an index becomes
            the one of this process.

    Attributes:
        index, count: which process this is, and of how many.
        is_main: whether it is the one that writes files and shows progress.
        device: where it computes.

    Raises:
        ModuleNotFoundError: several processes, but `accelerate` is not installed.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.index, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"several processes need the package accelerate ({error}): "
                    "pip install 'bertkern[train]'"
                ) from error
            formed_here = not torch.distributed.is_initialized()
            state = PartialState(cpu=self.device.type == "cpu")
            if formed_here:
                atexit.register(_leave_gloo)
            self.index, self.count, self.device = (
                state.process_index,
                state.num_processes,
                state.device,
            )

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def wrap(self, model: nn.Module, sharding: str) -> nn.Module:
        """The model as this run trains it: itself, or data-parallel, or sharded in place (FSDP2).

        With several processes, all start from the first one's weights.
        """
        if self.count == 1:
            return model
        if sharding == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.data, 0)
            for layer in [
                m for m in model.modules() if isinstance(m, (EncoderLayer, DecoderLayer))
            ]:
                fully_shard(layer)
            fully_shard(model)
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    @contextmanager
    def bare(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model without what trains it around, all of whose methods may be called."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            yield model.module
        elif self.count > 1:
            from torch.distributed.fsdp import FSDPModule

            shards = [part for part in model.modules() if isinstance(part, FSDPModule)]
            for part in shards:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            yield model
            for part in shards:
                part.set_reshard_after_forward(part is not model, recurse=False)
                part.reshard()
        else:
            yield model

    def parts_of(self, batch: Batch, pieces: int = 1) -> list[tuple[PackedBatch, bool]]:
        """This process's share of a batch, in so many pieces; and whether each one counts.

        A batch of fewer examples than there are pieces in all leaves some pieces empty. There the
        first example stands in and does not count: all processes must take part in a step.
        """
        bounds = divide(batch.lengths, self.count * pieces)
        parts = []
        for piece in range(self.index * pieces, (self.index + 1) * pieces):
            first, last = int(bounds[piece]), int(bounds[piece + 1])
            counts = first < last
            parts.append((batch.part(first, last) if counts else batch.part(0, 1), counts))
        return parts

    def part_of(self, batch: Batch) -> tuple[PackedBatch, bool]:
        """This process's share of a batch as one piece, and whether it counts."""
        return self.parts_of(batch)[0]

    def gather(self, values: list[Value]) -> list[Value]:
        """The lists of all processes, one behind the other; any objects that can be pickled."""
        if self.count == 1:
            return values
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, values)
        return [value for part in gathered for value in part]

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes of a tensor on this process's device; no host waits."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes must ask together."""
        if self.count == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)).item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def without_sync(self, model: nn.Module, pending: bool) -> AbstractContextManager[Any]:
        """A block whose backward leaves gradients local where more pieces of the step follow."""
        if self.count == 1:
            return nullcontext()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.no_sync() if pending else nullcontext()
        model.set_requires_gradient_sync(not pending)  # type: ignore[operator]
        return nullcontext()


def _leave_gloo() -> None:
    """End a gloo group's threads before the interpreter goes.

    One that still runs then may abort a process whose work is done ("terminate called without an
    active exception"), and torchrun reports a failed run. NCCL's group ends with its process, and
    leaving it could wait for processes that have died.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def divide(lengths: NDArray[np.int64], parts: int) -> Sequence[int]:
    """Bounds [parts + 1] that divide examples, in order, into parts of about as many tokens."""
    ends = np.cumsum(lengths)
    targets = ends[-1] * np.arange(1, parts) / parts
    middles = ends - lengths / 2
    return [0, *np.searchsorted(middles, targets).tolist(), len(lengths)]
