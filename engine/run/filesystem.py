"""What a file system must give to hold a store, tried at the start: what is missing else shows as work lost later."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..artifact.attempts import discard, new_attempt
from ..artifact.storage import fsync_folder
from ..errors import StorageError, UsageError

_MOUNTS = Path("/proc/self/mountinfo")


def check_filesystem(store_root: Path) -> None:
    """Try in a folder of its own under ``store_root`` what commits, runs and ledgers rely on; takes milliseconds.

    That is: a folder is renamed whole and never onto one that holds something, a hard link is made once, two appenders
    lose nothing of each other's, and fsync works. What other machines see of it cannot be tried from here;
    docs/engine.md says what they must. Raises UsageError naming the property, the path and the kind of file system.
    """
    try:
        folder = new_attempt(store_root, "filesystem")
        try:
            _try_all(folder, store_root)
        finally:
            discard(folder)
    except StorageError as error:
        raise UsageError(f"output {store_root} cannot hold a store: {error}") from error


def _try_all(folder: Path, store_root: Path) -> None:
    for property_, holds in _PROPERTIES.items():
        cause = None
        try:
            if holds(folder):
                continue
        except OSError as error:
            cause = error
        reason = (cause.strerror or str(cause)) if cause else "it does not"
        raise UsageError(
            f"output {store_root} is on {describe(store_root)}, which a store cannot use: {property_} ({reason}): "
            "choose another --output, or mount it otherwise (docs/engine.md, What a file system must give)"
        ) from cause


def _renames_folders(folder: Path) -> bool:
    ours, taken, free = folder / "ours", folder / "taken", folder / "free"
    for made in (ours, taken):
        made.mkdir()
        (made / "file").write_bytes(made.name.encode())
    try:
        os.rename(ours, taken)
    except OSError:
        os.rename(ours, free)
        return not ours.exists() and (free / "file").read_bytes() == b"ours" and (taken / "file").exists()
    return False


def _links_once(folder: Path) -> bool:
    name, link = folder / "linked", folder / "link"
    name.write_bytes(b"content")
    os.link(name, link)
    try:
        os.link(name, link)
    except FileExistsError:
        return link.read_bytes() == b"content"
    return False


def _appends(folder: Path) -> bool:
    file = folder / "appended"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    one, two = os.open(file, flags, 0o644), os.open(file, flags, 0o644)
    try:
        for descriptor, text in ((one, b"1\n"), (two, b"22\n"), (one, b"333\n")):
            os.write(descriptor, text)
    finally:
        os.close(one)
        os.close(two)
    return file.read_bytes() == b"1\n22\n333\n"


def _syncs(folder: Path) -> bool:
    with (folder / "synced").open("wb") as file:
        file.write(b"content")
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)
    return True


_PROPERTIES: dict[str, Callable[[Path], bool]] = {
    "renaming a folder must move it whole and fail where the new name holds something": _renames_folders,
    "a hard link must be made, and fail where the name is taken": _links_once,
    "what is opened with O_APPEND must be written at the end": _appends,
    "fsync must bring files to the disk": _syncs,
}


def describe(path: Path) -> str:
    """Return the kind of file system that holds ``path`` and where it is mounted, such as ``nfs4 (srv:/x on /mnt)``."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "a file system of a kind that is not known here"
    return _describe(lines, path.resolve())


def _describe(lines: list[str], path: Path) -> str:
    """Find the mount of ``path`` in the lines of mountinfo: the deepest, and of several on one another the last."""
    best: tuple[int, str] = (0, "a file system of a kind that is not known here")
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, about = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(about) < 2:
            continue
        mount = Path(_unescaped(fields[4]))
        if path.is_relative_to(mount) and len(mount.parts) >= best[0]:
            best = (len(mount.parts), f"{about[0]} ({_unescaped(about[1])} on {mount})")
    return best[1]


def _unescaped(text: str) -> str:
    r"""Undo mountinfo's octal escapes: ``\040`` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
