"""The whole state of a training run in one safetensors file, from which it goes on bit for bit.

model.<name>                                          weights
optimizer.exp_avg.<name>, optimizer.exp_avg_sq.<name> moments of AdamW
rng.cpu, rng.cuda                                     states of torch's generators
metadata "state"                                      TrainingState, as JSON
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bertkern.data.files import replacing
from bertkern.models.checkpoint import read_tensors

from .history import History

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        run: what the run is a function of (settings, config, data), to recognise it.
        history: what was measured so far.
        step: updates done.
        epoch, batch: the next batch of the data.
    """

    run: dict[str, Any]
    history: History
    step: int = 0
    epoch: int = 0
    batch: int = 0


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> None:
    """Write the state of model, optimizer and random generators."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS if parameter in optimizer.state else ():
            value = optimizer.state[parameter][moment]
            tensors[f"optimizer.{moment}.{name}"] = value.cpu().contiguous()
        if parameter.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(parameter.device)
    entries = {**state.__dict__, "history": state.history.to_dict()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(entries)})


def read_state(path: Path) -> TrainingState:
    """The TrainingState of a checkpoint.

    Raises:
        ValueError: the file is damaged, or no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = json.loads((file.metadata() or {})["state"])
        return TrainingState(**{**entries, "history": History.from_dict(entries["history"])})
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not a training checkpoint ({error})") from error


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> TrainingState:
    """Put model, optimizer and random generators into the state of a checkpoint of the same run.

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
        _restore(model, optimizer, tensors, state.step)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: does not fit the model ({error})") from error
    return state


@torch.no_grad()
def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], step: int
) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
        if f"optimizer.{_MOMENTS[0]}.{name}" in tensors:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{m: tensors[f"optimizer.{m}.{name}"].to(parameter.device) for m in _MOMENTS},
            }
        if parameter.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], parameter.device)
    torch.set_rng_state(tensors["rng.cpu"])
