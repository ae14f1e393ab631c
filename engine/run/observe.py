"""How a run looks from outside while it goes on: the metrics file, written again every few seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..errors import StorageError
from ..report.rows import ModelRow
from .metrics import MetricsSnapshot, write_metrics
from .schedule.tally import Tally

PERIOD_S = 5.0


class MetricsFile:
    """Writes ``path`` at most every PERIOD_S seconds, and at the end; without a path nothing. Errors are told once."""

    def __init__(self, path: Path | None, run: str, job: str, tasks: int, before: Sequence[ModelRow] = ()) -> None:
        """``before`` are the rows that a resumed run has already; ``tasks`` counts theirs too."""
        self._before = before
        self._path, self._run, self._job, self._tasks = path, run, job, tasks
        self._started, self._due, self._told = datetime.now(UTC), 0.0, False

    def update(self, tally: Tally, running: int, workers: int) -> None:
        """Write how the run stands if it is time to."""
        if self._path is not None and time.monotonic() >= self._due:
            self._due = time.monotonic() + PERIOD_S
            self._write(tally, [*self._before, *tally.rows.values()], running, workers, None)

    def finish(self, tally: Tally, rows: Iterable[ModelRow], exit_code: int) -> None:
        """Write how it ended."""
        if self._path is not None:
            self._write(tally, rows, 0, 0, exit_code)

    def _write(self, tally: Tally, rows: Iterable[ModelRow], running: int, workers: int, exit_code: int | None) -> None:
        kept = list(rows)
        counts = Counter(row.status for row in kept)
        waiting = max(0, self._tasks - len(kept) - running)
        tasks = {**{str(status): count for status, count in counts.items()}, "running": running, "waiting": waiting}
        snapshot = MetricsSnapshot(self._run, self._job, self._started, tasks, workers, kept, exit_code)
        try:
            write_metrics(self._path or Path(), snapshot)
        except StorageError as error:
            if not self._told:
                self._told = True
                tally.progress.note(f"warning: --metrics: {error}")
