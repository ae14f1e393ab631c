"""The worker process: it takes tasks from its line until the line closes."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from multiprocessing.connection import Connection

from ... import faults
from ...job.sources import ModelSource
from ...models.reading import FileBytes
from ..failures import Failure
from ..ledger import Ledger
from ..messages import Alive, Message, Ready, RunTask, Started, WorkerSettings
from ..schedule.interrupts import SIGNALS
from ..store import RunFolder
from .attempt import Attempt, Context
from .finisher import Finisher
from .heartbeat import Heartbeat
from .held import HeldModel
from .line import Inbox, Line
from .pinned import allocator
from .prefetch import Prefetcher

_PR_SET_PDEATHSIG = 1
ORPHANED = 70
"""Exit code of a worker whose scheduler is gone."""
_ENOUGH = 8
"""With so many tasks waiting the scheduler is not told of each beginning: it need not hand out the next one yet."""


def main() -> None:
    """Serve the scheduler at the other end of the socket whose file descriptor is the first argument."""
    for number in SIGNALS:  # the scheduler decides what they mean, also where a cluster sends them to every process
        signal.signal(number, signal.SIG_IGN)
    line = int(sys.argv[1])
    os.set_inheritable(line, False)
    connection = Connection(line)
    settings: WorkerSettings
    try:
        (settings,) = connection.recv()
    except EOFError:  # the scheduler is gone, or needed fewer workers than it started processes for
        sys.exit(ORPHANED)
    _die_with(settings.parent)
    faults.enter("worker")
    faulthandler.enable()  # a crash in native code leaves its stack in the attempt's log
    Worker(settings, Line(connection)).serve()
    sys.exit(ORPHANED if os.getppid() != settings.parent else 0)


class Worker:
    """Does the tasks that its line brings, one after the other; reads the next model and commits the last meanwhile."""

    def __init__(self, settings: WorkerSettings, line: Line) -> None:
        self._line = line
        run = RunFolder(settings.run)
        ledger = Ledger(run)
        self._finisher = Finisher(run, ledger, line.send, more=lambda: bool(self._inbox))
        self._context = Context(settings, ledger, self._say, self._finisher)
        self._prefetcher = Prefetcher(
            settings.readers, int(settings.read_ahead), allocate=allocator(settings.computes_on)
        )
        self._model = HeldModel(settings, self._prefetcher, read=self._take)
        self._inbox: Inbox | None = None
        self._read: ModelSource | None = None
        self._computing = False

    def serve(self) -> None:
        """Return when the line is closed, or after an error that sticks to the process."""
        self._line.send(Ready())  # before a task arrives: what kills this process from there on is the task's
        Heartbeat(
            lambda: self._line.send(Alive()),
            lambda: self._prefetcher.bytes_read,
            lambda: self._finisher.writes,
            always=self._line.flush,
        )
        self._inbox = inbox = Inbox(self._line, arrived=self._read_ahead, left=self._prefetcher.keep_only)
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
            self._model.settle(failure)

    def _attempt(self, order: RunTask) -> Failure | None:
        shared = self._model.of(order.task.model, order.mode)
        failure = Attempt(order.task, order.mode, self._context, shared).run()
        if failure is None:
            self._announce_device()
        return failure

    def _take(self, source: ModelSource) -> list[FileBytes]:
        try:
            return self._prefetcher.take(source)
        finally:
            self._read = source
            self._read_ahead()

    def _read_ahead(self) -> None:
        """Read the model after the one that was read last. Called in the inbox's thread too."""
        source = self._inbox.model_after(self._read) if self._inbox is not None else None
        if source is not None:
            self._prefetcher.want(source)

    def _say(self, *messages: Message) -> None:
        """Send ``messages``; that an attempt begins can wait as long as nothing follows from it."""
        enough = self._inbox is not None and len(self._inbox) >= _ENOUGH
        if enough and all(isinstance(message, Started) for message in messages):
            self._line.hold(*messages)
        else:
            self._line.send(*messages)

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
