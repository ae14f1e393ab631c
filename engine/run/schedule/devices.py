"""Which devices a run computes on: one slot, hence one worker, for each."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UsageError

_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
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
    """Return the number of CUDA (or ROCm) devices; torch is imported only where a driver is there."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not any(Path(node).exists() for node in _NODES):
        return 0
    import torch  # noqa: PLC0415 - the scheduler stays light where there is no driver

    return torch.cuda.device_count()
