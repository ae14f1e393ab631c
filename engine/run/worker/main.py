"""The worker process: it takes groups of tasks from its line until the line closes."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from multiprocessing.connection import Connection

from ..messages import RunGroup, Started, WorkerSettings

_PR_SET_PDEATHSIG = 1
ORPHANED = 70
"""Exit code of a worker whose scheduler is gone."""


def main() -> None:
    """Serve the scheduler at the other end of the socket whose file descriptor is the first argument."""
    line = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler decides what Ctrl-C means
    os.set_inheritable(line, False)
    connection = Connection(line)
    settings: WorkerSettings = connection.recv()
    _die_with(settings.parent)
    faulthandler.enable()  # a crash in native code leaves its stack in the attempt's log
    try:
        _serve(connection, settings)
    except (EOFError, ConnectionError):
        sys.exit(ORPHANED if os.getppid() != settings.parent else 0)


def _serve(connection: Connection, settings: WorkerSettings) -> None:
    import torch  # noqa: PLC0415 - after the process is tied to its parent: this takes seconds

    from ..ledger import Ledger  # noqa: PLC0415 - the same
    from ..store import RunFolder  # noqa: PLC0415 - the same
    from .group import GroupContext, run_group  # noqa: PLC0415 - the same

    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would bound every logit SQNR, and a CPU has 23

    def announce(started: Started) -> None:
        connection.send(started)

    context = GroupContext(settings, Ledger(RunFolder(settings.run)), announce)
    while True:
        group: RunGroup = connection.recv()
        for outcome in run_group(group.tasks, context):
            connection.send(outcome)
            if outcome.poisoned:
                return


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies (Linux); end now if it has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(ORPHANED)
