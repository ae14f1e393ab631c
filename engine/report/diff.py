"""Two runs side by side: what is new, gone, better and worse, task by task."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from .rows import ModelRow
from .tables import Table, TableColumn, counted, render

Kind = Literal["same", "changed", "new", "gone"]
_RESULT = ("done", "reused")
_MIB = 2**20
_SLACK = 1e-9
"""What decimal figures may lose in binary."""


@dataclass(frozen=True)
class Thresholds:
    """How much worse a task may get before that is a regression. None: not looked at."""

    top1_drop: float = 0.5
    """Points."""
    agreement_drop: float = 0.01
    """0-1."""
    sqnr_drop: float = 1.0
    """dB, of the logits."""
    growth: float = 1.0
    """Per cent, of the artifact's bytes and of the bits a weight."""
    slowdown: float | None = None
    """Per cent, of the seconds to read, compress and write; for tasks that both runs compressed."""


@dataclass(frozen=True)
class RunRows:
    """A run: its folder, its newest rows, and the names of all its tasks."""

    folder: str
    rows: Sequence[ModelRow]
    tasks: Sequence[str]


@dataclass(frozen=True)
class Change:
    """One figure of a task in both runs; None: not known."""

    name: str
    """As the report's column is called; ``seconds`` is read_s + compress_s + write_s."""
    before: float | str | None
    after: float | str | None
    regression: bool = False
    """It got worse by more than its threshold."""
    excess: float = 0.0
    """By how many times its threshold it got worse."""


@dataclass(frozen=True)
class TaskDiff:
    """One task: ``kind``, its status in both runs (empty where it is in one only), and what changed, worst first."""

    task: str
    kind: Kind
    status_before: str
    status_after: str
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be compared, and why."""

    @property
    def regressed(self) -> bool:
        """True where a change is beyond its threshold."""
        return any(change.regression for change in self.changes)


@dataclass(frozen=True)
class Diff:
    """All tasks of both runs, the worst first, those without a difference last."""

    before: str
    after: str
    """The runs' folders."""
    thresholds: Thresholds
    tasks: tuple[TaskDiff, ...]

    @property
    def regressions(self) -> int:
        """How many tasks got worse by more than a threshold."""
        return sum(task.regressed for task in self.tasks)


def diff_rows(before: RunRows, after: RunRows, thresholds: Thresholds) -> Diff:
    """Compare two runs, task by task.

    A task of a run without a row there counts as waiting. Worse than a threshold, and so a regression: a figure, a
    task that had a result and has none, and a gate that closed. What is gone or new is none by itself.
    """
    old, new = (_by_task(run) for run in (before, after))
    found = [
        _one_sided(name, old, new) if (name in old) != (name in new) else _task(name, old[name], new[name], thresholds)
        for name in dict.fromkeys([*before.tasks, *after.tasks])
    ]
    return Diff(before.folder, after.folder, thresholds, tuple(sorted(found, key=_rank)))


def _by_task(run: RunRows) -> dict[str, ModelRow | None]:
    """Return the row of every task; None where there is none yet."""
    rows = {row.task: row for row in run.rows}
    return {name: rows.get(name) for name in run.tasks}


def _rank(task: TaskDiff) -> tuple[float, ...]:
    worst = max((change.excess for change in task.changes if change.regression), default=0.0)
    return (-worst, ("gone", "changed", "new", "same").index(task.kind))


def _one_sided(name: str, old: Mapping[str, ModelRow | None], new: Mapping[str, ModelRow | None]) -> TaskDiff:
    if name in new:
        return TaskDiff(name, "new", "", _status(new[name]))
    return TaskDiff(name, "gone", _status(old[name]), "")


def _task(name: str, old: ModelRow | None, new: ModelRow | None, thresholds: Thresholds) -> TaskDiff:
    before, after = _status(old), _status(new)
    changes, notes = [*_status_change(before, after)], list[str]()
    if old is not None and new is not None and before in _RESULT and after in _RESULT:
        changes += _figures(old, new, thresholds, notes)
    elif before == after:
        notes.append(f"{before} in both runs")
    changes.sort(key=lambda change: (not change.regression, -change.excess))
    return TaskDiff(name, "changed" if changes else "same", before, after, tuple(changes), tuple(notes))


def _status(row: ModelRow | None) -> str:
    return "waiting" if row is None else row.status


def _status_change(before: str, after: str) -> Iterator[Change]:
    if (before in _RESULT) != (after in _RESULT) or (before not in _RESULT and before != after):
        lost = before in _RESULT
        yield Change("status", before, after, lost, math.inf if lost else 0.0)


def _figures(old: ModelRow, new: ModelRow, limits: Thresholds, notes: list[str]) -> Iterator[Change]:
    if old.gate != new.gate and "fail" in (old.gate, new.gate):
        closed = new.gate == "fail"
        yield Change("gate", old.gate, new.gate, closed, math.inf if closed else 0.0)
    yield from _drop("top1_after", old, new, limits.top1_drop, notes)
    if old.measured_on == new.measured_on:
        yield from _drop("agreement", old, new, limits.agreement_drop, notes)
        yield from _sqnr(old, new, limits.sqnr_drop)
    else:
        notes.append(f"measured on {old.measured_on}, then on {new.measured_on}: agreement and SQNR not compared")
    for name in ("bytes_after", "bits_per_weight"):
        yield from _growth(name, getattr(old, name), getattr(new, name), limits.growth)
    if old.status == new.status == "done":
        yield from _growth("seconds", _seconds(old), _seconds(new), limits.slowdown)


def _drop(name: str, old: ModelRow, new: ModelRow, limit: float, notes: list[str]) -> Iterator[Change]:
    before, after = getattr(old, name), getattr(new, name)
    if before is None or after is None:
        if before is not None or after is not None:
            notes.append(f"{name} is known of the {'first' if after is None else 'second'} run only")
        return
    if before != after:
        yield _change(name, before, after, before - after, limit)


def _sqnr(old: ModelRow, new: ModelRow, limit: float) -> Iterator[Change]:
    """Null beside an agreement is infinite: the logits did not change."""
    before, after = old.logit_sqnr_db, new.logit_sqnr_db
    if before == after or old.agreement is None or new.agreement is None:
        return
    worse = math.inf if before is None else -math.inf if after is None else before - after
    yield _change("logit_sqnr_db", before, after, worse, limit)


def _growth(name: str, before: float | None, after: float | None, limit: float | None) -> Iterator[Change]:
    if before is None or after is None or before == after or limit is None:
        return
    yield _change(name, before, after, 100 * (after - before) / before if before else math.inf, limit)


def _change(name: str, before: float | None, after: float | None, worse: float, limit: float) -> Change:
    regression = worse > limit + _SLACK
    return Change(name, before, after, regression, worse / limit if limit else math.inf if worse > 0 else 0.0)


def _seconds(row: ModelRow) -> float | None:
    spent = [value for value in (row.read_s, row.compress_s, row.write_s) if value is not None]
    return sum(spent) if spent else None


_SHOWN: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "top1_after": ("top-1 %", lambda value: f"{value:.2f}"),
    "agreement": ("agreement", lambda value: f"{value:.4f}"),
    "logit_sqnr_db": ("logit SQNR dB", lambda value: f"{value:.2f}"),
    "bytes_after": ("MiB", lambda value: f"{value / _MIB:.3f}"),
    "bits_per_weight": ("bits a weight", lambda value: f"{value:.3f}"),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
}


def diff_text(diff: Diff) -> str:
    """Return a change a row, the worst tasks first, and the counts below."""
    lines = [line for task in diff.tasks for line in _lines(task)]
    titles = ("task", "", "what", "before", "after")
    columns = [TableColumn(title, right=title in ("before", "after")) for title in titles]
    table = [render(Table(tuple(columns), tuple(lines)))] if lines else []
    notes = [f"{task.task}: {note}" for task in diff.tasks for note in task.notes]
    counts = Counter(task.kind for task in diff.tasks)
    said = ", ".join(f"{counts[kind]} {kind}" for kind in ("same", "changed", "new", "gone") if counts[kind]) or "none"
    end = f"{counted(len(diff.tasks), 'task')}: {said}; {counted(diff.regressions, 'regression')}"
    return "\n".join([f"before: {diff.before}", f"after:  {diff.after}", *table, *notes, end])


def _lines(task: TaskDiff) -> Iterator[tuple[str, ...]]:
    if task.kind in ("new", "gone"):
        yield (task.task, task.kind, "status", task.status_before, task.status_after)
    for number, change in enumerate(task.changes):
        title, show = _SHOWN.get(change.name, (change.name, str))
        mark = "worse" if change.regression else ""
        cells = (_cell(change.name, value, show) for value in (change.before, change.after))
        yield (task.task if number == 0 else "", mark, title, *cells)


def _cell(name: str, value: float | str | None, show: Callable[[float], str]) -> str:
    if value is None:
        return "infinite" if name == "logit_sqnr_db" else "none"
    return value if isinstance(value, str) else show(value)


def diff_json(diff: Diff) -> str:
    """Return the same as one document; numbers that are infinite are null."""
    tasks = [{**asdict(task), "regressed": task.regressed} for task in diff.tasks]
    for task in tasks:
        for change in task["changes"]:
            change["excess"] = change["excess"] if math.isfinite(change["excess"]) else None
    document = {
        "before": diff.before,
        "after": diff.after,
        "thresholds": asdict(diff.thresholds),
        "regressions": diff.regressions,
        "counts": dict(Counter(task.kind for task in diff.tasks)),
        "tasks": tasks,
    }
    return json.dumps(document, indent=1)
