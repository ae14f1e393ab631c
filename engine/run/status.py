"""How far a run has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from ..job.task import Task
from .ledger import SETTLED, Event, Kind, TaskState, fold_events, is_abandoned, read_events
from .liveness import is_attended
from .store import RunFolder, find_run


@dataclass(frozen=True)
class TaskStatus:
    """One task: waiting, running, done, reused, failed or interrupted."""

    task: str
    status: str
    attempts: int
    attempt: str
    """Identifier of the newest attempt, which names its log."""
    device: str
    since: str
    """When it came into this state, ISO 8601 UTC; empty while it waits."""
    error_class: str
    error: str


@dataclass(frozen=True)
class RunStatus:
    """A run's tasks, and how many are in which state."""

    run: Path
    job: str
    total: int
    done: int
    reused: int
    failed: int
    running: int
    waiting: int
    interrupted: int
    finished: bool
    """True where every task is done, reused or failed."""
    live: bool
    """True while it is unfinished and a command is at it, as far as can be known from this host."""
    retries: int
    """Attempts beyond each task's first."""
    bytes_total: int
    """Input of all tasks: a model counts once a task."""
    bytes_settled: int
    """Of the tasks that are done, reused or failed."""
    bytes_per_s: float | None
    """Since the newest command came to the run; None while that has nothing to go by."""
    eta_s: float | None
    """Seconds until the end at this rate; 0 where it has come, None where the rate is not known."""
    tasks: list[TaskStatus]


def read_status(path: Path) -> RunStatus:
    """Return the state of the run at ``path``: a run's folder, or a store, which means its newest run.

    Raises UsageError where there is none. A task that is said to be running by a process that has died counts as
    interrupted.
    """
    run = find_run(path)
    frozen, events = run.frozen(), read_events(run)
    live = is_attended(run, events)
    if not live:  # hear what the last command said between our reading and its end
        events = read_events(run)
        live = is_attended(run, events)
    tasks = _tasks(run, frozen.tasks, fold_events(events))
    sizes = {task.id: frozen.bytes.get(task.model.name, 0) for task in frozen.tasks}
    counts = Counter(task.status for task in tasks)
    settled = [task for task in tasks if task.status in SETTLED]
    total, there = sum(sizes.values()), sum(sizes[task.task] for task in settled)
    finished = len(settled) == len(tasks)
    rate = _rate(events, settled, sizes, finished)
    return RunStatus(
        run=run.path,
        job=frozen.job,
        total=len(tasks),
        done=counts["done"],
        reused=counts["reused"],
        failed=counts["failed"],
        running=counts["running"],
        waiting=counts["waiting"],
        interrupted=counts["interrupted"],
        finished=finished,
        live=live and not finished,
        retries=sum(max(0, task.attempts - 1) for task in tasks),
        bytes_total=total,
        bytes_settled=there,
        bytes_per_s=rate,
        eta_s=0.0 if finished else (total - there) / rate if rate else None,
        tasks=tasks,
    )


def _tasks(run: RunFolder, tasks: Sequence[Task], states: Mapping[str, TaskState]) -> list[TaskStatus]:
    @cache
    def abandoned(process: str) -> bool:
        """Look at each process once, however many tasks it has left."""
        return is_abandoned(run, TaskState(status="running", process=process))

    found = []
    for task in tasks:
        state = states.get(task.id, TaskState())
        lost = state.status == "running" and abandoned(state.process)
        found.append(_task_status(task.id, state, "interrupted" if lost else state.status))
    return found


def _task_status(task: str, state: TaskState, status: str) -> TaskStatus:
    return TaskStatus(
        task=task,
        status=status,
        attempts=state.attempts,
        attempt=state.attempt,
        device=state.device,
        since=state.since,
        error_class=state.error_class,
        error=state.error,
    )


def _rate(
    events: Sequence[Event], settled: Sequence[TaskStatus], sizes: Mapping[str, int], finished: bool
) -> float | None:
    """Return the bytes a second that were settled since the newest command came, up to now or to the end."""
    started = max((event.at for event in events if event.kind is Kind.RUN_STARTED), default="")
    if not started:
        return None
    end = datetime.fromisoformat(events[-1].at) if finished else datetime.now(UTC)
    seconds = (end - datetime.fromisoformat(started)).total_seconds()
    there = sum(sizes[task.task] for task in settled if task.since > started)
    return there / seconds if there and seconds > 0 else None
