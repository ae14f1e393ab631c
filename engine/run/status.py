"""How far a run has come."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .ledger import TaskState, fold, is_abandoned
from .store import RunFolder, find_run


@dataclass(frozen=True)
class TaskStatus:
    """One task: waiting, running, done, reused, failed or interrupted."""

    task: str
    status: str
    attempts: int
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
    tasks: list[TaskStatus]


def read_status(path: Path) -> RunStatus:
    """Return the state of the run at ``path``: a run's folder, or a store, which means its newest run.

    Raises UsageError where there is none. A task that is said to be running by a process that has died counts as
    interrupted.
    """
    run = find_run(path)
    frozen, states = run.frozen(), fold(run)
    tasks = [_task_status(run, task.id, states.get(task.id, TaskState())) for task in frozen.tasks]
    counts = Counter(task.status for task in tasks)
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
        finished=counts["done"] + counts["reused"] + counts["failed"] == len(tasks),
        tasks=tasks,
    )


def _task_status(run: RunFolder, task: str, state: TaskState) -> TaskStatus:
    return TaskStatus(
        task=task,
        status="interrupted" if is_abandoned(run, state) else state.status,
        attempts=state.attempts,
        device=state.device,
        since=state.since,
        error_class=state.error_class,
        error=state.error,
    )
