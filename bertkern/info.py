"""What is compiled, what is usable on this machine, and for each thing that is not, the reason."""

import os
import platform
from dataclasses import dataclass, field

import torch

from ._version import __version__
from .ops._backend import BACKENDS, native, triton_interpreted, unusable


@dataclass(frozen=True)
class BackendInfo:
    """One backend: the device types that it serves here, and why not the others."""

    name: str
    devices: list[str]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Info:
    """What `bertkern.info()` found; `str()` of it is the text that `bertkern info` prints."""

    versions: dict[str, str]
    devices: list[str]
    build: dict[str, str]
    backends: list[BackendInfo]
    forced: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ["versions"]
        lines += [f"  {name:<12} {version}" for name, version in self.versions.items()]
        lines += ["devices"] + [f"  {device}" for device in self.devices]
        lines += ["compiled extension"]
        lines += [f"  {name:<12} {value}" for name, value in self.build.items()]
        lines += ["backends"]
        for one in self.backends:
            served = "usable on " + ", ".join(one.devices) if one.devices else "not usable"
            lines.append(f"  {one.name:<12} {served}")
            lines += [f"  {'':<12} not on {device}: {why}" for device, why in one.reasons.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _versions() -> dict[str, str]:
    versions = {
        "bertkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        versions["triton"] = triton.__version__ + (" (interpreter)" if triton_interpreted() else "")
    except ImportError as error:
        versions["triton"] = f"absent ({error})"
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    return versions


def _devices() -> list[str]:
    devices = [f"cpu: {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
    elif torch.version.cuda is None:
        devices.append("no cuda: this torch is built without CUDA")
    else:
        devices.append(f"no cuda: torch {torch.__version__} finds no usable device or driver")
    return devices


def _build() -> dict[str, str]:
    extension, reason = native()
    if extension is None:
        return {"bertkern._C": f"absent: {reason}"}
    return {name: str(value) for name, value in extension.build_info().items()}


def info() -> Info:
    """Versions, devices, and for each backend whether it is compiled and usable, or why not.

    Returns:
        Info: print it, or read its fields.
    """
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    backends = []
    for name in BACKENDS:
        # A backend for another device type than those present is asked about its own.
        asked = {"cuda": ["cuda"], "cpu": ["cpu"], "triton": ["cuda", "cpu"]}.get(
            name, device_types
        )
        reasons = {device: unusable(name, device) for device in asked}
        if not torch.cuda.is_available():
            for device in asked:
                if device == "cuda" and reasons[device] is None:
                    reasons[device] = "torch finds no cuda device"
        backends.append(
            BackendInfo(
                name,
                [device for device, why in reasons.items() if why is None],
                {device: why for device, why in reasons.items() if why is not None},
            )
        )
    forced = os.environ.get("BERTKERN_BACKEND") or None
    notes = [f"BERTKERN_BACKEND={forced} forces this backend for every op"] if forced else []
    return Info(_versions(), _devices(), _build(), backends, forced, notes)
