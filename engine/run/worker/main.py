"""The worker process: it takes tasks from its line until the line closes."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from multiprocessing.connection import Connection

from ... import faults
from ...models.factory import AllowList
from ..failures import Failure, Mode
from ..ledger import Ledger
from ..messages import Alive, Ready, RunTask, WorkerSettings
from ..schedule.interrupts import SIGNALS
from ..shared import SharedModel
from ..store import RunFolder
from .attempt import Attempt, Context
from .caches import let_go
from .finisher import Finisher
from .heartbeat import Heartbeat
from .line import Inbox, Line
from .pinned import allocator
from .prefetch import Prefetcher

_PR_SET_PDEATHSIG = 1
ORPHANED = 70
"""Exit code of a worker whose scheduler is gone."""
_KEPT = 8
_LARGE = 64 * 2**20
"""Networks, or bytes of inputs still held, after which a worker lets go of what it keeps: that takes 30 ms."""
_LASTING = frozenset({None, Failure.DATA, Failure.BUG})
"""After these what is known of the model stays: another attempt would find the same."""


def main() -> None:
    """Serve the scheduler at the other end of the socket whose file descriptor is the first argument."""
    for number in SIGNALS:  # the scheduler decides what they mean, also where a cluster sends them to every process
        signal.signal(number, signal.SIG_IGN)
    line = int(sys.argv[1])
    os.set_inheritable(line, False)
    connection = Connection(line)
    settings: WorkerSettings = connection.recv()
    _die_with(settings.parent)
    faults.enter("worker")
    faulthandler.enable()  # a crash in native code leaves its stack in the attempt's log
    Worker(settings, Line(connection)).serve()
    sys.exit(ORPHANED if os.getppid() != settings.parent else 0)


class Worker:
    """Does the tasks that its line brings, one after the other; reads the next model and commits the last meanwhile."""

    def __init__(self, settings: WorkerSettings, line: Line) -> None:
        self._settings, self._line = settings, line
        run = RunFolder(settings.run)
        ledger = Ledger(run)
        self._finisher = Finisher(run, ledger, line.send)
        self._context = Context(settings, ledger, line.send, self._finisher)
        self._prefetcher = Prefetcher(
            settings.readers, int(settings.read_ahead), allocate=allocator(settings.computes_on)
        )
        self._allow = AllowList.default(settings.allow_code)
        self._shared: SharedModel | None = None
        self._held: tuple[str, Mode] | None = None
        self._kept = 0
        self._computing = False

    def serve(self) -> None:
        """Return when the line is closed, or after an error that sticks to the process."""
        self._line.send(Ready())  # before a task arrives: what kills this process from there on is the task's
        Heartbeat(lambda: self._line.send(Alive()), lambda: self._prefetcher.bytes_read, lambda: self._finisher.writes)
        inbox = Inbox(self._line, arrived=self._arrived)
        try:
            self._do_all(inbox)
        finally:  # a device that is broken may refuse anything in between; what was done is kept and told all the same
            self._finisher.close()
            self._prefetcher.close()

    def _do_all(self, inbox: Inbox) -> None:
        while (order := inbox.next()) is not None:
            failure = self._attempt(order)
            if failure is Failure.POISONED:
                return
            if failure not in _LASTING:
                self._forget()

    def _arrived(self, order: RunTask) -> None:
        """Read ahead for a task of another model than the one at work. Called in the inbox's thread."""
        if self._held is None or self._held[0] != order.task.model.name:
            self._prefetcher.want(order.task.model)

    def _attempt(self, order: RunTask) -> Failure | None:
        wanted = (order.task.model.name, order.mode)
        if self._shared is None or self._held != wanted:
            self._forget()
            self._held, self._shared = wanted, self._share(order)
        failure = Attempt(order.task, order.mode, self._context, self._shared).run()
        if failure is None:
            self._announce_device()
        return failure

    def _share(self, order: RunTask) -> SharedModel:
        device = order.mode.device(self._settings.computes_on)
        return SharedModel(order.task.model, self._allow, device, self._settings.threads, read=self._prefetcher.take)

    def _forget(self) -> None:
        self._shared, self._held = None, None
        torch = sys.modules.get("torch")
        if torch is None:
            return
        self._kept += 1
        if self._kept >= _KEPT or self._prefetcher.bytes_held >= _LARGE:
            self._kept = 0
            let_go()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _announce_device(self) -> None:
        """Say once, after the first task that a GPU has done, how much memory it has."""
        torch = sys.modules.get("torch")
        if self._computing or torch is None or not torch.cuda.is_initialized():
            return
        self._computing = True
        self._line.send(Ready(float(torch.cuda.mem_get_info()[1])))


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies (Linux); end now if it has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(ORPHANED)
