"""The log of one attempt: what the task printed and logged, native code included."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import StorageError


@contextmanager
def attempt_log(file: Path) -> Iterator[None]:
    """Send this process's stdout and stderr (file descriptors 1 and 2) to ``file``, appending, while entered.

    Only what computes has something to say; a task that is reused leaves no log. Entering it twice does no harm.

    Raises StorageError where the log cannot be opened.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"{file}: the log cannot be opened ({error.strerror}): free space") from error
    _flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        _flush()
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)


def append_traceback(file: Path, error: BaseException) -> None:
    """Append ``error`` with its traceback to the log ``file`` of an attempt; a full disk loses it silently."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8", errors="replace") as log:
            traceback.print_exception(error, file=log)
    except OSError:
        return


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            continue
