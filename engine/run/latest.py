"""Publishing: the pointers of a store follow what tasks leave, unless a gate is closed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from ..artifact.latest import Latest, read_latest
from ..errors import ArtifactError, StorageError
from ..report.rows import ModelRow
from .store import Store

PERIOD_S = 5.0


class Publisher:
    """Moves pointers while a run goes on, every PERIOD_S seconds, and for all rows at its end.

    So what a worker kept but could not tell a scheduler that died is published by the command that resumes the run.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._due = store, 0.0
        self._seen: set[tuple[str, str]] = set()
        self.moved: list[str] = []
        """Tasks whose pointer was moved, in the order of that."""
        self.problem = ""
        """Why a pointer could not be moved at the end; empty where all could."""

    def update(self, rows: Iterable[ModelRow]) -> None:
        """Publish what is new among ``rows`` if it is time to; what cannot be written is tried again at the end."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + PERIOD_S
            self._publish(rows)

    def settle(self, rows: Iterable[ModelRow]) -> None:
        """Publish all of ``rows`` that are not yet."""
        self.problem = self._publish(rows)

    def _publish(self, rows: Iterable[ModelRow]) -> str:
        for row in rows:
            if (row.task, row.attempt) in self._seen:
                continue
            try:
                moved = publish(self._store, row)
            except StorageError as error:
                return str(error)
            self._seen.add((row.task, row.attempt))
            self.moved += [row.task] if moved else []
        return ""


def publish(store: Store, row: ModelRow) -> bool:
    """Let the pointer of the row's task name its artifact; tell whether it was moved.

    It stays where the task has no artifact or its gate is closed, where it names this artifact already, and where it
    was set by a task that ended later, which is how a resumed run leaves alone what newer runs have published. Of two
    that write at once one wins whole. Raises StorageError.
    """
    if row.status not in ("done", "reused") or row.gate == "fail" or row.artifact is None or row.key is None:
        return False
    file = store.latest / row.model / row.bit_plan
    try:
        held = read_latest(file)
    except ArtifactError:  # none yet, or spoilt
        held = None
    if held is not None and (held.artifact == row.artifact or _is_later(held, row)):
        return False
    Latest(row.key, row.artifact, row.run, row.finished_at).write(file)
    return True


def _is_later(held: Latest, row: ModelRow) -> bool:
    """Tell whether the pointer is of a later task; a clock that was once ahead must not hold it for ever."""
    return row.finished_at < held.finished_at <= datetime.now(UTC)
