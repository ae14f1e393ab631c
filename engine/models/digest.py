"""Digest of an input file: a tree of sha256, so that the threads that read can also hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import CheckpointError

CHUNK_BYTES = 16 * 2**20


def tree_digest(path: Path) -> str:
    """Return the sha256 (hex) over the concatenated sha256 of each 16 MiB chunk of ``path``.

    An empty file has no chunk, so its digest is the sha256 of nothing. Raises CheckpointError where it cannot be read.
    """
    tree = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    try:
        with path.open("rb") as file:
            while count := file.readinto(buffer):
                tree.update(hashlib.sha256(memoryview(buffer)[:count]).digest())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    return tree.hexdigest()
