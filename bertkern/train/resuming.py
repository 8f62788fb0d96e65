"""Whether a run may go on from the checkpoint that its folder holds, and whether there is anything
left to do.

A run is a function of its settings, sizes and data, which its checkpoint names: a run that goes on
must be the same. With several processes, each must see the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import read_state
from .processes import Processes

# of the command line, where it is not the entry's own name with hyphens
_OPTIONS = {
    "tokens_per_batch": "--batch-tokens",
    "warmup_fraction": "--warmup",
    "warmup_steps": "--warmup",
    "num_layers": "--layers",
    "num_hidden_layers": "--layers",
    "num_attention_heads": "--heads",
    "intermediate_size": "--ffn-size",
}
_ABSENT = "nothing"


def refuse_another_run(
    checkpoint: Path, now: Mapping[str, Any], meanings: Mapping[str, str] | None = None
) -> None:
    """Raise where a run is not the one that the checkpoint is of; what differs is named, no more.

    Args:
        checkpoint: the file.
        now: entries of what the run is a function of, as in TrainingState.run, or some of them.
        meanings: what to call entries whose values say nothing to people, such as digests.

    Raises:
        ValueError: an entry differs; or the file is damaged.
    """
    meanings = meanings or {}
    started = dict(_leaves(read_state(checkpoint).run))
    changed = []
    for name, value in _leaves(json.loads(json.dumps(now))):
        before = started.get(name, _ABSENT)
        if value != before:
            entry = name[-1]
            option = _OPTIONS.get(entry, "--" + entry.replace("_", "-"))
            what = f"{option} = {_shown(before)}, not {_shown(value)}"
            changed.append(meanings.get(entry, what))
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to a run with {'; '.join(changed)}: repeat that run's command, "
            "or begin another one (--out, --overwrite)"
        )


def _leaves(entries: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """(names from the outside to the inside, value) of every entry that holds no others."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def finished_step(checkpoint: Path, last_file: Path) -> int | None:
    """The step that a run ended with, or None where it has not written its last file yet.

    Args:
        checkpoint: of the run.
        last_file: what it writes when all else is written, and removes when it begins.
    """
    return read_state(checkpoint).step if last_file.is_file() else None


def seen_by_all(path: Path, processes: Processes) -> None:
    """Be sure that all processes see a file; all call it.

    Raises:
        FileNotFoundError: in all processes, where some see it and others do not. One process, or
            all, that miss it are the caller's to judge.
    """
    seen = processes.gather([path.is_file()])
    missing = [str(index) for index, sees in enumerate(seen) if not sees]
    if missing and len(missing) < processes.count:
        raise FileNotFoundError(
            f"{path}: process {', '.join(missing)} of {processes.count} does not see this file, "
            "which others do: all machines of a run must share its folder"
        )
