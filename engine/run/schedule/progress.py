"""How a run shows that it lives: a bar weighted by bytes on a terminal, else a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

INTERVAL_S = 30.0
_MIB = 2**20


class Progress:
    """Counts finished tasks by the bytes of their models; everything goes to stderr."""

    def __init__(self, weights: Mapping[str, int], *, shown: bool) -> None:
        self._weights, self._done_tasks, self._done_bytes = weights, 0, 0
        self._total = sum(weights.values())
        self._tasks: list[str] = []
        self._lines = shown and not sys.stderr.isatty()
        self._due = time.monotonic() + INTERVAL_S
        self._bar = tqdm(
            total=self._total, unit="B", unit_scale=True, file=sys.stderr, disable=not shown or self._lines
        )

    @property
    def wait_s(self) -> float | None:
        """Seconds until the next line is due; None where no lines are written."""
        return max(0.0, self._due - time.monotonic()) if self._lines else None

    def running(self, tasks: list[str]) -> None:
        """Show which tasks are at work, on a bar at once; writes a line where one is due."""
        if tasks != self._tasks:
            self._tasks = tasks
            self._bar.set_postfix_str(" ".join(tasks), refresh=True)
        if self._lines and time.monotonic() >= self._due:
            self._due = time.monotonic() + INTERVAL_S
            self.note(f"{self._counts()}; at work: {', '.join(tasks) or 'none'}")

    def finished(self, task: str) -> None:
        """Count a task as settled."""
        self._done_tasks += 1
        self._done_bytes += self._weights.get(task, 0)
        self._bar.update(self._weights.get(task, 0))

    def note(self, text: str) -> None:
        """Write a line to stderr without breaking the bar; shown always."""
        with tqdm.external_write_mode(file=sys.stderr):
            print(f"dfmpc: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar."""
        self._bar.close()

    def _counts(self) -> str:
        done, total = self._done_bytes / _MIB, self._total / _MIB
        return f"{self._done_tasks} of {len(self._weights)} tasks, {done:.0f} of {total:.0f} MiB"
