"""The whole state of a training run in one safetensors file, from which it goes on bit for bit.

model.<name>                 weights, whole also where processes hold parts of them
optimizer.<moment>.<name>    moments of the optimizer, and its count of updates
scaler.<name>                the loss scale of fp16
metadata "state"             TrainingState, as JSON

Random numbers are no part of it: those of a step are a function of (seed, step).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from bertkern.data.files import replacing
from bertkern.models.checkpoint import PretrainedModel, read_tensors
from bertkern.models.transformer import Transformer

from .history import History
from .processes import Processes
from .settings import LoopSettings

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_WHOLE = StateDictOptions(full_state_dict=True)  # every process reads the file


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        run: what the run is a function of (settings, config, data), to recognise it.
        history: what was measured so far.
        step: updates done.
        epoch, batch: the next batch of the data.
        epoch_step: updates done before this epoch.
        since_record: the losses of the updates since the last record of the history, and their
            tokens.
    """

    run: dict[str, Any]
    history: History
    step: int = 0
    epoch: int = 0
    batch: int = 0
    epoch_step: int = 0
    since_record: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
    processes: Processes,
) -> None:
    """Write the state of model and optimizer; all processes call it, the first one writes.

    Raises:
        OSError: the disk is full, or the folder not writable; an older checkpoint stays as it was.
    """
    tensors = {f"model.{name}": value for name, value in whole_weights(model).items()}
    # empty but in the first process
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    for name, entries in moments.get("state", {}).items():
        for moment, value in entries.items():
            tensors[f"optimizer.{moment}.{name}"] = value
    for name, value in scaler.state_dict().items():
        tensors[f"scaler.{name}"] = torch.tensor(float(value))
    if processes.is_main:
        entries = {**state.__dict__, "history": state.history.to_dict()}
        write_tensors(path, tensors, {"state": json.dumps(entries)})
    processes.wait()


def save_weights(path: Path, model: nn.Module, processes: Processes) -> None:
    """Write the weights alone; all processes call it, the first one writes.

    Raises:
        OSError: as save_checkpoint.
    """
    weights = whole_weights(model)
    if processes.is_main:
        write_tensors(path, weights, {"format": "pt"})
    processes.wait()


def load_weights(path: Path, model: nn.Module) -> None:
    """Put what save_weights wrote into the model."""
    set_model_state_dict(model, dict[str, Any](read_tensors(path)), options=_FROM_WHOLE)


def load_average(paths: Sequence[Path], model: nn.Module) -> None:
    """Put the mean of what save_weights wrote into several files into the model.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or damaged.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in paths:
        for name, tensor in read_tensors(path).items():
            dtypes[name] = tensor.dtype
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    mean: dict[str, Any] = {n: (t / len(paths)).to(dtypes[n]) for n, t in total.items()}
    set_model_state_dict(model, mean, options=_FROM_WHOLE)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All weights by name, on the CPU, in the first process; nothing in the others.

    All processes call it.
    """
    return dict(get_model_state_dict(model, options=_WHOLE))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: as the system says it (`safetensors` has an error of its own for a full disk).
    """
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"not written: {error}", str(path)) from error


def read_state(path: Path) -> TrainingState:
    """The TrainingState of a checkpoint.

    Raises:
        ValueError: the file is damaged, or no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = json.loads((file.metadata() or {})["state"])
        settings = entries["run"].get("settings", {})
        for name, value in json.loads(json.dumps(asdict(LoopSettings()))).items():
            settings.setdefault(name, value)  # of a run from before there was a choice
        return TrainingState(**{**entries, "history": History.from_dict(entries["history"])})
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not a training checkpoint ({error})") from error


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    run: dict[str, Any],
) -> TrainingState:
    """Put model and optimizer into the state of a checkpoint of the same run.

    Raises:
        ValueError: damaged, or the checkpoint of another run.
    """
    state = read_state(path)
    run = json.loads(json.dumps(run))  # tuples become lists, as in the file
    different = sorted(key for key in run if run[key] != state.run.get(key))
    if different:
        raise ValueError(f"{path} is the checkpoint of another run: other {', '.join(different)}")
    tensors = read_tensors(path)
    try:
        _restore(model, optimizer, tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: does not fit the model ({error})") from error
    scale = {k.removeprefix("scaler."): v for k, v in tensors.items() if k.startswith("scaler.")}
    if scale:
        scaler.load_state_dict(
            {
                k: int(v) if k.endswith(("interval", "tracker")) else float(v)
                for k, v in scale.items()
            }
        )
    return state


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    weights: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            weights[name] = tensor
        elif kind == "optimizer":
            moment, _, name = name.partition(".")
            moments.setdefault(name, {})[moment] = tensor
    set_model_state_dict(model, weights, options=_FROM_WHOLE)
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(
        model, optimizer, {"state": moments, "param_groups": groups}, options=_FROM_WHOLE
    )


def save_model(model: PretrainedModel | Transformer, folder: Path, processes: Processes) -> None:
    """save_pretrained by the first process; all call it, each may hold a part of the weights."""
    if processes.count > 1:
        weights = whole_weights(model)
        if processes.is_main:
            # FSDP2 gives a sharded model a class of its own, derived from the model's
            own_class = next(c for c in type(model).__mro__ if c.__module__.startswith("bertkern."))
            with torch.device("meta"):
                whole = own_class(model.config)
            whole.load_state_dict(weights, assign=True)
            whole.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    processes.wait()
