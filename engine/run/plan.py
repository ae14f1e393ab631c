"""What a job would run, without starting or writing anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..artifact.manifest import is_complete
from ..errors import ModelError
from ..job.expand import expand
from ..job.loader import LoadedJob
from ..job.task import Task
from ..models.factory import AllowList
from .predict import free_bytes, predicted_artifact_bytes
from .schedule.devices import device_slots
from .shared import ModelKeys
from .sizes import predicted_host_bytes, source_bytes
from .store import Store


@dataclass(frozen=True)
class PlanRow:
    """One task."""

    task: str
    checkpoint_bytes: int
    predicted_bytes: int
    """Of the artifact: an upper estimate, see predict.py."""
    predicted_memory_bytes: int
    """Of a worker, see ``predicted_host_bytes``."""
    finished: bool
    """The artifact is in the store and will be reused."""


@dataclass(frozen=True)
class PlanTotals:
    """Sums over the tasks; a model's checkpoint counts once."""

    tasks: int
    finished: int
    checkpoint_bytes: int
    predicted_bytes: int
    """Of the artifacts that are not there yet."""
    largest_memory_bytes: int
    free_bytes: int
    """On the output's disk."""


@dataclass(frozen=True)
class Plan:
    """What a job would do; ``problems`` are what would make tasks fail, as far as that can be seen now."""

    rows: list[PlanRow]
    totals: PlanTotals
    problems: list[str]


def make_plan(loaded: LoadedJob, allow_code: Sequence[str] = ()) -> Plan:
    """Return what running ``loaded`` would do. Reads every input once, for its digest; no code of a model runs.

    Raises UsageError where ``resources.devices`` names a device that is not there.
    """
    device = device_slots(loaded.job.resources.devices)[0]
    groups: dict[str, list[Task]] = {}
    for task in expand(loaded):
        groups.setdefault(task.model.name, []).append(task)
    allow, threads = AllowList.default(allow_code), loaded.job.resources.threads
    problems: list[str] = []
    rows = [
        row
        for tasks in groups.values()
        for row in _group_rows(loaded, tasks, ModelKeys(tasks[0].model, allow, device, threads), problems)
    ]
    totals = PlanTotals(
        tasks=len(rows),
        finished=sum(row.finished for row in rows),
        checkpoint_bytes=sum(source_bytes(tasks[0].model) for tasks in groups.values()),
        predicted_bytes=sum(row.predicted_bytes for row in rows if not row.finished),
        largest_memory_bytes=max(row.predicted_memory_bytes for row in rows),
        free_bytes=free_bytes(loaded.store),
    )
    return Plan(rows, totals, problems + _limits(loaded, rows, totals))


def _group_rows(loaded: LoadedJob, tasks: Sequence[Task], shared: ModelKeys, problems: list[str]) -> Iterator[PlanRow]:
    """Yield the rows of one model's tasks; what would fail them goes to ``problems``."""
    source = tasks[0].model
    store, size = Store(loaded.store), source_bytes(source)
    try:
        keys = {task.id: shared.key(task).key for task in tasks}
    except ModelError as error:
        problems.append(f"{source.name}: {error}")
        keys = {}
    for task in tasks:
        key = keys.get(task.id)
        yield PlanRow(
            task=task.id,
            checkpoint_bytes=size,
            predicted_bytes=predicted_artifact_bytes(task),
            predicted_memory_bytes=predicted_host_bytes(size, [task.plan]),
            finished=key is not None and is_complete(store.artifact_folder(source.name, task.plan.name, key)),
        )


def _limits(loaded: LoadedJob, rows: Sequence[PlanRow], totals: PlanTotals) -> list[str]:
    found = []
    if totals.predicted_bytes > totals.free_bytes:
        found.append(
            f"{loaded.store}: {totals.free_bytes} bytes are free, the artifacts may take {totals.predicted_bytes}"
        )
    limit = loaded.job.resources.host_memory
    return found + [
        f"{row.task}: predicted to need {row.predicted_memory_bytes} bytes of memory, host_memory is {limit:.0f}"
        for row in rows
        if limit is not None and row.predicted_memory_bytes > limit
    ]
