"""Files that are there whole or not at all."""

from __future__ import annotations

import uuid
from pathlib import Path

from ..artifact.storage import storing, write_durably


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file beside it, making folders as needed.

    Two writers of one path may race: one of them wins whole. Raises StorageError where the file system refuses.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_durably(temporary, content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
