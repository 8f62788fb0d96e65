"""The machine that is measured: its name, the versions on it, and the memory that a call adds."""

import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Whose versions a result file names, where they are installed.
PACKAGES = (
    *("triton", "numpy", "transformers", "tokenizers", "sentence-transformers"),
    *("onnxruntime", "openvino", "ctranslate2", "flash-attn", "flash-attn-3", "xformers"),
    *("liger-kernel", "transformer-engine"),
)


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date: the same for every row of a run."""
    import bertkern

    facts: dict[str, Any] = {
        "device": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "bertkern": bertkern.__version__,
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = driver.splitlines()[0] if driver else "unknown"
    else:
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def added_bytes(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What the call returns, and the most memory that it held beyond what was held before.

    On a GPU torch's allocator counts; on a CPU the kernel's high-water mark of the resident set,
    which Linux lets a process reset, and which counts what a peer allocates itself. None where
    neither is there.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if not _reset_resident_peak():
        return call(), None
    resident = _status("VmRSS")
    result = call()
    return result, max(0, _status("VmHWM") - resident)


def _reset_resident_peak() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library kept would be reused
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _commit() -> str:
    given = os.environ.get("BERTKERN_COMMIT")  # of a build that stands elsewhere, as make gpu's
    if given:
        return given
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    top = _output("git", "rev-parse", "--show-toplevel")  # of another project, when installed in it
    if not commit or Path(top).resolve() != ROOT:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit + "+changes" if changed else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def file_name(prefix: str, facts: dict[str, Any]) -> str:
    """ops-nvidia-h200-20260102-030405.jsonl."""
    machine = "".join(c if c.isalnum() else "-" for c in str(facts["device"]).lower())
    machine = "-".join(part for part in machine.split("-") if part)
    stamp = "".join(c for c in facts["date"][:19] if c.isdigit() or c == "T").replace("T", "-")
    return f"{prefix}-{machine}-{stamp}.jsonl"


_START = time.monotonic()


def progress(text: str) -> None:
    """One line on stderr, so that stdout stays the result, with the seconds since the start."""
    print(f"{time.monotonic() - _START:5.0f} s  {text}", file=sys.stderr, flush=True)
