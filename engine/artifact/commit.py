"""The rename that turns an attempt into an artifact; safe beside any number of other committers."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

from ..errors import StorageError
from ..faults import reach
from .attempts import discard, new_attempt, owner_file, remove, sweep
from .manifest import MANIFEST, damage
from .storage import fsync_file, fsync_folder, storing

__all__ = ["commit", "discard", "new_attempt", "sweep"]

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_TRIES = 16


def commit(attempt: Path, target: Path) -> bool:
    """Bring the written ``attempt`` to the disk, the manifest last, and rename it to ``target``.

    Returns False where somebody else's artifact is there already.

    An existing artifact is checked (manifest, sizes and digests) and ours dropped; a broken one is moved into
    ``.attempts`` and replaced. Raises StorageError.
    """
    with storing(target):
        _bring_to_disk(attempt)
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            reach("before-rename")
            if _rename(attempt, target):
                reach("after-rename")
                _settle(attempt, target)
                return True
            if not damage(target):
                discard(attempt)
                return False
            _move_aside(target, attempt.parent)
    raise StorageError(f"{target}: something else keeps writing here; stop it or choose another --output")


def _bring_to_disk(attempt: Path) -> None:
    for file in sorted(attempt.iterdir(), key=lambda file: file.name == MANIFEST):
        fsync_file(file)
    fsync_folder(attempt)


def _rename(source: Path, target: Path) -> bool:
    """Rename a folder; False where the target exists."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        # NFS may rename, lose the answer, ask again and be told that there is nothing to rename
        if not (error.errno == errno.ENOENT and target.exists() and not source.exists()):
            raise
    return True


def _settle(attempt: Path, target: Path) -> None:
    fsync_folder(target.parent)
    fsync_folder(target.parent.parent)
    owner_file(attempt).unlink(missing_ok=True)


def _move_aside(target: Path, attempts: Path) -> None:
    """Move a broken artifact away; put it back if another committer had repaired it in between."""
    aside = attempts / f"{target.name}-broken-{uuid.uuid4().hex}"
    try:
        os.rename(target, aside)
    except FileNotFoundError:
        return
    if not damage(aside) and not _rename(aside, target):
        remove(aside)
