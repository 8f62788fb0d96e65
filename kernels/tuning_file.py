"""What `bertkern tune` measured on the user's GPU, tiles of the tuning table and backends of
attention: where it stores them and how they are read.

One JSON file for each GPU model and Triton version:

    {"bertkern": "0.1.0", "gpu": "NVIDIA ...", "triton": "3.7.1",
     "rows": {"attention/fwd/2/sm90/64": {"tile": [128, 128, 8, 3], ...},
              "attention_fwd/2/64": {"backend": "cuda", ...}, ...}}

It is written whole and then renamed, so a reader never sees half of one. A file that cannot be
read, or that another version of bertkern measured (its kernels were others), is warned about once
and ignored. With several models of GPU visible no file is used: a row is chosen before the device
is known.
"""

import functools
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton

from .._version import __version__


def folder() -> Path:
    """BERTKERN_CACHE, else bertkern in XDG_CACHE_HOME, else ~/.cache/bertkern."""
    if own := os.environ.get("BERTKERN_CACHE"):
        return Path(own).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "bertkern"


def path_of(gpu: str, triton_version: str = triton.__version__) -> Path:
    """The file of a GPU model, its name made fit for a file's."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-")
    return folder() / f"tuning-{name}-{triton_version}.json"


def gpu_name() -> str | None:
    """The model of the GPUs of this machine; None without one or with several models."""
    if not torch.cuda.is_available():
        return None
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return names.pop() if len(names) == 1 else None


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The stored rows by key; {} where there is no file, and with a warning where it is of no
    use."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows, measured_by = stored["rows"], stored["bertkern"]
        for row in rows.values():
            chosen(row)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is damaged and ignored ({type(error).__name__}: {error}): `bertkern tune "
            "--clear` removes it",
            stacklevel=2,
        )
        return {}
    if measured_by != __version__:
        warnings.warn(
            f"{path} was measured with bertkern {measured_by}, this is {__version__}: ignored; "
            "`bertkern tune` measures again",
            stacklevel=2,
        )
        return {}
    return rows


def chosen(row: dict[str, Any]) -> Any:
    """What a row holds: the numbers of a tile, or the name of a backend."""
    return row["backend"] if "backend" in row else row["tile"]


def write(path: Path, gpu: str, rows: dict[str, dict[str, Any]]) -> None:
    """Store the rows in place of the file, in one step."""
    about = {"bertkern": __version__, "gpu": gpu, "triton": triton.__version__, "rows": rows}
    text = json.dumps(about, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.stem, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.replace(file.name, path)


@functools.cache
def rows_of_this_gpu() -> dict[str, Any]:
    """What each row holds that was measured on this machine's GPU, read once a process."""
    gpu = gpu_name()
    if gpu is None:
        return {}
    return {key: chosen(row) for key, row in read(path_of(gpu)).items()}
