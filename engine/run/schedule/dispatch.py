"""The loop that keeps the slots at work: hands out groups, takes outcomes, buries dead workers, stops at a signal."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait

from ...errors import DfmpcError, StorageError, TaskTimeoutError, WorkerDiedError
from ...job.expand import Task
from ...report.parts import write_part
from ...report.rows import ModelRow
from ..ledger import Event, Kind, Ledger, fold
from ..messages import Started, TaskOutcome
from ..outcome import bare_row, failed
from ..store import RunFolder
from .interrupts import Interrupts
from .process import STOP_S
from .progress import Progress
from .slots import Slot

EXIT_GRACE_S = 2.0
"""How long a worker whose line broke may take to end by itself, so that its exit code is known."""


class Dispatcher:
    """Runs groups of tasks on slots. ``rows`` has the row of every task that ended, by task id.

    ``settled`` are the tasks that need no further attempt; a task can be settled without a row here, where its worker
    kept the outcome but could not say so.
    """

    def __init__(
        self, run: RunFolder, slots: Sequence[Slot], ledger: Ledger, progress: Progress, timeout_s: float | None
    ) -> None:
        self._run, self._slots, self._ledger, self._progress = run, slots, ledger, progress
        self._timeout_s = timeout_s
        self._queue: deque[list[Task]] = deque()
        self.rows: dict[str, ModelRow] = {}
        self.settled: set[str] = set()
        self.explanations: list[str] = []

    def work(self, groups: Sequence[list[Task]], interrupts: Interrupts) -> None:
        """Do all ``groups``; returns early, with the workers gone, where ``interrupts`` has received a signal."""
        self._queue.extend(groups)
        try:
            while interrupts.received is None and (self._queue or any(slot.busy for slot in self._slots)):
                self._hand_out()
                self._progress.running([slot.pending[0].id for slot in self._slots if slot.pending])
                self._await(interrupts.fd)
                self._enforce_limit()
            if self._queue or any(slot.busy for slot in self._slots):
                self._interrupt()
        finally:
            for slot in self._slots:
                slot.drop_worker()

    def record(self, event: Event) -> None:
        """Append to the ledger; a full disk is said on stderr, and the run goes on."""
        try:
            self._ledger.append(event)
        except StorageError as error:
            self._progress.note(f"warning: {error}")

    def fail(self, task: Task, error: DfmpcError, attempt: str = "", device: str = "") -> None:
        """Give ``task`` a failed row in the worker's stead."""
        attempt = attempt or uuid.uuid4().hex[:12]
        row = failed(bare_row(self._run, task, "failed", attempt, device), error)
        self._keep(row)
        self.record(
            Event(
                Kind.TASK_FAILED,
                task=task.id,
                attempt=attempt,
                status="failed",
                error_class=type(error).__name__,
                error=str(error),
                device=device,
            )
        )
        self._settled(row)

    def _hand_out(self) -> None:
        for slot in self._slots:
            if not slot.busy and self._queue:
                group = self._queue.popleft()
                try:
                    slot.give(group)
                except OSError as error:
                    self._lose(slot, WorkerDiedError(f"no worker could be started on {slot.device}: {error}"))

    def _await(self, wake: int) -> None:
        """Wait for a message, a dead worker, a signal, a deadline or the next line of progress."""
        lines = {slot.worker.connection: slot for slot in self._slots if slot.busy and slot.worker}
        if not lines:  # no worker could be started, so nobody would ever answer
            return
        sources: list[Connection | int] = [*lines, wake]
        for ready in wait(sources, self._wait_s()):
            if isinstance(ready, Connection):
                self._receive(lines[ready])

    def _wait_s(self) -> float | None:
        now = time.monotonic()
        deadlines = [slot.deadline(self._timeout_s) for slot in self._slots]
        waits = [max(0.0, deadline - now) for deadline in deadlines if deadline is not None]
        if self._progress.wait_s is not None:
            waits.append(self._progress.wait_s)
        return min(waits, default=None)

    def _receive(self, slot: Slot) -> None:
        message = slot.worker.receive() if slot.worker else None
        if isinstance(message, Started):
            slot.began(message)
        elif isinstance(message, TaskOutcome):
            self._take(slot, message)
        else:
            how = slot.drop_worker(EXIT_GRACE_S)
            self.record(Event(Kind.WORKER_DIED, device=slot.device, error=how))
            self._lose(slot, WorkerDiedError(f"the worker {how} while it was at this task"))

    def _take(self, slot: Slot, outcome: TaskOutcome) -> None:
        slot.settle(outcome.row.task)
        if outcome.problem:
            self._progress.note(f"warning: {outcome.row.task}: {outcome.problem}")
        if outcome.explanation:
            self.explanations.append(f"{outcome.row.task}: {outcome.explanation}")
        self._settled(outcome.row)
        if outcome.poisoned:
            slot.drop_worker(EXIT_GRACE_S)
            self._requeue(slot)

    def _enforce_limit(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            deadline = slot.deadline(self._timeout_s)
            if deadline is not None and now >= deadline:
                slot.drop_worker()
                limit = f"{self._timeout_s:g} s (resources.task_timeout)"
                self._lose(slot, TaskTimeoutError(f"not finished after {limit}: raise it, or leave the task out"))

    def _lose(self, slot: Slot, error: DfmpcError) -> None:
        """Fail the task that ``slot`` was at, unless it had just been finished, and queue the rest of its group."""
        task = slot.pending.popleft()
        started = slot.current
        if started is None or not self._finished_meanwhile(started):
            self.fail(task, self._with_log(task, error, started), started.attempt if started else "", slot.device)
        slot.current = None
        self._requeue(slot)

    def _requeue(self, slot: Slot) -> None:
        if slot.pending:
            self._queue.appendleft(list(slot.pending))
            slot.pending.clear()

    def _with_log(self, task: Task, error: DfmpcError, started: Started | None) -> DfmpcError:
        if started is None:
            return error
        log = self._run.log_file(task.model.name, task.plan.name, started.attempt)
        return type(error)(f"{error}; its log is {log.relative_to(self._run.path)} in the run's folder")

    def _finished_meanwhile(self, started: Started) -> bool:
        """Tell whether a worker kept its outcome but died before it could say so; the task is settled then."""
        state = fold(self._run).get(started.task)
        if state is None or not state.settled or state.attempt != started.attempt:
            return False
        self.settled.add(started.task)
        return True

    def _settled(self, row: ModelRow) -> None:
        self.rows[row.task] = row
        self.settled.add(row.task)
        self._progress.finished(row.task)
        if row.status == "failed":
            self._progress.note(f"{row.task} failed: {row.error_class}")  # the text comes in the end

    def _interrupt(self) -> None:
        """End the workers and note what they were at; an artifact in the making is left to the sweep."""
        workers = [slot.worker for slot in self._slots if slot.worker]
        for worker in workers:
            worker.ask_to_end()
        for slot in self._slots:
            slot.drop_worker(STOP_S)
        at_work = [(slot, slot.pending[0], slot.current) for slot in self._slots if slot.pending and slot.current]
        for slot, task, started in at_work:
            if not self._finished_meanwhile(started):
                row = bare_row(self._run, task, "interrupted", started.attempt, slot.device)
                self._keep(replace(row, finished_at=datetime.now(UTC)))
                self.rows[task.id] = row
        self.record(Event(Kind.INTERRUPTED))

    def _keep(self, row: ModelRow) -> None:
        try:
            write_part(self._run.path, row, [], row.attempt)
        except StorageError as error:
            self._progress.note(f"warning: {row.task}: {error}")
