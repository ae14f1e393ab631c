"""Peak memory of this process, and on its device."""

from __future__ import annotations

import os
import re
import resource
import sys
from functools import cache
from typing import Any

_STATUS = "/proc/self/status"
_REFERENCES = "/proc/self/clear_refs"
_HIGH_WATER = re.compile(rb"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_STATUS_BYTES = 8192


def reset_peak(device: str = "cpu") -> None:
    """Let both peaks count from here, where the kernel can (Linux); otherwise the host's counts from the start."""
    torch = _torch_with_device(device)
    if torch is not None:
        torch.cuda.reset_peak_memory_stats(device)
    file = _opened(_REFERENCES, os.O_WRONLY, os.getpid())
    if file is not None:
        try:
            os.write(file, b"5")
        except OSError:
            return


def peak_bytes() -> int:
    """Return the largest resident set since ``reset_peak``, in bytes."""
    found = _HIGH_WATER.search(_status())
    if found:
        return int(found.group(1)) * 1024
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def peak_device_bytes(device: str) -> int | None:
    """Return the largest allocation on ``device`` since ``reset_peak``, in bytes; None where none was made."""
    torch = _torch_with_device(device)
    return None if torch is None else int(torch.cuda.max_memory_allocated(device))


def _status() -> bytes:
    file = _opened(_STATUS, os.O_RDONLY, os.getpid())
    try:
        return b"" if file is None else os.pread(file, _STATUS_BYTES, 0)
    except OSError:
        return b""


@cache
def _opened(path: str, flags: int, pid: int) -> int | None:  # noqa: ARG001 - a child's file is another one
    """Open a file of /proc once for the process ``pid``, as small tasks end faster than it opens; None without it."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return None


def _torch_with_device(device: str) -> Any:
    """Return torch where this process has it and has computed on ``device``, a CUDA one."""
    torch = sys.modules.get("torch") if device.startswith("cuda") else None
    return torch if torch is not None and torch.cuda.is_initialized() else None
