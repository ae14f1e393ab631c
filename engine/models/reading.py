"""Input files come into memory once: threads read chunks of them and hash what they have just read."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..faults import reach

CHUNK_BYTES = 16 * 2**20
"""What one thread reads and hashes; the leaves of the tree of digests."""
_SLICE_BYTES = 2**20
"""Of a chunk at a time, so that the hash finds it still in the processor's cache."""
_MOST_THREADS = 8

Allocate = Callable[[int], memoryview]
"""Gives writable memory of so many bytes, aligned to 64 bytes or more."""


@dataclass(frozen=True)
class FileDigest:
    """What a file held when it was read."""

    path: Path
    digest: str
    """The sha256 (hex) over the sha256 of each 16 MiB chunk; of an empty file the sha256 of nothing."""
    size: int
    """Bytes."""
    state: tuple[int, int]
    """Size and time of change (ns)."""


@dataclass(frozen=True, eq=False)
class FileBytes(FileDigest):
    """A file's content beside its digest: the bytes that were hashed are the bytes that are used."""

    data: memoryview
    """Of unsigned bytes, writable; the memory goes back once neither this nor a tensor over it is left."""


class ReadingStoppedError(Exception):
    """Reading ended because its caller asked for that."""


def default_threads() -> int:
    """Return how many threads read where nobody says: one for each processor this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_THREADS, usable)


def read_files(
    paths: Sequence[Path],
    *,
    threads: int | None = None,
    allocate: Allocate | None = None,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> list[FileBytes]:
    """Return the content and the digest of every file, in order, with each byte read once.

    ``allocate`` gives the memory (default: anonymous pages); ``progress`` is called with the bytes of every step, from
    several threads; ``stop`` ends the reading early. Raises CheckpointError where a file cannot be read (the OSError is
    its cause) or changes meanwhile, MemoryError where the memory cannot be had, ReadingStoppedError after ``stop``.
    """
    with _opened(paths) as files:
        for file in files:
            file.data = _memory(file.path, file.size, allocate or _pages)
        _Crew(files, progress, stop).read(threads or default_threads())
        found = [FileBytes(**vars(file.found()), data=file.data) for file in files if file.data is not None]
    reach("after-read")
    return found


def digest_files(paths: Sequence[Path], *, threads: int | None = None) -> list[FileDigest]:
    """Return the digest of every file, in order, without holding more than 1 MiB a thread. Raises CheckpointError."""
    with _opened(paths) as files:
        _Crew(files, None, None).read(threads or default_threads())
        return [file.found() for file in files]


class _OpenFile:
    """One file while it is read."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.state = self._state()
        self.size = self.state[0]
        self.digests = [b""] * -(-self.size // CHUNK_BYTES)
        self.data: memoryview | None = None

    def read_chunk(self, number: int, scratch: bytearray, step: Callable[[int], None]) -> None:
        """Read a chunk into ``data``, or through ``scratch`` where there is none, and keep its digest."""
        start = number * CHUNK_BYTES
        end = min(start + CHUNK_BYTES, self.size)
        self._advise(start, end - start)
        chunk = hashlib.sha256()
        for offset in range(start, end, _SLICE_BYTES):
            count = min(_SLICE_BYTES, end - offset)
            into = memoryview(scratch)[:count] if self.data is None else self.data[offset : offset + count]
            self._fill(into, offset)
            chunk.update(into)
            step(count)
        self.digests[number] = chunk.digest()

    def found(self) -> FileDigest:
        """Return what was read; raises CheckpointError where the file is not what it was at the beginning."""
        if self._state() != self.state:
            raise CheckpointError(f"{self.path}: was changed while it was read; run again when nobody writes to it")
        return FileDigest(self.path, hashlib.sha256(b"".join(self.digests)).hexdigest(), self.size, self.state)

    def _fill(self, into: memoryview, offset: int) -> None:
        """Read ``len(into)`` bytes from ``offset``, in as many calls as the file system wants."""
        done = 0
        while done < len(into):
            with _named(self.path):
                count = os.preadv(self._descriptor, [into[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ended at byte {offset + done} of {self.size}, so it was cut short while it was "
                    "read; run again when nobody writes to it"
                )
            done += count

    def _advise(self, start: int, count: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_WILLNEED)

    def _state(self) -> tuple[int, int]:
        with _named(self.path):
            found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{self.path}: cannot be read (it is not a regular file); check the path")
        return found.st_size, found.st_mtime_ns


class _Crew:
    """The threads over one queue of chunks; the caller's is one of them, and none is left when ``read`` ends."""

    def __init__(
        self, files: Sequence[_OpenFile], progress: Callable[[int], None] | None, stop: threading.Event | None
    ) -> None:
        self._queue = deque((file, number) for file in files for number in range(len(file.digests)))
        self._scratch_bytes = _SLICE_BYTES if any(file.data is None for file in files) else 0
        self._progress, self._stop = progress, stop
        self._failures: list[Exception] = []
        self._over = False

    def read(self, threads: int) -> None:
        """Read every chunk; raises the first thing that went wrong in any thread."""
        helpers = [
            threading.Thread(target=self._serve, name=f"reader-{number}", daemon=True)
            for number in range(1, min(threads, len(self._queue)))
        ]
        started = []
        try:
            for helper in helpers:
                helper.start()
                started.append(helper)
            self._serve()
        except BaseException:
            self._over = True
            raise
        finally:
            for helper in started:
                helper.join()
        if self._failures:
            raise self._failures[0]

    def _serve(self) -> None:
        scratch = bytearray(self._scratch_bytes)  # cleared under the interpreter's lock, as long as a small file takes
        try:
            while (work := self._next()) is not None:
                file, number = work
                file.read_chunk(number, scratch, self._step)
        except Exception as error:  # noqa: BLE001 - the thread that asked for the files raises it
            self._failures.append(error)

    def _next(self) -> tuple[_OpenFile, int] | None:
        try:
            return None if self._failures else self._queue.popleft()
        except IndexError:
            return None

    def _step(self, count: int) -> None:
        if self._progress is not None:
            self._progress(count)
        if self._over or self._failures or (self._stop is not None and self._stop.is_set()):
            raise ReadingStoppedError


@contextlib.contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[list[_OpenFile]]:
    with contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            with _named(path):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            if hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):  # advice only
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            files.append(_OpenFile(path, descriptor))
        yield files


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise an OSError as a CheckpointError that names ``path``."""
    try:
        yield
    except OSError as error:
        ours = isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError))
        remedy = "check the path and its permissions" if ours else "check the disk or the server that it lies on"
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def _memory(path: Path, size: int, allocate: Allocate) -> memoryview:
    if size == 0:
        return memoryview(bytearray())
    try:
        return allocate(size).cast("B")[:size]
    except (OSError, MemoryError, OverflowError) as error:
        raise MemoryError(f"{path}: no memory for its {size} bytes ({error})") from error


def _pages(size: int) -> memoryview:
    """Return anonymous private pages of this process."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
