"""Attempt folders and the rename that turns one into an artifact; safe beside any number of other committers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from pathlib import Path

from ..errors import StorageError
from .manifest import is_complete
from .owner import Owner, read_owner
from .storage import fsync_folder, storing, write_durably

ATTEMPTS = ".attempts"
_OWNER = ".owner.json"
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_STALE_SECONDS = 7 * 24 * 3600
_TRIES = 16


def new_attempt(store_root: Path, key: str) -> Path:
    """Make and return the empty folder ``<store_root>/.attempts/<key12>-<uuid>``, with its owner's file beside it.

    Raises StorageError where the store cannot be written.
    """
    folder = store_root / ATTEMPTS / f"{key[:12]}-{uuid.uuid4().hex}"
    with storing(store_root):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_owner(folder)
        folder.mkdir()
    return folder


def _write_owner(folder: Path) -> None:
    owner = _owner_file(folder)
    draft = owner.with_suffix(".tmp")
    write_durably(draft, json.dumps(Owner.current().to_dict()).encode())
    os.replace(draft, owner)


def _owner_file(folder: Path) -> Path:
    return folder.with_name(folder.name + _OWNER)


def discard(attempt: Path) -> None:
    """Remove an attempt and its owner's file; what is gone already is no error. Raises StorageError."""
    with storing(attempt):
        _remove(attempt)
        _owner_file(attempt).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # somebody else sweeps the same leftovers and is ahead of us


def commit(attempt: Path, target: Path) -> bool:
    """Rename the finished ``attempt`` to ``target``; return False where somebody else's artifact is there already.

    An existing artifact is checked (manifest and sizes) and ours dropped; a broken one is moved into ``.attempts``
    and replaced. Raises StorageError.
    """
    with storing(target):
        fsync_folder(attempt)
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            if _rename(attempt, target):
                _settle(attempt, target)
                return True
            if is_complete(target):
                discard(attempt)
                return False
            _move_aside(target, attempt.parent)
    raise StorageError(f"{target}: something else keeps writing here; stop it or choose another --output")


def _rename(source: Path, target: Path) -> bool:
    """Rename a folder; False where the target exists."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _settle(attempt: Path, target: Path) -> None:
    fsync_folder(target.parent)
    fsync_folder(target.parent.parent)
    _owner_file(attempt).unlink(missing_ok=True)


def _move_aside(target: Path, attempts: Path) -> None:
    """Move a broken artifact away; put it back if another committer had repaired it in between."""
    aside = attempts / f"{target.name}-broken-{uuid.uuid4().hex}"
    try:
        os.rename(target, aside)
    except FileNotFoundError:
        return
    if is_complete(aside) and not _rename(aside, target):
        _remove(aside)


def sweep(store_root: Path) -> list[Path]:
    """Remove what dead owners left in ``.attempts``; return the removed folders.

    An owner on this host is dead when its process is; anything else (another host, no owner) goes after 7 days
    without a change. Raises StorageError.
    """
    attempts = store_root / ATTEMPTS
    with storing(attempts):
        if not attempts.is_dir():
            return []
        found = sorted(attempts.iterdir())
        dead = [path for path in found if path.is_dir() and _abandoned(path, _owner_file(path))]
        for path in dead:
            discard(path)
        for path in found:
            if path.is_file():
                _sweep_lone_owner(path)
    return dead


def _sweep_lone_owner(path: Path) -> None:
    """Remove an owner's file without a folder, unless its owner is about to make the folder."""
    if path.with_name(path.name.removesuffix(_OWNER)).is_dir():
        return
    if _abandoned(path, path):
        path.unlink(missing_ok=True)


def _abandoned(path: Path, owner_file: Path) -> bool:
    owner = read_owner(owner_file)
    dead = owner.is_dead() if owner is not None else None
    return _stale(path) if dead is None else dead


def _stale(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return False
