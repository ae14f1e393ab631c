"""Named points at which a test makes this process fail, so that what a crash leaves can be tried and not only argued.

``DFMPC_FAULT`` holds ``POINT=KIND`` or ``POINT=KIND@FILE``, several separated by ``;``. With ``@FILE`` the fault happens
once: whoever creates FILE has it. Nothing happens where the variable is not set.
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
]
Kind = Literal["kill", "raise", "oom", "hang", "enospc"]
POINTS: tuple[Point, ...] = get_args(Point)
KINDS: tuple[Kind, ...] = get_args(Kind)
VARIABLE = "DFMPC_FAULT"


def reach(point: Point) -> None:
    """Fail here if ``DFMPC_FAULT`` asks for it."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    for entry in wanted.split(";"):
        name, _, how = entry.partition("=")
        kind, _, file = how.partition("@")
        if name == point and (not file or _first(file)):
            _fail(kind, point)


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
