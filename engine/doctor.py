"""What ``dfmpc doctor`` looks at: versions, devices, Triton, free disk, the allow-list."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from . import __version__

_PACKAGES = ("torch", "triton", "pyarrow", "pydantic", "safetensors", "numpy")


@dataclass(frozen=True)
class Health:
    """What dfmpc would find here."""

    versions: dict[str, str]
    """By distribution; "not installed" where it is missing."""
    devices: list[str]
    """What ``devices: auto`` means here, with the accelerator's name and memory."""
    cpu_threads: int
    triton: str
    """Whether kernels run compiled, in the interpreter, or not at all (then the CPU references do the work)."""
    disk: str
    """Folder whose free disk is shown."""
    disk_free_bytes: int
    disk_writable: bool
    allow_list: list[str]

    def to_json(self) -> str:
        """Return the fields as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def to_text(self) -> str:
        """Return the fields as lines."""
        writable = "" if self.disk_writable else " (cannot be written)"
        lines = [f"{name:12} {version}" for name, version in self.versions.items()]
        lines += [f"{'device':12} {device}" for device in self.devices]
        lines += [
            f"{'CPU threads':12} {self.cpu_threads}",
            f"{'kernels':12} {self.triton}",
            f"{'free disk':12} {self.disk_free_bytes / 2**30:.1f} GiB in {self.disk}{writable}",
            f"{'allow-list':12} {', '.join(self.allow_list)}",
        ]
        return "\n".join(lines)


def examine(folder: Path, allow_code: Sequence[str] = ()) -> Health:
    """Look at this machine; ``folder`` need not exist, then its nearest existing parent is measured.

    Raises UsageError for a folder of ``allow_code`` or DFMPC_ALLOW_CODE that is not there.
    """
    from .models.factory import AllowList  # noqa: PLC0415 - keeps the import of this module light

    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    allowed = AllowList.default(tuple(allow_code))
    return Health(
        versions={
            "python": platform.python_version(),
            "dfmpc": __version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        devices=_devices(),
        cpu_threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        triton=_triton(),
        disk=str(place),
        disk_free_bytes=shutil.disk_usage(place).free,
        disk_writable=os.access(place, os.W_OK),
        allow_list=[*allowed.modules, *map(str, allowed.folders)],
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch  # noqa: PLC0415 - takes a second

    names = [(f"cuda:{index}", torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())]
    return [f"{name} {found.name}, {found.total_memory / 2**30:.0f} GiB" for name, found in names] or ["cpu"]


def _triton() -> str:
    import torch  # noqa: PLC0415
    from dfmpc.kernels._triton import available, interpreted  # noqa: PLC0415

    if not available():
        return "Triton is not installed; the torch references compute on the CPU"
    if interpreted():
        return "Triton's interpreter (TRITON_INTERPRET is set)"
    if torch.cuda.is_available():
        return "Triton on the CUDA devices, torch references on the CPU"
    return "no device for Triton; the torch references compute on the CPU"
