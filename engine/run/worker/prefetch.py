"""The worker's reader: the files of the next model come into memory while this one is worked on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

from ...job.sources import ModelSource
from ...models.locate import input_files
from ...models.reading import Allocate, FileBytes, ReadingStoppedError, read_files
from .pages import PagePool

_PATIENCE_S = 5.0
"""How long ``close`` waits for a file system that does not answer."""


class _Ahead:
    """A model that is read before it is needed."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.taken = False
        self.stop = threading.Event()
        self.ended = threading.Event()
        self.files: list[FileBytes] | None = None
        self.error: Exception | None = None


class Prefetcher:
    """Reads one model ahead, where its bytes and those still in use fit into ``limit_bytes`` together.

    Bytes are in use until nothing refers to them, a tensor over them included. What fails to be read fails the one who
    takes it, and nobody else.
    """

    def __init__(self, threads: int, limit_bytes: int, allocate: Allocate | None = None) -> None:
        """``threads`` read and hash; ``allocate`` gives the memory (None: pages that are used again and again)."""
        self.bytes_read = 0
        """All bytes ever read here: it grows while a file system answers."""
        self._threads, self._limit = threads, limit_bytes
        self._pages = PagePool(limit_bytes)
        self._allocate = allocate or self._pages
        # Re-entrant, as memory may be collected, and counted, in the middle of what is done under it.
        self._changed = threading.Condition(threading.RLock())
        self._held = 0
        self._ahead: _Ahead | None = None
        self._current: ModelSource | None = None
        self._running: list[_Ahead] = []
        # A thread that has read waits for the next model: to start one takes as long as to read a small file.
        self._idle = 0
        self._given: SimpleQueue[_Ahead | None] = SimpleQueue()
        self._closed = False

    @property
    def bytes_held(self) -> int:
        """Bytes in memory now: of models in use, read ahead, and being read."""
        return self._held

    @property
    def reads(self) -> int:
        """Models that are being read ahead, or wait for room."""
        return len(self._running)

    def want(self, source: ModelSource) -> None:
        """Begin to read ``source`` in the background, instead of what was wanted before; returns at once.

        It begins when there is room for it; without room until it is taken it is read then. Nothing happens where
        ``source`` is the one that was taken last, or is being read already.
        """
        with self._changed:
            if self._closed or source == self._current or (self._ahead and self._ahead.source == source):
                return
            self._cancel()
            self._ahead = _Ahead(source)
            self._running.append(self._ahead)
            self._given.put(self._ahead)
            if self._idle:
                self._idle -= 1
            else:  # the others are kept waiting by a file system
                threading.Thread(target=self._serve, name="prefetch", daemon=True).start()

    def keep_only(self, source: ModelSource | None) -> None:
        """Let go of what is read ahead unless it is ``source``: it will not be taken here."""
        with self._changed:
            if self._ahead is not None and self._ahead.source != source:
                self._cancel()

    def take(self, source: ModelSource) -> list[FileBytes]:
        """Return the files of ``source``: those read ahead, when they are there, or read now.

        Raises what finding and reading them raises; a later ``take`` tries again.
        """
        with self._changed:
            self._current = source
            ahead = self._ahead if self._ahead is not None and self._ahead.source == source else None
            if ahead is not None:
                ahead.taken, self._ahead = True, None
                self._changed.notify_all()
        if ahead is None:
            return self._read_now(source)
        ahead.ended.wait()
        if ahead.error is not None:
            raise ahead.error
        files, ahead.files = ahead.files, None  # the thread that read them may end a little later
        return self._read_now(source) if files is None else files

    def close(self) -> None:
        """End the reading ahead; nothing is wanted from here on."""
        with self._changed:
            self._closed = True
            self._cancel()
            running = list(self._running)
            self._given.put(None)
        self._pages.clear()
        for ahead in running:
            ahead.ended.wait(_PATIENCE_S)

    def _cancel(self) -> None:
        if self._ahead is not None:
            self._ahead.stop.set()
            self._ahead = None
            self._changed.notify_all()

    def _serve(self) -> None:
        """Read what is given until there is nothing to wait for; hold nothing of it meanwhile."""
        while (ahead := self._given.get()) is not None:
            stays = self._read_ahead(ahead)
            del ahead
            if not stays:
                return

    def _read_ahead(self, ahead: _Ahead) -> bool:
        """Read and tell; return whether this thread is to wait for more, as one is enough."""
        try:
            ahead.files = self._wait_and_read(ahead)
        except (MemoryError, ReadingStoppedError):
            pass  # whoever takes it may have more memory: it is read then
        except Exception as error:  # noqa: BLE001 - it belongs to whoever takes the files
            ahead.error = error
        finally:
            with self._changed:
                self._running.remove(ahead)
                stays = not (self._closed or self._idle)
                self._idle += stays
            ahead.ended.set()
        return stays

    def _wait_and_read(self, ahead: _Ahead) -> list[FileBytes] | None:
        paths = input_files(ahead.source)
        size = _bytes_of(paths)
        with self._changed:
            self._changed.wait_for(
                lambda: ahead.taken or ahead.stop.is_set() or self._held + size <= self._limit,
            )
            if ahead.taken or ahead.stop.is_set():
                return None
            self._held += size
        return self._read(paths, size, ahead.stop)

    def _read_now(self, source: ModelSource) -> list[FileBytes]:
        paths = input_files(source)
        size = _bytes_of(paths)
        with self._changed:
            if self._held + size > self._limit:
                self._cancel()  # what is needed now goes first
            self._held += size
        return self._read(paths, size, None)

    def _read(self, paths: Sequence[Path], reserved: int, stop: threading.Event | None) -> list[FileBytes]:
        """Read ``paths``, for which ``reserved`` bytes are counted already, and count them until they are let go."""
        try:
            files = read_files(paths, threads=self._threads, allocate=self._allocate, progress=self._count, stop=stop)
            for file in files:
                self._add(file.size)
                weakref.finalize(file.data, self._add, -file.size).atexit = False
        finally:
            self._add(-reserved)
        return files

    def _count(self, count: int) -> None:
        with self._changed:
            self.bytes_read += count

    def _add(self, count: int) -> None:
        with self._changed:
            self._held += count
            self._changed.notify_all()


def _bytes_of(paths: Sequence[Path]) -> int:
    """Return the sum of the sizes; what cannot be seen counts nothing, as reading it says what is wrong."""
    try:
        return sum(path.stat().st_size for path in paths)
    except OSError:
        return 0
