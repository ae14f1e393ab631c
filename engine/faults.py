"""Named points at which a test makes this process fail, so that what a crash leaves can be tried and not only argued.

``DFMPC_FAULT`` holds ``POINT=KIND``, several separated by ``;``. ``POINT=KIND@FILE`` happens once: whoever creates FILE
has it. ``worker/POINT=KIND`` happens in workers only, ``scheduler/POINT=KIND`` everywhere else. Nothing happens where
the variable is not set.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Literal, get_args

Point = Literal[
    "after-read",
    "mid-pack",
    "before-manifest",
    "after-manifest",
    "before-rename",
    "after-rename",
    "mid-ledger-line",
    "after-claim",
]
Kind = Literal["kill", "raise", "oom", "hang", "enospc"]
POINTS: tuple[Point, ...] = get_args(Point)
KINDS: tuple[Kind, ...] = get_args(Kind)
VARIABLE = "DFMPC_FAULT"
_role = "scheduler"


def enter(role: Literal["worker"]) -> None:
    """Say that this process is a worker."""
    global _role  # noqa: PLW0603 - a process is one or the other
    _role = role


def reach(point: Point) -> None:
    """Fail here if ``DFMPC_FAULT`` asks for it."""
    for kind, file in _wanted(point):
        if not file or _first(file):
            _fail(kind, point)


def armed(point: Point) -> bool:
    """Tell whether ``reach(point)`` may fail in this process."""
    return bool(_wanted(point))


def _wanted(point: Point) -> list[tuple[str, str]]:
    """Return kind and file of every fault that is asked for at ``point`` in a process of this role."""
    found, wanted = [], os.environ.get(VARIABLE)
    for entry in wanted.split(";") if wanted else ():
        where, _, how = entry.partition("=")
        role, _, name = where.rpartition("/")
        kind, _, file = how.partition("@")
        if name == point and role in ("", _role):
            found.append((kind, file))
    return found


def _first(file: str) -> bool:
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    return True


def _fail(kind: str, point: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise RuntimeError(f"fault at {point}")
    elif kind == "oom":
        raise MemoryError(f"fault at {point}")
    elif kind == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind == "hang":
        while True:
            time.sleep(3600)
    else:
        raise ValueError(f"{VARIABLE}: unknown kind {kind!r} at {point}; the kinds are {', '.join(KINDS)}")
