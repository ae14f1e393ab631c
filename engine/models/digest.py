"""Digest of an input file: a tree of sha256, so that the threads that read can also hash."""

from __future__ import annotations

from pathlib import Path

from .reading import CHUNK_BYTES, digest_files

__all__ = ["CHUNK_BYTES", "tree_digest"]


def tree_digest(path: Path) -> str:
    """Return the sha256 (hex) over the concatenated sha256 of each 16 MiB chunk of ``path``.

    An empty file has no chunk, so its digest is the sha256 of nothing. Raises CheckpointError where it cannot be read.
    """
    return digest_files([path], threads=1)[0].digest
