"""What happened in a run: append-only events, one file a process, and the state that they fold to.

There is no database and no lock: a process appends whole lines to a file of its own, and a reader folds all files.
A line that a crash tore off is ignored.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pydantic_core import from_json

from .. import faults
from ..artifact.owner import Owner
from ..errors import StorageError
from .store import RunFolder


class Kind(StrEnum):
    """Kinds of event."""

    RUN_STARTED = "run_started"
    TASK_STARTED = "task_started"
    TASK_FINISHED = "task_finished"
    TASK_FAILED = "task_failed"
    RUN_FINISHED = "run_finished"
    PART_FINISHED = "part_finished"
    """A command has done its part of the tasks; others are, or will be, at the rest."""
    INTERRUPTED = "interrupted"
    """Of a task whose attempt was cut short; without a task, of the scheduler."""
    WORKER_DIED = "worker_died"
    ATTEMPT_FAILED = "attempt_failed"
    """A worker's word; what follows from it, another attempt or a failed task, is the scheduler's."""
    DEVICE_CORDONED = "device_cordoned"


_BRIEF = frozenset({Kind.TASK_STARTED})
"""Events that a crash may lose: every other one is flushed to the disk before the next step."""

SETTLED = frozenset({"done", "reused", "failed"})
"""States that a run does not leave by itself."""


@dataclass(frozen=True)
class Event:
    """One line of a ledger file. ``at`` is ISO 8601 UTC with microseconds; empty fields are not written."""

    kind: Kind
    at: str = ""
    task: str = ""
    attempt: str = ""
    status: str = ""
    error_class: str = ""
    error: str = ""
    device: str = ""
    failure: str = ""
    """Class of the failure (run/failures.py)."""
    process: str = ""
    """Name of the writer's file, which is not written into it."""


_KINDS: dict[str, Kind] = {str(kind): kind for kind in Kind}
_WRITTEN = tuple(field.name for field in fields(Event) if field.name != "process")


@dataclass(frozen=True)
class TaskState:
    """Where a task stands: waiting, running, done, reused, failed or interrupted."""

    status: str = "waiting"
    attempts: int = 0
    attempt: str = ""
    error_class: str = ""
    error: str = ""
    device: str = ""
    since: str = ""
    process: str = ""

    @property
    def settled(self) -> bool:
        """True where nothing is left to do without --retry-failed."""
        return self.status in SETTLED

    def is_by(self, pid: int, since: datetime) -> bool:
        """Tell whether the process ``pid`` of this host said so since ``since``; before, its id was another's."""
        return self.process.startswith(f"{_name_of(pid)}-") and self.since >= since.isoformat(timespec="microseconds")


class Ledger:
    """The event file of this process; made with the first event."""

    def __init__(self, run: RunFolder) -> None:
        self._path = run.ledger / f"{_name_of(os.getpid())}-{uuid.uuid4().hex}.jsonl"
        self._file: int | None = None

    def append(self, event: Event) -> None:
        """Append ``event`` with the present time in one write; StorageError where it cannot be kept."""
        self.append_all([event])

    def append_all(self, events: Sequence[Event]) -> None:
        """Append ``events`` with the present time, a write each, and bring them to the disk once."""
        try:
            if self._file is None:
                self._file = self._open()
            for event in events:
                _write(self._file, {name: value for name in _WRITTEN if (value := getattr(event, name))})
            if any(event.kind not in _BRIEF for event in events):
                os.fsync(self._file)
        except OSError as error:
            raise StorageError(
                f"{self._path}: {events[0].kind} cannot be recorded ({error.strerror}); free space"
            ) from error

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        _write(file, {"owner": Owner.current().to_dict()})
        return file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _name_of(pid: int) -> str:
    return f"{socket.gethostname()}-{pid}"


def _write(file: int, content: Mapping[str, object]) -> None:
    stamped = {"at": datetime.now(UTC).isoformat(timespec="microseconds"), **content}
    # The leading line break ends whatever a crash or a full disk tore off before.
    line = b"\n" + json.dumps(stamped).encode() + b"\n"
    torn = len(line) // 2 if faults.armed("mid-ledger-line") else 0
    if torn:
        os.write(file, line[:torn])
        faults.reach("mid-ledger-line")
    if os.write(file, line[torn:]) != len(line) - torn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_events(run: RunFolder) -> list[Event]:
    """Return all events of a run in the order of their times; torn or foreign lines are skipped."""
    files = sorted(run.ledger.glob("*.jsonl")) if run.ledger.is_dir() else []
    return sorted((event for file in files for event in _events(file)), key=lambda event: event.at)


def _events(file: Path) -> Iterator[Event]:
    process = file.stem
    for content in _lines(file):
        kind = _KINDS.get(str(content.get("kind")))
        if kind is not None:
            texts = {name: str(content[name]) for name in _WRITTEN if name != "kind" and name in content}
            yield Event(kind, **texts, process=process)


def _lines(file: Path) -> Iterator[dict[str, object]]:
    for line in file.read_bytes().split(b"\n"):
        try:
            content = from_json(line) if line else None
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content


def is_abandoned(run: RunFolder, state: TaskState) -> bool:
    """Tell whether ``state`` is running but the process that said so has ended (as far as this host can know)."""
    if state.status != "running":
        return False
    for content in _lines(run.ledger / f"{state.process}.jsonl"):
        owner = Owner.parse(content.get("owner"))
        if owner is not None:
            return owner.is_dead() is True
    return False


def fold(run: RunFolder) -> dict[str, TaskState]:
    """Return the state of every task of which ``run`` has an event."""
    return fold_events(read_events(run))


def fold_events(events: Iterable[Event]) -> dict[str, TaskState]:
    """Return the state of every task named by ``events``, which are in order of time."""
    states: dict[str, TaskState] = {}
    for event in events:
        if event.task and event.kind in _STATUS:
            states[event.task] = _after(states.get(event.task, TaskState()), event)
    return states


def _is_late(state: TaskState, event: Event) -> bool:
    """Tell whether ``event`` ends somebody else's attempt at a task that is finished: two commands may share a run."""
    finished = state.status in ("done", "reused")
    return finished and event.attempt != state.attempt and event.kind in (Kind.INTERRUPTED, Kind.ATTEMPT_FAILED)


_STATUS = {
    Kind.TASK_STARTED: "running",
    Kind.ATTEMPT_FAILED: "waiting",
    Kind.TASK_FINISHED: "done",
    Kind.TASK_FAILED: "failed",
    Kind.INTERRUPTED: "interrupted",
}


def _after(state: TaskState, event: Event) -> TaskState:
    if _is_late(state, event):
        return state
    return TaskState(
        status=event.status or _STATUS[event.kind],
        attempts=state.attempts + (event.kind is Kind.TASK_STARTED),
        attempt=event.attempt or state.attempt,
        error_class=event.error_class,
        error=event.error,
        device=event.device or state.device,
        since=event.at,
        process=event.process,
    )
