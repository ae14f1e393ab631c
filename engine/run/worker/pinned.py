"""Page-locked memory for what goes to a GPU: copies from it run at the bus's speed and beside the computing."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable


def allocator(device: str) -> Callable[[int], memoryview] | None:
    """Return what gives the memory that inputs are read into on the way to ``device``; None: whatever is at hand.

    Until torch has computed on the GPU ordinary memory is given: a run that reuses everything needs neither.
    """
    return _pinned if device.startswith("cuda") else None


def _pinned(size: int) -> memoryview:
    torch = sys.modules.get("torch")
    if torch is None or size == 0 or not torch.cuda.is_initialized():
        return _ordinary(size)
    try:
        # the allocator keeps freed blocks, so locking pages is paid once and not for every checkpoint
        return memoryview(torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy())
    except RuntimeError:  # a limit on locked memory (ulimit -l, a container's), or none left to lock
        return _ordinary(size)


def _ordinary(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:size]
