"""Attempt folders and their owners: made, discarded, and swept when the owner is dead. Needs no torch."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from .owner import UNKNOWN_S, Owner, draft_is_dead, read_owner
from .storage import storing, write_durably

ATTEMPTS = ".attempts"
_OWNER = ".owner.json"


def new_attempt(store_root: Path, key: str) -> Path:
    """Make and return the empty folder ``<store_root>/.attempts/<key12>-<uuid>``, with its owner's file beside it.

    Raises StorageError where the store cannot be written.
    """
    folder = store_root / ATTEMPTS / f"{key[:12]}-{uuid.uuid4().hex}"
    with storing(store_root):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_owner(folder)
            folder.mkdir()
        except OSError:
            owner_file(folder).unlink(missing_ok=True)
            raise
    return folder


def _write_owner(folder: Path) -> None:
    final = owner_file(folder)
    draft = final.with_suffix(".tmp")
    try:
        write_durably(draft, json.dumps(Owner.current().to_dict()).encode())
        os.replace(draft, final)
    finally:
        draft.unlink(missing_ok=True)


def owner_file(folder: Path) -> Path:
    """Return where the owner of the attempt ``folder`` is named."""
    return folder.with_name(folder.name + _OWNER)


def discard(attempt: Path) -> None:
    """Remove an attempt and its owner's file; what is gone already is no error. Raises StorageError."""
    with storing(attempt):
        remove(attempt)
        owner_file(attempt).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; what is gone already is no error."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # somebody else sweeps the same leftovers and is ahead of us


def sweep(store_root: Path) -> list[Path]:
    """Remove what dead owners left in ``.attempts``, and their half-written scores and reports; return the folders.

    An owner on this host is dead when its process is; anything else (another host, no owner) goes after 7 days
    without a change. Raises StorageError.
    """
    attempts = store_root / ATTEMPTS
    with storing(attempts):
        dead = abandoned(store_root)
        for path in dead:
            discard(path)
        for path in sorted(attempts.iterdir()) if attempts.is_dir() else ():
            if path.is_file():
                _sweep_lone_owner(path)
        for path in _drafts(store_root):
            gone = draft_is_dead(path)
            if _stale(path) if gone is None else gone:
                path.unlink(missing_ok=True)
    return dead


def _drafts(store_root: Path) -> Iterator[Path]:
    for folder in (store_root / "evaluations", *store_root.glob("runs/*/report")):
        for where, _, names in os.walk(folder):
            yield from (Path(where, name) for name in names if name.startswith(".") and name.endswith(".tmp"))


def abandoned(store_root: Path) -> list[Path]:
    """Return the folders that ``sweep`` would remove now."""
    attempts = store_root / ATTEMPTS
    found = sorted(attempts.iterdir()) if attempts.is_dir() else []
    return [path for path in found if path.is_dir() and _abandoned(path, owner_file(path))]


def _sweep_lone_owner(path: Path) -> None:
    """Remove an owner's file without a folder, unless its owner is about to make the folder."""
    if path.with_name(path.name.removesuffix(_OWNER)).is_dir():
        return
    if _abandoned(path, path):
        path.unlink(missing_ok=True)


def _abandoned(path: Path, named_in: Path) -> bool:
    owner = read_owner(named_in)
    dead = owner.is_dead() if owner is not None else None
    return _stale(path) if dead is None else dead


def _stale(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > UNKNOWN_S
    except FileNotFoundError:
        return False
