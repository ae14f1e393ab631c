"""Peak memory of this process, and on its device."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def reset_peak(device: str = "cpu") -> None:
    """Let both peaks count from here, where the kernel can (Linux); otherwise the host's counts from the start."""
    torch = _torch_with_device(device)
    if torch is not None:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the largest resident set since ``reset_peak``, in bytes."""
    try:
        found = _HIGH_WATER.search(_STATUS.read_text(encoding="ascii"))
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def peak_device_bytes(device: str) -> int | None:
    """Return the largest allocation on ``device`` since ``reset_peak``, in bytes; None where none was made."""
    torch = _torch_with_device(device)
    return None if torch is None else int(torch.cuda.max_memory_allocated(device))


def _torch_with_device(device: str) -> Any:
    """Return torch where this process has it and has computed on ``device``, a CUDA one."""
    torch = sys.modules.get("torch") if device.startswith("cuda") else None
    return torch if torch is not None and torch.cuda.is_initialized() else None
