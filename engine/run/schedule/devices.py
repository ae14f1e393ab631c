"""Which devices a run computes on: one slot, hence one worker, for each."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...errors import UsageError
from .control_group import core_limit

_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_OTHERS = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_MIG = re.compile(r"UUID: (MIG-[\w/-]+)")
_NAME = re.compile(r"cpu|cuda(:\d+)?")


def device_slots(asked: str | Sequence[str]) -> list[str]:
    """Return the slots for ``asked``: auto, cpu, cuda, or names in a list or separated by commas.

    ``auto`` is every CUDA device, else one CPU slot; ``cuda`` is every CUDA device; a name may come twice
    (``cpu,cpu`` is two workers). UsageError for an unknown name or a device that is not there.
    """
    names = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else list(asked)
    if names == ["auto"]:
        return [f"cuda:{index}" for index in range(cuda_devices())] or ["cpu"]
    if not names:
        raise UsageError("devices: the list is empty; give auto, cpu, cuda or names such as cuda:0")
    return [slot for name in names for slot in _slots(name)]


def _slots(name: str) -> list[str]:
    if not _NAME.fullmatch(name):
        raise UsageError(f"devices: {name!r} is unknown; give auto, cpu, cuda or names such as cuda:0")
    if name == "cpu":
        return ["cpu"]
    count = cuda_devices()
    if count == 0:
        raise UsageError(
            f"devices: {name!r} was asked for, but there is no CUDA device here; use --devices cpu or auto"
        )
    if name == "cuda":
        return [f"cuda:{index}" for index in range(count)]
    if int(name.removeprefix("cuda:")) >= count:
        raise UsageError(f"devices: {name!r} was asked for, but there are only cuda:0 to cuda:{count - 1} here")
    return [name]


def cuda_devices() -> int:
    """Return the number of CUDA (or ROCm) devices, a MIG slice counting as one; torch comes only where a driver is."""
    if os.environ.get(_VISIBLE) == "" or not any(Path(node).exists() for node in _NODES):
        return 0
    slices = _mig_slices()
    if slices:
        return len(slices)
    import torch  # noqa: PLC0415 - the scheduler stays light where there is no driver

    return torch.cuda.device_count()


def visible_as(name: str) -> str | None:
    """Return what CUDA_VISIBLE_DEVICES must be for a worker that has ``name`` alone; None for a CPU.

    The numbers of ``cuda:N`` count what is visible here, so an entry of our own CUDA_VISIBLE_DEVICES, be it a number,
    a GPU's or a MIG slice's UUID, is handed on as it stands.
    """
    if not name.startswith("cuda:") or any(variable in os.environ for variable in _OTHERS):
        return None
    index = int(name.removeprefix("cuda:"))
    entries = _mig_slices() or [entry.strip() for entry in os.environ.get(_VISIBLE, "").split(",") if entry.strip()]
    return entries[index] if index < len(entries) else str(index)


def workers_on(devices: Sequence[str], asked: str | Sequence[str], per_device: int | None, threads: int) -> int:
    """Return how many workers each device gets: ``per_device``, or what the cores can feed where that is None.

    A GPU is shared by up to four, since a network is captured on the CPU. ``auto`` on a machine without GPU takes the
    cores that there are; CPU slots that were named are one worker each.
    """
    if per_device is not None:
        return per_device
    at_once = max(1, _cores() // threads)
    if devices[0].startswith("cuda"):
        return max(1, min(4, at_once // len(devices)))
    return at_once if asked == "auto" else 1


def _cores() -> int:
    """Return the whole cores that this process may use: those it may run on, within the quota of its control groups."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    quota = core_limit()
    return usable if quota is None else min(usable, int(quota))


def _mig_slices() -> list[str]:
    """Return the UUIDs of the MIG slices that are visible here: torch sees one of them at most in a process."""
    visible = os.environ.get(_VISIBLE)
    if visible is not None:
        entries = [entry.strip() for entry in visible.split(",")]
        return entries if all(entry.startswith("MIG-") for entry in entries) else []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _MIG.findall(listed.stdout)
