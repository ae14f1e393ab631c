"""What came of the tasks, whoever ran them: rows, retries, devices to avoid, and what stops the whole run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from ...errors import DeviceError, DfmpcError, StorageError
from ...job.task import Task
from ...report.parts import write_part
from ...report.rows import ModelRow
from ..failures import Failure, Retry
from ..ledger import Event, Kind, Ledger, TaskState, fold
from ..messages import Started, TaskOutcome
from ..outcome import bare_row, failed
from ..store import RunFolder
from .board import Board, Item
from .deadline import Deadline
from .progress import Progress

_CORDON = 2
"""How many different tasks must poison a device before it is left alone."""
_WORTH_S = 10.0
"""Seconds of work that must be left of a model that somebody is at before a process is started just to help."""
_TAIL_LINES = 8
_TAIL_BYTES = 16384


@dataclass(frozen=True)
class Rules:
    """What the job and the command say about failures."""

    cpu_fallback: bool = False


class Tally:
    """Keeps the outcome of every task of a run. ``rows`` has the row of every task that ended, by task id.

    ``settled`` are the tasks that need no further attempt; a task can be settled without a row here, where its worker
    kept the outcome but could not say so.
    """

    def __init__(
        self, run: RunFolder, board: Board, ledger: Ledger, progress: Progress, deadline: Deadline, rules: Rules
    ) -> None:
        self.run, self.board, self.progress, self._deadline, self._rules = run, board, progress, deadline, rules
        self._ledger = ledger
        self.rows: dict[str, ModelRow] = {}
        self.settled: set[str] = set()
        self.explanations: list[str] = []
        self.log_tails: dict[str, list[str]] = {}
        """The last lines of the log of every failed task, by task id."""
        self.full: str = ""
        """What the disk said when it would take no more; empty while it does."""
        self.cordoned: set[str] = set()
        self._lost_events = False
        self._poisoned: dict[str, set[str]] = {}
        self._seconds: dict[str, list[float]] = {}

    def record(self, event: Event) -> None:
        """Append to the ledger; that it could not is said once on stderr, and the run goes on."""
        try:
            self._ledger.append(event)
        except StorageError as error:
            if not self._lost_events:
                self.progress.note(f"warning: {error}")
            self._lost_events = True

    def seconds_of(self, model: str) -> float | None:
        """Return the mean seconds of the tasks of ``model`` that have ended; None where none has."""
        seen = self._seconds.get(model)
        return sum(seen) / len(seen) if seen else None

    def pays(self, *, started: bool) -> Callable[[str, int], bool]:
        """Return what tells whether a model that somebody is at pays to be loaded for so many tasks that wait.

        ``started``: there is a process that would do it.
        """

        def told(model: str, waiting: int) -> bool:
            seconds = self.seconds_of(model)
            return seconds is not None and (started or waiting * seconds >= _WORTH_S)

        return told

    def take(self, item: Item, outcome: TaskOutcome) -> None:
        """Take an outcome that a worker has brought; a failed one is tried again while its budget lasts."""
        row = outcome.row
        if outcome.problem and outcome.failure is not Failure.NO_SPACE:  # that is said once, as the run's end
            self.progress.note(f"warning: {row.task}: {outcome.problem}")
        if outcome.explanation:
            self.explanations.append(f"{row.task}: {outcome.explanation}")
        if outcome.failure is None:
            self._learn(item, row)
            self._settle(row)
        else:
            self._after_failure(item, outcome.failure, row)

    def lose(
        self, items: Sequence[Item], attempts: Mapping[str, Started], failure: Failure, error: DfmpcError, device: str
    ) -> None:
        """Take note that the worker that was at ``items`` is gone; those that it had just finished are settled.

        Of one that is left it was the fault. Of several (one was computed while another was committed) nobody knows:
        each is tried again alone, at no cost, which shows it.
        """
        finished = self.finished_meanwhile(attempts[item.task.id] for item in items if item.task.id in attempts)
        left = [item for item in items if item.task.id not in finished]
        if len(left) == 1:
            self._charge(left[0], failure, error, attempts.get(left[0].task.id), device)
            return
        for item in reversed(left):
            item.history.suspect()
            self.board.put_back(item)
        if left:
            names = ", ".join(item.task.id for item in left)
            self.progress.note(f"{names}: {failure}, each tried again alone as either may be the cause: {error}")

    def _charge(self, item: Item, failure: Failure, error: DfmpcError, started: Started | None, device: str) -> None:
        attempt = started.attempt if started else uuid.uuid4().hex[:12]
        row = bare_row(self.run, item.task, "failed", attempt, device)
        self._after_failure(item, failure, failed(row, self._with_log(item.task, error, started)))

    def begun_by(self, pid: int, since: datetime | None, items: Sequence[Item]) -> dict[str, Started]:
        """Return the attempts at ``items``, by task, that the worker ``pid``, started at ``since``, has in the ledger.

        So what it began, or even finished, without being heard is known when it is gone.
        """
        try:
            states = fold(self.run) if items and since else {}
        except OSError:
            return {}
        found = ((item.task.id, states.get(item.task.id)) for item in items)
        return {
            task: Started(task, state.attempt)
            for task, state in found
            # an attempt whose failure was kept is not the one that ended the worker
            if state and since and state.is_by(pid, since) and (state.status == "running" or state.settled)
        }

    def finished_meanwhile(self, attempts: Iterable[Started]) -> set[str]:
        """Return the tasks whose outcome a worker kept, but died before it could say so; they are settled then.

        So they are where another command over the same run has finished them. A ledger that cannot be read tells
        nothing.
        """
        begun = list(attempts)
        try:
            states = fold(self.run) if begun else {}
        except OSError:
            return set()
        found = {started.task for started in begun if _is_settled(started, states.get(started.task))}
        self.settled |= found
        for task in found:
            self.progress.finished(task)
        return found

    def fail(self, task: Task, error: DfmpcError) -> None:
        """Give ``task`` a failed row without an attempt."""
        self._end_as_failed(failed(bare_row(self.run, task, "failed", uuid.uuid4().hex[:12], ""), error), None)

    def interrupt(self, item: Item, started: Started, device: str) -> None:
        """Note that an attempt was cut short; that costs the task nothing."""
        if self.finished_meanwhile([started]):
            return
        row = bare_row(self.run, item.task, "interrupted", started.attempt, device)
        self._keep(replace(row, finished_at=datetime.now(UTC)))
        self.record(Event(Kind.INTERRUPTED, task=item.task.id, attempt=started.attempt, device=device))
        self.rows[item.task.id] = row

    def _after_failure(self, item: Item, failure: Failure, row: ModelRow) -> None:
        if failure is Failure.NO_SPACE:
            self.full = self.full or str(row.error)
            self.rows[item.task.id] = replace(row, status="interrupted")
            self.board.put_back(item)
            return
        if failure is Failure.POISONED:
            self._poison(row.device or "", item.task.id)
        retry = item.history.after(failure, cpu_fallback=self._rules.cpu_fallback)
        tried = sum(item.history.counts.values())
        row = replace(row, failure=str(failure), attempts=tried)
        if retry is None:
            self._end_as_failed(row, failure)
        else:
            self._again(item, failure, retry, row)

    def _again(self, item: Item, failure: Failure, retry: Retry, row: ModelRow) -> None:
        item.not_before = time.monotonic() + retry.after_s if retry.after_s else 0.0
        if retry.elsewhere and row.device:
            item.avoid.add(row.device)
        self.board.put_back(item)
        said = (row.error or "").splitlines()[0]
        self.progress.note(f"{item.task.id}: {failure}, tried again {retry.in_words}: {said}")

    def _poison(self, device: str, task: str) -> None:
        guilty = self._poisoned.setdefault(device, set())
        guilty.add(task)
        if len(guilty) >= _CORDON and device not in self.cordoned:
            self.cordoned.add(device)
            error = DeviceError(f"{device} failed under {_CORDON} different tasks and gets no more in this run")
            self.record(Event(Kind.DEVICE_CORDONED, device=device, error=str(error)))
            self.progress.note(f"warning: {error}")

    def _end_as_failed(self, row: ModelRow, failure: Failure | None) -> None:
        self._keep(row)
        self.record(
            Event(
                Kind.TASK_FAILED,
                task=row.task,
                attempt=row.attempt,
                status="failed",
                error_class=row.error_class or "",
                error=row.error or "",
                device=row.device or "",
                failure=failure or "",
            )
        )
        self.log_tails[row.task] = self._tail(row)
        self._settle(row)

    def _settle(self, row: ModelRow) -> None:
        self.rows[row.task] = row
        self.settled.add(row.task)
        self.progress.finished(row.task)
        if row.status == "failed":
            self.progress.note(f"{row.task} failed: {row.error_class}")  # the text comes in the end

    def _learn(self, item: Item, row: ModelRow) -> None:
        spent = seconds_of(row)
        self._seconds.setdefault(item.model, []).append(spent)
        if row.status == "done":
            self._deadline.observe(row.bit_plan, item.bytes, spent)

    def _keep(self, row: ModelRow) -> None:
        try:
            write_part(self.run.path, row, [], row.attempt)
        except StorageError as error:
            self.progress.note(f"warning: {row.task}: {error}")

    def _with_log(self, task: Task, error: DfmpcError, started: Started | None) -> DfmpcError:
        if started is None:
            return error
        log = self.run.log_file(task.model.name, task.plan.name, started.attempt)
        return type(error)(f"{error}; its log is {log.relative_to(self.run.path)} in the run's folder")

    def _tail(self, row: ModelRow) -> list[str]:
        log = self.run.log_file(row.model, row.bit_plan, row.attempt)
        try:
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def seconds_of(row: ModelRow) -> float:
    """Return what a task took of its worker's time."""
    return sum(part or 0.0 for part in (row.read_s, row.compress_s, row.write_s, row.evaluate_s))


def _is_settled(started: Started, state: TaskState | None) -> bool:
    """Tell whether the task of ``started`` has its outcome: not where it is another attempt's failure."""
    if state is None or not state.settled:
        return False
    return state.attempt == started.attempt or state.status != "failed"
