"""Memory that a worker reads into, kept from one model to the next: new pages cost as much time as hashing them."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref

_ROUND = 2 * 2**20
"""Blocks are multiples of this, so that the models of a registry can use one another's."""
_WASTE = 2
"""A block serves what needs at least this part of it."""


class PagePool:
    """Gives page-aligned memory, and keeps what comes back as long as all of it together stays within ``limit_bytes``.

    Memory comes back once no view of it is left, slices and tensors included; nobody gives it back by hand.
    """

    def __init__(self, limit_bytes: int) -> None:
        """``limit_bytes`` bounds what is kept, not what is given: that is the caller's."""
        self._limit = limit_bytes
        # Re-entrant, as memory may be collected, and so come back, in the middle of what is done under it.
        self._lock = threading.RLock()
        self._free: list[mmap.mmap] = []
        self._given = 0

    @property
    def bytes_kept(self) -> int:
        """Bytes that wait for their next use."""
        return sum(len(block) for block in self._free)

    def __call__(self, size: int) -> memoryview:
        """Return ``size`` (1 or more) writable bytes of any content; raises OSError where there is no memory."""
        with self._lock:
            block = self._kept(size) or self._new(size)
            self._given += len(block)
            # A view, a slice of it and a tensor over it all refer to the array, so its end is the end of all of them.
            array = (ctypes.c_ubyte * len(block)).from_buffer(block)
            weakref.finalize(array, self._back, block).atexit = False
            return memoryview(array).cast("B")[:size]

    def clear(self) -> None:
        """Keep nothing from here on; memory that is in use goes to the system when it comes back."""
        with self._lock:
            self._limit = 0
            self._free.clear()

    def _kept(self, size: int) -> mmap.mmap | None:
        """Take the smallest block that holds ``size``, unless most of it would lie idle."""
        fitting = [block for block in self._free if size <= len(block) <= max(_ROUND, size * _WASTE)]
        if not fitting:
            return None
        block = min(fitting, key=len)
        self._free.remove(block)
        return block

    def _new(self, size: int) -> mmap.mmap:
        length = -(-size // _ROUND) * _ROUND
        while self._free and self._given + self.bytes_kept + length > self._limit:
            self._free.pop(0)
        try:
            return _pages(length)
        except OSError:
            self._free.clear()
            return _pages(length)

    def _back(self, block: mmap.mmap) -> None:
        with self._lock:
            self._given -= len(block)
            if self._given + self.bytes_kept + len(block) <= self._limit:
                self._free.append(block)


def _pages(length: int) -> mmap.mmap:
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
