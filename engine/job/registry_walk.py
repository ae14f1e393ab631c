"""The folders of a registry that hold models: found without reading a file, each folder once, in bounds."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

SIDECAR = "dfmpc.yaml"
MAX_FOLDERS = 100_000
MAX_DEPTH = 32


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a sidecar or with programs. ``parts`` is its path below the registry."""

    parts: tuple[str, ...]
    sidecar: bool
    programs: tuple[str, ...] = ()
    """Names of its .pt2 files, in order."""
    problem: str = ""
    """Why it cannot be looked into."""


@dataclass(frozen=True)
class _Place:
    parts: tuple[str, ...]
    owned: bool
    """A folder above has a sidecar: programs here are that model's business."""


def walk(root: Path) -> list[ModelFolder]:
    """Return the folders of the tree ``root`` that hold models, by path.

    Hidden folders are left out. A link to a folder is followed where that folder lies nowhere else in the tree. Below a
    folder with a sidecar only sidecars count. A folder that cannot be listed comes back with its problem. Raises
    UsageError where ``root`` cannot be listed, and above ``MAX_FOLDERS`` folders or ``MAX_DEPTH`` levels.
    """
    seen: set[tuple[int, int]] = set()
    places, links = deque([_Place((), owned=False)]), deque[_Place]()
    found = []
    while places or links:
        place = places.popleft() if places else links.popleft()
        if not _is_new(root, place, seen):
            continue
        if len(seen) > MAX_FOLDERS or len(place.parts) > MAX_DEPTH:
            raise UsageError(
                f"registry {root}: more than {MAX_FOLDERS} folders or {MAX_DEPTH} levels: name a folder further down"
            )
        folder, below, linked = _look(root, place)
        found += [folder] if folder.sidecar or folder.programs or folder.problem else []
        places.extend(below)
        links.extend(linked)
    return sorted(found, key=lambda folder: folder.parts)


def _is_new(root: Path, place: _Place, seen: set[tuple[int, int]]) -> bool:
    try:
        status = root.joinpath(*place.parts).stat()
    except OSError:
        return not place.parts  # of the root it is told by listing it; a link to nowhere is none
    identity = (status.st_dev, status.st_ino)
    new = identity not in seen
    seen.add(identity)
    return new


def _look(root: Path, place: _Place) -> tuple[ModelFolder, list[_Place], list[_Place]]:
    """Return what a folder holds, the folders in it, and the links to folders in it."""
    path = root.joinpath(*place.parts)
    try:
        with os.scandir(path) as listing:
            entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda it: it.name)
            folders = {entry.name: entry.is_symlink() for entry in entries if entry.is_dir()}
    except OSError as error:
        if not place.parts:
            raise UsageError(f"registry {root} cannot be listed ({error.strerror}): give a folder of models") from error
        gone = isinstance(error, FileNotFoundError)
        return ModelFolder(place.parts, False, problem="" if gone else _unlisted(path, error)), [], []
    files = [entry.name for entry in entries if entry.name not in folders]
    sidecar = SIDECAR in files
    programs = () if place.owned and not sidecar else tuple(name for name in files if name.endswith(".pt2"))
    below = [(_Place((*place.parts, name), place.owned or sidecar), is_link) for name, is_link in folders.items()]
    return (
        ModelFolder(place.parts, sidecar, programs),
        [one for one, is_link in below if not is_link],
        [one for one, is_link in below if is_link],
    )


def _unlisted(path: Path, error: OSError) -> str:
    return f"{path} cannot be listed ({error.strerror}): make it readable, or move it out of the registry"


def names_of(folder: ModelFolder, root: Path) -> Iterator[tuple[str, str]]:
    """Yield the path name and the program's file of every model of a folder; one with a sidecar is one model."""
    if folder.sidecar or folder.problem:
        yield "__".join(folder.parts) or root.name, folder.programs[0] if len(folder.programs) == 1 else ""
        return
    for program in folder.programs:
        yield "__".join((*folder.parts, program.removesuffix(".pt2"))), program
