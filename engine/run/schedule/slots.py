"""A device slot: its worker, the tasks that the worker was given, and the one it is at."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ...job.expand import Task
from ..messages import RunGroup, Started, WorkerSettings
from .process import WorkerProcess

BOOT_S = 120.0
"""What a worker may take to start and import torch, on top of a task's own limit, before its first word."""


@dataclass
class Slot:
    """One worker at a time on one device."""

    settings: WorkerSettings
    worker: WorkerProcess | None = None
    pending: deque[Task] = field(default_factory=deque)
    """Tasks of the group at hand without an outcome; the first is at work."""
    current: Started | None = None
    since: float = 0.0
    """Monotonic time at which the task at hand began, in seconds."""

    @property
    def device(self) -> str:
        """The slot's device."""
        return self.settings.device

    @property
    def busy(self) -> bool:
        """True while an outcome is awaited."""
        return bool(self.pending)

    def give(self, tasks: Sequence[Task]) -> None:
        """Hand a group to the worker, starting one where there is none; OSError where that fails."""
        self.pending = deque(tasks)
        self.current, self.since = None, time.monotonic()
        if self.worker is None:
            self.worker = WorkerProcess(self.settings)
        self.worker.send(RunGroup(tuple(tasks)))

    def began(self, started: Started) -> None:
        """Note that the worker has begun an attempt."""
        self.current, self.since = started, time.monotonic()

    def deadline(self, limit_s: float | None) -> float | None:
        """Return the monotonic time at which the task at hand is over its limit; None where there is none."""
        if limit_s is None or not self.busy:
            return None
        return self.since + limit_s + (0.0 if self.current else BOOT_S)

    def settle(self, task: str) -> None:
        """Note that ``task`` has its outcome."""
        self.pending = deque(item for item in self.pending if item.id != task)
        self.current = None

    def drop_worker(self, grace_s: float = 0.0) -> str:
        """Kill the worker and return how it ended and which process it was."""
        if self.worker is None:
            return "could not be started"
        worker, self.worker = self.worker, None
        return f"(process {worker.pid}) {worker.kill(grace_s)}"


def make_slots(devices: Sequence[str], settings: WorkerSettings) -> list[Slot]:
    """Return a slot for each device; workers start with their first group."""
    return [Slot(replace(settings, device=device, parent=os.getpid())) for device in devices]
