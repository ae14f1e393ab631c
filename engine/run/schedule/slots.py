"""A device slot: its worker, the tasks that the worker was given, and the one it is at."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..messages import RunTask, Started, WorkerSettings
from .board import Item
from .devices import visible_as
from .process import Ended, WorkerProcess

BOOT_S = 120.0
"""What a worker may take to start, on top of a task's own limit, before its first word."""


@dataclass
class Slot:
    """One worker at a time on one device. ``number`` tells slots of one device apart."""

    settings: WorkerSettings
    number: int = 0
    worker: WorkerProcess | None = None
    given: list[Item] = field(default_factory=list)
    """Items without an outcome in the order in which they were given; those with an attempt come first."""
    attempts: dict[str, Started] = field(default_factory=dict)
    """Attempts without an outcome by task: all but the newest are with the worker's finisher."""
    ready: bool = False
    """The worker has said a word."""
    since: float = 0.0
    """Monotonic time at which the newest attempt began, in seconds."""
    heard: float = 0.0
    """Monotonic time of the last sign of work."""
    false_starts: int = 0
    """Workers in a row that ended before they said a word."""
    resting_until: float = 0.0
    """Monotonic time before which no worker is started."""
    model: str | None = None
    """Name of the model given last, which the worker has in memory or will have."""

    @property
    def device(self) -> str:
        """The slot's device."""
        return self.settings.device

    @property
    def busy(self) -> bool:
        """True while an outcome is awaited."""
        return bool(self.given)

    @property
    def hungry(self) -> bool:
        """True where the worker would soon have nothing to begin."""
        return len(self.given) - len(self.attempts) < (1 if self.attempts or not self.given else 2)

    @property
    def at_work(self) -> Item | None:
        """The item whose attempt began last; None where none is known."""
        started = [item for item in self.given if item.task.id in self.attempts]
        return started[-1] if started else None

    def give(self, item: Item) -> None:
        """Hand an item to the worker, starting one where there is none; OSError where that fails."""
        if self.worker is None:
            self.ready, self.heard = False, time.monotonic() + BOOT_S
            self.worker = WorkerProcess(self.settings)
        if not self.busy:
            self.heard = max(self.heard, time.monotonic())
            self.since = self.heard
        self.given.append(item)
        self.model = item.model
        self.worker.send(RunTask(item.task, item.history.mode))

    def began(self, started: Started) -> None:
        """Note that the worker has begun an attempt."""
        self.attempts[started.task] = started
        self.since = time.monotonic()

    def deadline(self, limit_s: float | None) -> float | None:
        """Return the monotonic time at which the task at hand is over its limit; None where there is none."""
        if limit_s is None or not self.busy:
            return None
        return self.since + limit_s + (0.0 if self.ready else BOOT_S)

    def settle(self, task: str) -> Item | None:
        """Note that ``task`` has its outcome; return its item."""
        self.attempts.pop(task, None)
        for item in self.given:
            if item.task.id == task:
                self.given.remove(item)
                return item
        return None

    def recall(self, tasks: Sequence[str]) -> list[Item]:
        """Note that the worker will not begin ``tasks``; return their items."""
        items = [item for item in self.given if item.task.id in tasks]
        self.given = [item for item in self.given if item.task.id not in tasks]
        return items

    def drop_worker(self, grace_s: float = 0.0) -> Ended:
        """Kill the worker and return how it ended and which process it was."""
        if self.worker is None:
            return Ended(None, "could not be started")
        worker, self.worker, self.model = self.worker, None, None
        return worker.kill(grace_s)


def make_slots(devices: Sequence[str], per_device: int, settings: WorkerSettings) -> list[Slot]:
    """Return ``per_device`` slots for each device; workers start with their first task."""
    named = [replace(settings, device=name, visible=visible_as(name), parent=os.getpid()) for name in devices]
    slots = [item for item in named for _ in range(per_device)]
    return [Slot(item, number) for number, item in enumerate(slots)]
