"""What the scheduler and its workers say to each other: every word over a line is a tuple of these, in their order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..job.gates import Gates
from ..job.schema import Evaluate
from ..job.task import Task
from ..report.rows import ModelRow
from .failures import Failure, Mode


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker knows for its whole life. ``parent`` is the scheduler's process id."""

    run: Path
    device: str
    """Its name in reports, such as cuda:3."""
    threads: int
    allow_code: tuple[str, ...]
    evaluate: Evaluate | None
    gates: Gates
    seed: int
    parent: int
    visible: str | None = None
    """What CUDA_VISIBLE_DEVICES is for this worker alone, where it is set for each: one GPU or one MIG slice."""
    readers: int = 2
    """Threads that read and hash."""
    read_ahead: float = 2**30
    """Bytes of inputs that may be in memory, that of the model at work included, for the next one to be read ahead."""

    @property
    def computes_on(self) -> str:
        """The device by the name that torch has for it in the worker."""
        return "cuda:0" if self.visible is not None and self.device.startswith("cuda") else self.device


@dataclass(frozen=True)
class RunTask:
    """Scheduler to worker: do this task after those it already has."""

    task: Task
    mode: Mode = field(default_factory=Mode)


@dataclass(frozen=True)
class Recall:
    """Scheduler to worker: give back what has not been begun."""


@dataclass(frozen=True)
class Recalled:
    """Worker to scheduler: these tasks will not be begun."""

    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """Worker to scheduler: it can compute. ``device_bytes`` is the memory of its device that may be used."""

    device_bytes: float | None = None


@dataclass(frozen=True)
class Alive:
    """Worker to scheduler: it has done something since the last word."""


@dataclass(frozen=True)
class Started:
    """Worker to scheduler: an attempt at a task begins.

    It may come late, with other words, while the worker has enough to do: the ledger has it at once.
    """

    task: str
    attempt: str


@dataclass(frozen=True)
class TaskOutcome:
    """Worker to scheduler: an attempt ended, and this is its row."""

    row: ModelRow
    failure: Failure | None = None
    """Class of the failure; None where there was none."""
    explanation: str = ""
    """Why the task was not reused; empty where it was."""
    problem: str = ""
    """What the user hears of at once: what could not be kept on disk, or an altered artifact in the store."""

    @property
    def poisoned(self) -> bool:
        """True where the process cannot go on (a device error sticks to the process): the worker ends after this."""
        return self.failure is Failure.POISONED


ToWorker = WorkerSettings | RunTask | Recall
Message = Ready | Alive | Started | Recalled | TaskOutcome


class Send(Protocol):
    """What a worker's words go to; those of one call arrive together."""

    def __call__(self, *messages: Message) -> None:
        """Send ``messages``."""
