"""The file of labelled images as the cache of evaluations knows it: its state and its digest."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from ..errors import DataError
from ..models.digest import tree_digest


def stat_data(path: Path) -> os.stat_result:
    """Return the state of an image file; raises DataError where it cannot be read."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check evaluate.data") from error


def data_digest(path: Path) -> str:
    """Return the file's tree digest, computed once a process for all tasks until the file is another or has changed.

    Raises DataError where it cannot be read.
    """
    state = stat_data(path)
    return _digest(path, state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=8)
def _digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    return tree_digest(path)
