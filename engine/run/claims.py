"""Which run comes to be when many processes start one at the same moment: the one that a hard link names.

The run that follows another is called what ``runs/.claims/<digest16>-after-<that run>`` says. The file appears by one
exclusive hard link, so exactly one process chooses the name. Everybody then renames a complete folder of its own to it:
the first rename makes the run, each later one fails on a folder that is there. So it does not matter who dies where.
There is no waiting, no lock and no clock. ``<claim>.made`` remembers that the folder was there once, so that a run that
somebody removed is not made again under its old name.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..artifact.attempts import discard, new_attempt
from ..artifact.storage import fsync_folder, storing, write_durably
from ..errors import StorageError, UsageError
from ..faults import reach
from .store import FrozenRun, RunFolder, Store, digest_of

FIRST = "none"
"""Stands for the run before the first one."""
_RUN_ID = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}")
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT}
"""What a rename says where the run is there; ENOENT, where NFS has renamed, lost the answer and asked again."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class StartedRun:
    """A run, and whether this process made its folder."""

    run: RunFolder
    made: bool


def start_run(store: Store, frozen: FrozenRun, after: str = FIRST) -> StartedRun:
    """Make the run of ``frozen`` that follows the run ``after``, or join it where another process was faster.

    The folder appears complete or not at all. Raises UsageError where the file system has no hard links, StorageError
    where it cannot be written.
    """
    draft = new_attempt(store.root, frozen.digest)
    try:
        _fill(draft, store, frozen)
        passed = set()
        while after not in passed:  # as many names as there are: runs of a week may have been collected since
            passed.add(after)
            started = _claim_and_make(store, frozen, draft, after)
            if isinstance(started, StartedRun):
                return started
            after = started
    finally:
        discard(draft)
    raise StorageError(f"{store.claims}: the names lead back to {after}: remove this folder")


def _fill(draft: Path, store: Store, frozen: FrozenRun) -> None:
    """Make ``draft``, among the attempts where it is swept if this process dies, a complete run's folder."""
    with storing(store.runs):
        (draft / "ledger").mkdir()
        write_durably(draft / "tasks.json", (frozen.model_dump_json(indent=1) + "\n").encode())
        fsync_folder(draft)
        store.claims.mkdir(parents=True, exist_ok=True)


def _claim_and_make(store: Store, frozen: FrozenRun, draft: Path, after: str) -> StartedRun | str:
    """Return the run that follows ``after``, or its name where it was removed or cannot be read."""
    claim = store.claims / f"{frozen.digest[:16]}-after-{after}"
    with storing(claim):
        run = RunFolder(store.runs / _claimed(claim, frozen, draft))
        reach("after-claim")
        seen = _mark(claim)
        # Listing asks a network file system anew; a lookup by name may be answered from what was not there before.
        there = run.run_id in os.listdir(store.runs)
        if not there and not seen.exists() and _make(draft, run):
            seen.touch()
            return StartedRun(run, made=True)
        if digest_of(run) == frozen.digest:
            seen.touch()
            return StartedRun(run, made=False)
    return run.run_id


def _mark(claim: Path) -> Path:
    return claim.with_name(claim.name + ".made")


def _claimed(claim: Path, frozen: FrozenRun, draft: Path) -> str:
    """Return the run's name that ``claim`` holds, which is ours where nobody had claimed before."""
    if not claim.exists():
        _claim(claim, frozen, draft)
    name = claim.read_text(encoding="ascii", errors="replace")
    if not _RUN_ID.fullmatch(name):
        raise StorageError(f"{claim} names no run but {name[:40]!r}: remove this file")
    return name


def _claim(claim: Path, frozen: FrozenRun, draft: Path) -> None:
    """Make ``claim`` with a new name in it, where nobody does so first."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    note = draft / "claim"
    write_durably(note, f"{stamp}-{frozen.digest[:8]}".encode())
    try:
        os.link(note, claim)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise UsageError(
            f"{claim.parent} is on a file system without hard links ({error.strerror}), by which commands agree on one "
            "run: choose another --output"
        ) from error
    finally:
        note.unlink()


def _make(draft: Path, run: RunFolder) -> bool:
    """Rename the draft to the run's folder; False where that is there already."""
    try:
        os.rename(draft, run.path)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    fsync_folder(run.path.parent)
    return True
