"""``<store>/latest/<model>/<plan>``: a small file that names the artifact to use, replaced whole by the next one."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ..errors import ArtifactError
from .storage import write_atomically

LATEST = "latest"
"""The folder of the pointers in a store."""
_ARTIFACT = re.compile(r"artifacts/[^/]+/[^/]+/[0-9a-f]{12}")


@dataclass(frozen=True)
class Latest:
    """What a pointer says."""

    key: str
    """Of the artifact, 64 hexadecimal digits."""
    artifact: str
    """Its folder, relative to the store."""
    run: str
    """The run that moved the pointer there."""
    finished_at: datetime
    """When that run's task ended, with its time zone."""

    def write(self, file: Path) -> None:
        """Put this pointer at ``file``, whole or not at all. Raises StorageError."""
        content = asdict(self) | {"finished_at": self.finished_at.isoformat()}
        write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())


def read_latest(file: Path) -> Latest:
    """Read a pointer; ArtifactError where ``file`` is none."""
    try:
        fields = json.loads(file.read_bytes())
        found = Latest(**{**fields, "finished_at": datetime.fromisoformat(fields["finished_at"])})
        whole = bool(_ARTIFACT.fullmatch(found.artifact)) and found.finished_at.tzinfo is not None
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ArtifactError(f"{file}: neither an artifact's folder nor a pointer STORE/{LATEST}/MODEL/PLAN to one")
    return found


def artifact_at(path: Path) -> Path:
    """Return the artifact's folder that ``path`` means: itself, or what a pointer of a store names.

    Raises ArtifactError where ``path`` is a file but no pointer, or lies in no store's folder of pointers.
    """
    if not path.is_file():
        return path
    found, place = read_latest(path), path.resolve()
    if place.parents[1].name != LATEST:
        raise ArtifactError(f"{path}: a pointer counts from its store: give it as STORE/{LATEST}/MODEL/PLAN")
    return place.parents[2] / found.artifact


def pointers(store: Path) -> list[Path]:
    """Return the pointers of a store, in order."""
    return sorted(file for file in (store / LATEST).glob("*/*") if file.is_file() and not file.name.startswith("."))
