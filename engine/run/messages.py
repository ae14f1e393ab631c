"""What the scheduler and its workers say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..job.expand import Task
from ..job.schema import Evaluate, Gates
from ..report.rows import ModelRow


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker knows for its whole life. ``parent`` is the scheduler's process id."""

    run: Path
    device: str
    threads: int
    allow_code: tuple[str, ...]
    evaluate: Evaluate | None
    gates: Gates
    seed: int
    parent: int


@dataclass(frozen=True)
class RunGroup:
    """Scheduler to worker: do these tasks of one model, in order."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Started:
    """Worker to scheduler: an attempt at a task begins."""

    task: str
    attempt: str


@dataclass(frozen=True)
class TaskOutcome:
    """Worker to scheduler: an attempt ended, and this is its row."""

    row: ModelRow
    explanation: str = ""
    """Why the task was not reused; empty where it was."""
    problem: str = ""
    """What the user hears of at once: what could not be kept on disk, or an altered artifact in the store."""
    poisoned: bool = False
    """True where the process cannot go on (a device error sticks to the process): the worker ends after this."""


Message = Started | TaskOutcome
