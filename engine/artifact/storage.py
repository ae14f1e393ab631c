"""Writing that survives a crash, and errors of the disk told in the user's terms."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StorageError
from .owner import draft_of

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another --output, then run again",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another --output, then run again",
    errno.EROFS: "the file system is read-only: remount it or choose another --output",
    errno.EACCES: "permission denied: make the folder writable or choose another --output",
    errno.EPERM: "permission denied: make the folder writable or choose another --output",
    errno.EFBIG: "the file is larger than allowed here: raise the limit (ulimit -f) or choose another --output",
}


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names ``folder``, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    code = errno.errorcode.get(error.errno or 0, "OSError")
    remedy = _REMEDIES.get(error.errno or 0, "check the disk or choose another --output")
    return f"cannot be written: {error.strerror or error} ({code}); {remedy}"


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and bring it to the disk; an existing one is an error."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` whole or not at all, through a file beside it, making folders as needed.

    Two writers of one path may race: one of them wins whole. Raises StorageError where the file system refuses.
    """
    with storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        write_durably(draft, content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; what is there at the end takes the place of ``path``.

    Where the block fails ``path`` stays as it was and nothing is left beside it. Raises StorageError for an OSError.
    """
    draft = draft_of(path)
    with storing(path.parent):
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def fsync_file(path: Path) -> None:
    """Bring a written file to the disk."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Bring a folder's entries to the disk, where the file system can."""
    try:
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        # some network file systems order entries themselves and refuse to sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
