"""A job from its file to its report: which run, which tasks, which workers, and the exit code at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..artifact.attempts import sweep
from ..errors import HostMemoryError, InterruptedRunError, StorageError
from ..job.expand import Task, choose, expand
from ..job.loader import LoadedJob
from ..report.parts import read_models
from ..report.rows import ModelRow
from ..report.tables import counted
from .ledger import Event, Kind, Ledger
from .messages import WorkerSettings
from .resume import JoinedRun, create_or_join_run
from .rules import unmatched_rules
from .schedule.devices import device_slots
from .schedule.dispatch import Dispatcher
from .schedule.interrupts import Interrupts
from .schedule.progress import Progress
from .schedule.slots import make_slots
from .shards import Shard
from .sizes import predicted_host_bytes, source_bytes
from .store import FrozenRun, Store, freeze

_GIB = 2**30
FAILED = 3
"""Exit code of a run with failed tasks or a closed gate."""


@dataclass(frozen=True)
class RunOptions:
    """What a command line adds to a job file."""

    only: str | None = None
    """fnmatch pattern over task ids (MODEL/PLAN)."""
    retry_failed: bool = False
    devices: str | None = None
    """Replaces resources.devices: auto, cpu, cuda or names separated by commas."""
    allow_code: tuple[str, ...] = ()
    """Module prefixes or folders added to the allow-list of factories."""
    progress: bool = True
    explain: bool = False
    """Collect why tasks were not reused."""
    shard: Shard | None = None
    """Do this part of the list only."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. ``exit_code``: 0 all done or reused, 3 failed tasks or a closed gate, 75 interrupted."""

    run: Path
    rows: list[ModelRow]
    exit_code: int
    explanations: list[str] = field(default_factory=list)
    resumed: bool = False
    unmatched: list[str] = field(default_factory=list)
    """The layer rules that match no layer, a sentence each; they were said on stderr too."""


def run_job(loaded: LoadedJob, options: RunOptions = RunOptions()) -> RunSummary:
    """Run a job: resume the unfinished run of the same tasks, or start one, and see every task to its row.

    Raises UsageError where nothing can start: no task matches ``only``, a device is not there, the output cannot be
    written. What fails later is in the rows.
    """
    tasks = choose(expand(loaded), options.only)
    devices = device_slots(options.devices or _devices_of(loaded))
    store = Store(loaded.store)
    store.prepare()
    frozen = freeze(loaded, tasks)
    joined = create_or_join_run(store, frozen, retry_failed=options.retry_failed)
    if options.shard is not None:
        joined = joined.part(options.shard)
    with Interrupts() as interrupts:
        dispatcher = _carry_out(loaded, joined, frozen, devices, options, interrupts)
        summary = _summary(joined, frozen, dispatcher, options)
    for text in summary.unmatched:
        print(f"dfmpc: warning: {text}", file=sys.stderr)
    return summary


def _devices_of(loaded: LoadedJob) -> str | list[str]:
    return loaded.job.resources.devices


def sweep_leftovers(store: Store, progress: Progress) -> None:
    """Remove attempts of dead processes; what cannot be removed (another user's) is said and blocks nothing."""
    try:
        sweep(store.root)
    except StorageError as error:
        progress.note(f"warning: leftovers stay: {error}")


def _carry_out(
    loaded: LoadedJob,
    joined: JoinedRun,
    frozen: FrozenRun,
    devices: Sequence[str],
    options: RunOptions,
    interrupts: Interrupts,
) -> Dispatcher:
    resources, ledger = loaded.job.resources, Ledger(joined.run)
    settings = WorkerSettings(
        run=joined.run.path,
        device="cpu",
        threads=resources.threads,
        allow_code=options.allow_code,
        evaluate=frozen.evaluate,
        gates=frozen.gates,
        seed=frozen.seed,
        parent=0,
    )
    sizes = {task.id: source_bytes(task.model) for task in joined.open_tasks}
    progress = Progress(sizes, shown=options.progress)
    dispatcher = Dispatcher(joined.run, make_slots(devices, settings), ledger, progress, resources.task_timeout)
    try:
        if joined.resumed:
            progress.note(f"goes on with run {joined.run.path}: {counted(len(joined.open_tasks), 'task')} to do")
        sweep_leftovers(joined.run.store, progress)
        dispatcher.record(Event(Kind.RUN_STARTED))
        groups = _refuse_large(dispatcher, grouped(joined.open_tasks, sizes), sizes, resources.host_memory)
        dispatcher.work(groups, interrupts)
        if _left(joined, dispatcher):
            sweep_leftovers(joined.run.store, progress)
            progress.note(_interrupted_text(joined, dispatcher, interrupts))
        else:  # a signal that comes after the last task interrupts nothing
            dispatcher.record(Event(Kind.RUN_FINISHED))
    finally:
        progress.close()
        ledger.close()
    return dispatcher


def grouped(tasks: Sequence[Task], sizes: Mapping[str, int]) -> list[list[Task]]:
    """Return the tasks by model, the largest model first: the last worker to finish then has little left."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.model.name, []).append(task)
    return sorted(groups.values(), key=lambda group: -sizes[group[0].id])


def _refuse_large(
    dispatcher: Dispatcher, groups: list[list[Task]], sizes: Mapping[str, int], limit: float | None
) -> list[list[Task]]:
    """Fail the tasks of models that would not fit into ``limit`` bytes; return the other groups."""
    fitting = []
    for group in groups:
        predicted = predicted_host_bytes(sizes[group[0].id], [task.plan for task in group])
        if limit is None or predicted <= limit:
            fitting.append(group)
            continue
        error = HostMemoryError(
            f"{group[0].model.name} is predicted to need {predicted / _GIB:.2f} GiB of memory "
            "(4 x checkpoint + 600 MB, 2 GB more for recipes that forward images), "
            f"resources.host_memory is {limit / _GIB:.2f} GiB: raise it, or leave the model out"
        )
        for task in group:
            dispatcher.fail(task, error)
    return fitting


def _left(joined: JoinedRun, dispatcher: Dispatcher) -> int:
    return sum(task.id not in dispatcher.settled for task in joined.open_tasks)


def _interrupted_text(joined: JoinedRun, dispatcher: Dispatcher, interrupts: Interrupts) -> str:
    left = counted(_left(joined, dispatcher), "task")
    error = InterruptedRunError(
        f"interrupted by {interrupts.received} with {left} left; what is finished is kept, "
        f"the same command resumes {joined.run.path}"
    )
    return str(error)


def _summary(joined: JoinedRun, frozen: FrozenRun, dispatcher: Dispatcher, options: RunOptions) -> RunSummary:
    interrupted = _left(joined, dispatcher) > 0
    # a row that a full disk kept out of the report is still in memory
    rows = {row.task: row for row in read_models(joined.run.path)} | dispatcher.rows
    ordered = [rows[task.id] for task in joined.tasks if task.id in rows]
    incomplete = interrupted or any(task.id not in rows for task in frozen.tasks)
    return RunSummary(
        run=joined.run.path,
        rows=ordered,
        exit_code=InterruptedRunError.exit_code if interrupted else exit_code_of(ordered),
        explanations=dispatcher.explanations if options.explain else [],
        resumed=joined.resumed,
        unmatched=[] if incomplete else unmatched_rules(joined.run.path, frozen.tasks[0].layers),
    )


def exit_code_of(rows: Sequence[ModelRow]) -> int:
    """Return 3 where a task failed or a gate is closed, else 0."""
    return FAILED if any(row.status == "failed" or row.gate == "fail" for row in rows) else 0
