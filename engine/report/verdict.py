"""What a run came to in a few figures, and which of its tasks to look at first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .rows import ModelRow
from .tables import counted

_STATUS = {"failed": 0, "interrupted": 1}
_GATE = {"fail": 0, "warn": 1}


@dataclass(frozen=True)
class RunFacts:
    """What a page tells of a run beside its rows."""

    run: str
    """The run's folder."""
    job: str
    store: str = ""
    """The store that the run belongs to."""
    wall_s: float | None = None
    """Seconds in which some process was at the run; None where no event tells."""
    rest: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tasks without a result by status: waiting, running or interrupted."""
    log_tails: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The last lines of the logs of failed tasks, by task."""


@dataclass(frozen=True)
class Worst:
    """The worst figure of a kind, and the task that it belongs to."""

    task: str
    value: float


@dataclass(frozen=True)
class Totals:
    """The figures above everything else."""

    models: int
    tasks: int
    statuses: Mapping[str, int]
    gates: Mapping[str, int]
    """Tasks by pass, warn and fail."""
    bytes_before: int
    """Of the tasks that have both sizes, like the next; a model counts once a task."""
    bytes_after: int
    worst_drop: Worst | None
    """Top-1 points lost; None without labels."""
    worst_agreement: Worst | None
    """0-1, among tasks without labels."""
    task_s: float
    """Seconds spent in tasks, all workers together."""

    @property
    def ratio(self) -> float | None:
        """How many times smaller everything became."""
        return self.bytes_before / self.bytes_after if self.bytes_after else None


def totals(rows: Sequence[ModelRow]) -> Totals:
    """Return the totals of ``rows``, one a task."""
    sized = [(row.bytes_before, row.bytes_after) for row in rows if row.bytes_before and row.bytes_after]
    drops = [Worst(row.task, drop) for row in rows if (drop := top1_drop(row)) is not None]
    agreed = [Worst(row.task, row.agreement) for row in rows if row.agreement is not None and row.top1_after is None]
    return Totals(
        models=len({row.model for row in rows}),
        tasks=len(rows),
        statuses=Counter(row.status for row in rows),
        gates=Counter(row.gate for row in rows if row.gate not in (None, "none")),
        bytes_before=sum(before for before, _ in sized),
        bytes_after=sum(after for _, after in sized),
        worst_drop=max(drops, key=lambda worst: worst.value, default=None),
        worst_agreement=min(agreed, key=lambda worst: worst.value, default=None),
        task_s=sum(task_seconds(row) or 0.0 for row in rows),
    )


def top1_drop(row: ModelRow) -> float | None:
    """Return the points of top-1 accuracy that were lost, None without labels."""
    return None if row.top1_before is None or row.top1_after is None else row.top1_before - row.top1_after


def task_seconds(row: ModelRow) -> float | None:
    """Return the seconds of a task's steps together, None where none is known."""
    spent = [value for value in (row.read_s, row.compress_s, row.write_s, row.evaluate_s) if value is not None]
    return sum(spent) if spent else None


def worst_first(rows: Sequence[ModelRow]) -> list[ModelRow]:
    """Return failed tasks first, then closed gates, warnings, and the others by what they lost."""
    return sorted(rows, key=_badness)


def _badness(row: ModelRow) -> tuple[int, int, float, float]:
    drop = top1_drop(row)
    agreement = 1.0 if row.agreement is None else row.agreement
    return _STATUS.get(row.status, 2), _GATE.get(row.gate or "", 2), -(drop or 0.0), agreement


def headline(found: Totals, rest: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """Return how it went, ``bad``, ``warn`` or ``good``, and the same in a sentence."""
    failed, closed, warned = found.statuses.get("failed", 0), found.gates.get("fail", 0), found.gates.get("warn", 0)
    left = sum(len(tasks) for tasks in rest.values())
    said = [
        f"{counted(failed, 'task')} failed" if failed else "",
        f"{counted(closed, 'gate')} closed" if closed else "",
        f"{counted(warned, 'gate')} warned" if warned else "",
        f"{counted(left, 'task')} without a result" if left else "",
    ]
    text = ", ".join(part for part in said if part)
    if not found.tasks:
        return "warn", text or "nothing has run yet"
    mood = "bad" if failed or closed else "warn" if text else "good"
    return mood, text or f"{'all ' if found.tasks > 1 else ''}{counted(found.tasks, 'task')} done"


def duration(seconds: float | None) -> str:
    """Return ``seconds`` as people say it: 8.2 s, 3 min 20 s, 7 h 5 min."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(number: int | None) -> str:
    """Return bytes in the unit that suits them, powers of 1024."""
    if number is None:
        return ""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    decimals = 0 if units[0] == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f} {units[0]}"
