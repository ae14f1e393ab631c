"""The thread that commits artifacts and reports while the next task computes; a step behind, never more."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ...errors import StorageError
from ...report.parts import write_parts
from ...report.rows import LayerRow, ModelRow
from ..failures import classify
from ..ledger import Event, Kind, Ledger
from ..messages import Send, TaskOutcome
from ..outcome import failed
from ..store import RunFolder
from .attempt_log import append_traceback

_AHEAD = 2
"""Steps that may wait: the commit of one task and its report. Whoever brings a third waits."""
_Step = tuple[Callable[[], None], Callable[[], Path]]
_Ended = tuple[TaskOutcome, list[LayerRow]]
_BATCH = 256
_BATCH_S = 1.0
"""Reports are written together, so many or so many seconds of them: reused tasks end in milliseconds, and a part of
fifty columns takes about as long to write and to merge whatever it holds."""
_SLOW = 10e6
"""Bytes a second of the slowest disk or server that is not taken for a dead one."""
_STALL_S = 3.0
"""Seconds for which a busy disk may answer nothing at all, however few the bytes."""
BROKEN = 71
"""Exit code of a worker whose finisher failed in a way that it should not."""


class Finisher:
    """Steps are done in the order in which they were brought, each after the one before has ended."""

    def __init__(self, run: RunFolder, ledger: Ledger, send: Send, more: Callable[[], bool] = lambda: True) -> None:
        """``more`` tells whether further tasks wait; without any the scheduler may be waiting for what is kept."""
        self._run, self._ledger, self._send, self._more = run, ledger, send, more
        self._steps: queue.Queue[_Step | None] = queue.Queue(_AHEAD)
        self._ended: list[_Ended] = []
        self._since = 0.0
        self._writes_until = 0.0
        self._thread = threading.Thread(target=self._work, name="finisher", daemon=True)
        self._thread.start()

    def put(self, step: Callable[[], None], log: Callable[[], Path]) -> None:
        """Have ``step`` done; it must not raise. ``log`` tells its attempt's log: stderr is another's by then."""
        self._steps.put((step, log))

    def report(self, outcome: TaskOutcome, layers: list[LayerRow]) -> None:
        """Keep an outcome and tell the scheduler: at once or, where it was reused, with others. Called by steps."""
        if not self._ended:
            self._since = time.monotonic()
        self._ended.append((outcome, layers))
        if outcome.row.status != "reused" or len(self._ended) >= _BATCH or not self._more():
            self._flush()

    @contextmanager
    def bringing(self, size: int) -> Iterator[None]:
        """Bring ``size`` bytes to the disk inside, which may take long and show no sign of it. Called by steps."""
        self._writes_until = time.monotonic() + _STALL_S + size / _SLOW
        try:
            yield
        finally:
            self._writes_until = 0.0

    @property
    def writes(self) -> bool:
        """True while bytes are brought to the disk, for as long as a slow one would need for them."""
        return time.monotonic() < self._writes_until

    def close(self) -> None:
        """Do what was brought, then end."""
        self._steps.put(None)
        self._thread.join()

    def _work(self) -> None:

        def log() -> Path:
            return self._run.path / "logs" / "finisher.log"

        try:
            while (brought := self._next()) is not None:
                step, log = brought
                step()
            self._flush()
        except BaseException as error:  # noqa: BLE001 - told and passed on as the end of the process
            append_traceback(log(), error)
            os._exit(BROKEN)  # the scheduler sees a crash; a silent thread would look like a hang

    def _next(self) -> _Step | None:
        while True:
            try:
                return self._steps.get(timeout=self._patience())
            except queue.Empty:
                self._flush()

    def _patience(self) -> float | None:
        return max(0.0, self._since + _BATCH_S - time.monotonic()) if self._ended else None

    def _flush(self) -> None:
        ended, self._ended = self._ended, []
        if ended:
            self._keep_and_tell(ended)

    def _keep_and_tell(self, ended: list[_Ended]) -> None:
        problem = self._keep([(outcome.row, layers) for outcome, layers in ended if outcome.failure is None])
        if problem is not None and not isinstance(problem, StorageError) and len(ended) > 1:
            for each in ended:  # one of them cannot be kept, which is not the others' fault
                self._keep_and_tell([each])
            return
        outcomes = [outcome if problem is None else self._unkept(outcome, problem) for outcome, _ in ended]
        problem = self._record([_event(outcome) for outcome in outcomes])
        self._send(*(outcome if problem is None else self._unkept(outcome, problem) for outcome in outcomes))

    def _keep(self, rows: list[tuple[ModelRow, list[LayerRow]]]) -> Exception | None:
        try:
            if rows:
                write_parts(self._run.path, rows)
        except Exception as error:  # noqa: BLE001 - it fails those tasks, not what the worker is at by now
            return error
        return None

    def _record(self, events: list[Event]) -> Exception | None:
        try:
            self._ledger.append_all(events)
        except Exception as error:  # noqa: BLE001 - the same
            return error
        return None

    def _unkept(self, outcome: TaskOutcome, error: Exception) -> TaskOutcome:
        """Return what the scheduler hears where the outcome could not be kept; a foreign error goes to the log too."""
        row = outcome.row
        if not isinstance(error, StorageError):
            append_traceback(self._run.log_file(row.model, row.bit_plan, row.attempt), error)
        if outcome.failure is not None:
            return replace(outcome, problem=str(error))
        return replace(outcome, row=failed(row, error), failure=classify(error), problem=str(error))


def _event(outcome: TaskOutcome) -> Event:
    row = outcome.row
    return Event(
        Kind.TASK_FINISHED if outcome.failure is None else Kind.ATTEMPT_FAILED,
        task=row.task,
        attempt=row.attempt,
        status=row.status if outcome.failure is None else "",
        error_class=row.error_class or "",
        error=row.error or "",
        device=row.device or "",
        failure=outcome.failure or "",
    )
