"""A device slot: its worker, the tasks that the worker was given, and the one it is at."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from ..messages import Recall, RunTask, Started, WorkerSettings
from .board import Item
from .process import Ended, WorkerProcess
from .spares import Spares

BOOT_S = 120.0
"""What a worker may take to start, on top of a task's own limit, before its first word."""
_AHEAD_S = 0.1
_MOST_AHEAD = 16
"""So many seconds of work, and so many tasks at most, wait at a worker whose tasks end before a word goes round."""
_UNHEARD_S = 2.0
"""How long a worker with tasks waiting may keep the beginning of one to itself, at most."""
_SEEN = 8
AT_HAND = 3
"""Begun tasks that a worker still works for: one that it computes, one that it commits, one that it reports. What was
begun before them has ended and waits to be reported with others."""


@dataclass
class Slot:
    """One worker at a time on one device. ``number`` tells slots of one device apart."""

    settings: WorkerSettings
    number: int = 0
    spares: Spares = field(default_factory=lambda: Spares(()))
    """Processes that wait to be workers."""
    worker: WorkerProcess | None = None
    given: list[Item] = field(default_factory=list)
    """Items without an outcome in the order in which they were given; those with an attempt come first."""
    attempts: dict[str, Started] = field(default_factory=dict)
    """Attempts without an outcome by task: all but the newest are with the worker's finisher."""
    ready: bool = False
    """The worker has said a word."""
    since: float = 0.0
    """Monotonic time at which the newest attempt began, in seconds."""
    moved: float = 0.0
    """Monotonic time at which an attempt last began or ended, as far as is known."""
    heard: float = 0.0
    """Monotonic time of the last sign of work."""
    false_starts: int = 0
    """Workers in a row that ended before they said a word."""
    resting_until: float = 0.0
    """Monotonic time before which no worker is started."""
    model: str | None = None
    """Name of the model given last, which the worker has in memory or will have."""
    pid: int = 0
    born: datetime | None = None
    """Process id of the worker and when it was started, also of one that is gone."""
    unsent: list[RunTask] = field(default_factory=list)
    """What was given since ``send``."""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_SEEN))
    """What the last tasks took here."""
    called_back: bool = False
    """The worker was asked for what it has not begun, and has not answered."""

    @property
    def device(self) -> str:
        """The slot's device."""
        return self.settings.device

    @property
    def busy(self) -> bool:
        """True while an outcome is awaited."""
        return bool(self.given)

    @property
    def waiting(self) -> int:
        """How many of the given tasks have not begun, as far as is known."""
        return len(self.given) - len(self.attempts)

    @property
    def at_hand(self) -> list[Item]:
        """Those of the given tasks that the worker is at or will begin."""
        return self.given[max(0, len(self.attempts) - AT_HAND) :]

    @property
    def not_begun(self) -> list[Item]:
        """Those of the given tasks."""
        return [item for item in self.given if item.task.id not in self.attempts]

    @property
    def crowded(self) -> bool:
        """Whether more waits than the one task that saves the worker a wait."""
        return self.waiting > (1 if self.attempts else 2)

    def wants(self, fair: int) -> int:
        """Return how many tasks to give now, so that the worker never waits for word and at most ``fair`` wait there.

        One waits where tasks take their time, more where the last ones ended at once.
        """
        mean_s = sum(self.seconds) / len(self.seconds) if self.seconds else _AHEAD_S
        ahead = max(1, min(fair, _MOST_AHEAD, int(_AHEAD_S / max(mean_s, 1e-6))))
        most = ahead if self.attempts or not self.given else ahead + 1
        return most - self.waiting if self.waiting <= most // 2 else 0

    @property
    def at_work(self) -> Item | None:
        """The item whose attempt began last; None where none is known."""
        return next((item for item in reversed(self.given) if item.task.id in self.attempts), None)

    def give(self, item: Item) -> None:
        """Have an item for the worker with the next ``send``, starting one if need be; OSError where that fails."""
        if self.worker is None:
            self.ready, self.heard = False, time.monotonic() + BOOT_S
            self.born = datetime.now(UTC)
            self.worker = WorkerProcess(self.settings, self.spares.take(self.settings))
            self.pid = self.worker.pid
        if not self.busy:
            self.heard = max(self.heard, time.monotonic())
            self.since = self.moved = self.heard
        self.given.append(item)
        self.model = item.model
        self.unsent.append(RunTask(item.task, item.history.mode))

    def send(self) -> None:
        """Hand the worker what was given."""
        unsent, self.unsent = self.unsent, []
        if unsent and self.worker is not None:
            self.worker.send(*unsent)

    def call_back(self) -> None:
        """Ask the worker for what it has not begun."""
        if self.worker is not None:
            self.called_back = True
            self.worker.send(Recall())

    def began(self, started: Started) -> None:
        """Note that the worker has begun an attempt."""
        self.called_back = False
        self.attempts[started.task] = started
        self.since = self.moved = time.monotonic()

    def deadline(self, limit_s: float | None) -> float | None:
        """Return the monotonic time at which the task at hand is over its limit; None where there is none."""
        if limit_s is None or not self.busy:
            return None
        return self.since + limit_s + (_UNHEARD_S if self.waiting > 1 else 0.0) + (0.0 if self.ready else BOOT_S)

    def settle(self, task: str, seconds: float | None = None) -> Item | None:
        """Note that ``task`` has its outcome, after ``seconds`` (None: not known); return its item."""
        if seconds is None:
            self.seconds.clear()
        else:
            self.seconds.append(seconds)
        self.moved = time.monotonic()
        self.called_back = False
        self.attempts.pop(task, None)
        for item in self.given:
            if item.task.id == task:
                self.given.remove(item)
                return item
        return None

    def recall(self, tasks: Sequence[str]) -> list[Item]:
        """Note that the worker will not begin ``tasks``; return their items. What comes next is not given so early."""
        self.seconds.clear()
        items = [item for item in self.given if item.task.id in tasks]
        self.given = [item for item in self.given if item.task.id not in tasks]
        self.called_back = bool(self.waiting)  # that is beginning: to ask again would get the same answer
        self.model = self.given[-1].model if self.given else None
        return items

    def drop_worker(self, grace_s: float = 0.0) -> Ended:
        """Kill the worker and return how it ended and which process it was."""
        if self.worker is None:
            return Ended(None, "could not be started")
        worker, self.worker, self.model = self.worker, None, None
        self.called_back = False
        self.seconds.clear()
        self.unsent.clear()
        return worker.kill(grace_s)


def make_slots(spares: Spares, settings: WorkerSettings) -> list[Slot]:
    """Return a slot for each that ``spares`` names; workers start with their first task, from ``spares`` at first."""
    common = replace(settings, parent=os.getpid())
    named = [replace(common, device=name, visible=spares.visible[name]) for name in spares.devices]
    slots = [item for item in named for _ in range(spares.per_device)]
    return [Slot(item, number, spares) for number, item in enumerate(slots)]
