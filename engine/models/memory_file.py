"""Bytes in memory as a file to read, for readers that want one; nothing is copied beforehand."""

from __future__ import annotations

import io
from typing import IO, cast

_STEP = 4 * 2**20
"""Bytes of one copy: between two of them other threads of the process get their turn."""


def opened(data: memoryview) -> IO[bytes]:
    """Return ``data`` (of unsigned bytes) as a binary file at its beginning."""
    return cast("IO[bytes]", io.BufferedReader(_MemoryFile(data)))


class _MemoryFile(io.RawIOBase):
    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if at < 0:
            raise ValueError(f"seek to {at}: before the beginning")
        self._at = at
        return at

    def readinto(self, into: object, /) -> int:
        target = memoryview(cast("bytearray", into)).cast("B")
        count = max(0, min(len(target), len(self._data) - self._at, _STEP))
        target[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count
