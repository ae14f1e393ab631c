"""Which run a command belongs to, and which of its tasks are still to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..job.task import Task
from ..report.parts import read_models
from ..report.rows import ModelRow
from .claims import FIRST, start_run
from .ledger import TaskState, fold
from .shards import Shard, models_of
from .store import FrozenRun, RunFolder, Store, same_list


@dataclass(frozen=True)
class JoinedRun:
    """A run, new or found, and what is left of it."""

    run: RunFolder
    open_tasks: tuple[Task, ...]
    resumed: bool
    """False where this process made the run."""
    tasks: tuple[Task, ...]
    """What the command answers for: the whole list, or the part that is its shard's."""
    bytes: Mapping[str, int]
    """Size of each model's input files by its name, as the run has them frozen: the same for everybody who joins."""

    def part(self, shard: Shard) -> JoinedRun:
        """Return the same run with the shard's tasks only, open ones too."""
        own = models_of(shard, [task.model.name for task in self.tasks], self.bytes)
        return replace(
            self,
            open_tasks=tuple(task for task in self.open_tasks if task.model.name in own),
            tasks=tuple(task for task in self.tasks if task.model.name in own),
        )


def create_or_join_run(store: Store, frozen: FrozenRun, *, retry_failed: bool = False) -> JoinedRun:
    """Join the newest unfinished run of the same list, else start one: exactly one, whoever else does so now.

    A run is unfinished while any task of its list is open, whichever shard the task belongs to. With ``retry_failed``
    the newest run of the list is joined even if it is finished, where it has failed tasks. Failed tasks of a joined
    run are open only then. Raises UsageError where the file system has no hard links, StorageError where it cannot be
    written.
    """
    newest = next(same_list(store, frozen), None)
    if newest is not None and (open_tasks := _left_over(newest, frozen, retry_failed)):
        return _joined(newest, open_tasks)
    started = start_run(store, frozen, after=newest.run_id if newest else FIRST)
    if started.made:
        return _joined(started.run, tuple(frozen.tasks), resumed=False)
    return _joined(started.run, _left_over(started.run, frozen, retry_failed))


def _joined(run: RunFolder, open_tasks: tuple[Task, ...], *, resumed: bool = True) -> JoinedRun:
    frozen = run.frozen()
    return JoinedRun(run, open_tasks, resumed, tuple(frozen.tasks), frozen.bytes)


def _left_over(run: RunFolder, frozen: FrozenRun, retry_failed: bool) -> tuple[Task, ...]:
    """Return what ``run`` has left to do: nothing where its report is torn or of another version."""
    try:
        return tuple(_open_tasks(run, frozen, fold(run), retry_failed))
    except UsageError:
        return ()


def _open_tasks(run: RunFolder, frozen: FrozenRun, states: Mapping[str, TaskState], retry_failed: bool) -> list[Task]:
    rows = {row.task: row for row in read_models(run.path)}
    return [
        task
        for task in frozen.tasks
        if not _is_settled(run, states.get(task.id, TaskState()), rows.get(task.id), retry_failed)
    ]


def _is_settled(run: RunFolder, state: TaskState, row: ModelRow | None, retry_failed: bool) -> bool:
    if state.status == "failed":  # without a row (the disk refused it) nobody would ever hear of it
        return not retry_failed and row is not None
    if state.status not in ("done", "reused") or row is None or row.artifact is None:
        return False
    return (run.store.root / row.artifact / "manifest.json").is_file()
