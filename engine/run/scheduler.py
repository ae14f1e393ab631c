"""Tasks from their run to its report: which run, which are open, which workers, and the exit code at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from ..artifact.attempts import sweep
from ..errors import InterruptedRunError, StorageError, UsageError
from ..job.loader import LoadedJob
from ..job.task import Task
from ..report.compact import compact
from ..report.parts import read_models
from ..report.rows import ModelRow
from ..report.tables import counted
from .filesystem import check_filesystem
from .latest import Publisher
from .ledger import Event, Kind, Ledger
from .messages import WorkerSettings
from .observe import MetricsFile
from .preflight import disk_preflight, starting
from .publish import Published, publish_versions
from .resume import JoinedRun, create_or_join_run
from .rules import unmatched_rules
from .schedule.board import Board
from .schedule.deadline import Deadline, parse_deadline
from .schedule.dispatch import Dispatcher, Limits
from .schedule.intake import items_of, refuse_large
from .schedule.interrupts import Interrupts
from .schedule.progress import Progress
from .schedule.reserve import Promises, available_host_bytes
from .schedule.slots import make_slots
from .schedule.spares import Spares
from .schedule.tally import Rules, Tally
from .shards import array_note, models_of
from .store import FrozenRun, Store, freeze
from .summary import RunOptions, RunSummary
from .vanished import Vanished, note_vanished

if TYPE_CHECKING:
    from .cluster.ray import RayDispatcher
    from .cluster.ray_cluster import RayCluster

_GIB = 2**30
FAILED = 3
"""Exit code of a run with failed tasks or a closed gate."""


def run_tasks(
    loaded: LoadedJob,
    tasks: Sequence[Task],
    options: RunOptions,
    spares: Spares,
    ray: RayCluster | None,
    signals: ExitStack,
) -> RunSummary:
    """See ``tasks`` to their rows; signals are caught from where the run exists, for as long as ``signals`` is open.

    Raises what ``begin.run_job`` does.
    """
    store, end = Store(loaded.store), parse_deadline(options.deadline, os.environ)
    with starting(store):
        store.prepare()
        check_filesystem(store.root)
        if options.preflight:
            disk_preflight(store, tasks)
        frozen = freeze(loaded, tasks)
        if options.shard is not None and not models_of(options.shard, frozen.bytes, frozen.bytes):
            # more shards than models: one that comes late must not begin the next run for nothing
            return RunSummary(store.root, [], 0)
        joined = create_or_join_run(store, frozen, retry_failed=options.retry_failed)
    if options.shard is not None:
        joined = joined.part(options.shard)
    interrupts = signals.enter_context(Interrupts())
    run = _Run(loaded, joined, frozen, options, Deadline(end, options.grace_s), ray)
    return run.summary(run.carry_out(spares, interrupts))


def sweep_leftovers(store: Store, progress: Progress) -> None:
    """Remove attempts of dead processes; what cannot be removed (another user's) is said and blocks nothing."""
    try:
        sweep(store.root)
    except StorageError as error:
        progress.note(f"warning: leftovers stay: {error}")


class _Run:
    """This command's part of a run, from its open tasks to its summary."""

    def __init__(
        self,
        loaded: LoadedJob,
        joined: JoinedRun,
        frozen: FrozenRun,
        options: RunOptions,
        deadline: Deadline,
        ray: RayCluster | None,
    ) -> None:
        self._loaded, self._ray = loaded, ray
        self._joined, self._frozen, self._options, self._deadline = joined, frozen, options, deadline
        self._resources, self._store = loaded.job.resources, joined.run.store
        self._rules = loaded.job.layers
        self._ledger = Ledger(joined.run)
        sizes = {task.id: joined.bytes.get(task.model.name, 0) for task in joined.open_tasks}
        self._progress = Progress(sizes, shown=options.progress)
        self._board = Board(items_of(joined.open_tasks, sizes))
        rules = Rules(cpu_fallback=self._resources.cpu_fallback)
        self._tally = Tally(joined.run, self._board, self._ledger, self._progress, deadline, rules)
        self._publisher, self._vanished, self._unreadable = Publisher(self._store), Vanished(), ""
        before = [row for row in self._rows().values() if row.task not in sizes]
        self._metrics = MetricsFile(options.metrics, joined.run.run_id, frozen.job, len(joined.tasks), before)

    def carry_out(self, spares: Spares, interrupts: Interrupts) -> str:
        """Do the open tasks; return why some are left, empty where none is."""
        try:
            self._begin()
            spares.close(but=len({item.model for item in self._board.items()}))
            stopped = self._dispatcher(spares).work(interrupts) if self._board else ""
            sweep_leftovers(self._store, self._progress)
            if stopped:
                self._progress.note(self._interrupted_text(stopped))
            else:  # a signal that comes after the last task interrupts nothing
                self._finish()
        finally:
            spares.close()
            self._progress.close()
            self._ledger.close()
        return stopped

    def _finish(self) -> None:
        """Close the run, or our part of it while other shards are at theirs."""
        run = self._joined.run
        rows = self._rows()
        if self._unreadable or any(task.id not in rows for task in self._frozen.tasks):
            self._tally.record(Event(Kind.PART_FINISHED))
            return
        self._tally.record(Event(Kind.RUN_FINISHED))
        try:
            compact(run.path, lambda text: self._progress.note(f"warning: {text}"))
        except StorageError as error:
            self._progress.note(f"warning: the report stays in parts: {error}")

    def _rows(self) -> dict[str, ModelRow]:
        """Return what the report has, and what is in memory because a full disk kept it out of it."""
        try:
            kept = read_models(self._joined.run.path)
        except UsageError as error:
            self._unreadable, kept = str(error), []
        return {row.task: row for row in kept} | self._tally.rows

    def summary(self, stopped: str) -> RunSummary:
        """Return what came of this command's part of the list."""
        joined, tally = self._joined, self._tally
        rows = self._rows()
        ordered = [rows[task.id] for task in joined.tasks if task.id in rows]
        if not (stopped or self._unreadable) and len(ordered) < len(joined.tasks):
            stopped = (
                f"{counted(len(joined.tasks) - len(ordered), 'task')} left no row; the same command does them again"
            )
        incomplete = bool(stopped) or any(task.id not in rows for task in self._frozen.tasks)
        exit_code = InterruptedRunError.exit_code if stopped else exit_code_of(ordered)
        self._publisher.settle(ordered)
        made = Published([]) if stopped else publish_versions(self._loaded, self._store, joined.tasks, ordered)
        problem = "; ".join(text for text in (self._unreadable, self._publisher.problem, made.problem) if text)
        exit_code = exit_code or (FAILED if problem else 0)
        self._metrics.finish(tally, ordered, exit_code)
        return RunSummary(
            run=joined.run.path,
            rows=ordered,
            exit_code=exit_code,
            explanations=tally.explanations if self._options.explain else [],
            resumed=joined.resumed,
            unmatched=[] if incomplete else unmatched_rules(joined.run.path, self._rules),
            log_tails=tally.log_tails,
            stopped=stopped,
            published=self._publisher.moved,
            unpublished=problem,
            registered=made.versions,
            vanished=self._vanished,
        )

    def _begin(self) -> None:
        joined = self._joined
        if joined.resumed:
            self._progress.note(f"goes on with run {joined.run.path}: {counted(len(joined.open_tasks), 'task')} to do")
        note = array_note(os.environ) if self._options.shard is None else None
        if note:
            self._progress.note(note)
        sweep_leftovers(self._store, self._progress)
        self._tally.record(Event(Kind.RUN_STARTED))
        if self._options.only is None:
            models = {task.model.name for task in self._frozen.tasks}
            try:
                self._vanished = note_vanished(joined.run, self._frozen.job, models)
            except StorageError as error:
                self._progress.note(f"warning: {error}")
        refuse_large(self._board, self._tally, self._resources.host_memory)

    def _dispatcher(self, spares: Spares) -> Dispatcher | RayDispatcher:
        resources, options, devices = self._resources, self._options, spares.devices
        host_bytes = resources.host_memory or available_host_bytes()
        settings = WorkerSettings(
            run=self._joined.run.path,
            device="cpu",
            threads=resources.threads,
            allow_code=options.allow_code,
            evaluate=self._frozen.evaluate,
            gates=self._frozen.gates,
            seed=self._frozen.seed,
            parent=0,
            readers=resources.reader_threads,
            read_ahead=(host_bytes or 16 * _GIB) / (2 * spares.per_device * len(devices)),
        )
        limits = Limits(resources.task_timeout, resources.stuck_after, options.grace_s)

        def observe(running: int, workers: int) -> None:
            self._metrics.update(self._tally, running, workers)
            self._publisher.update(self._tally.rows.values())

        if self._ray is not None:
            settings = replace(settings, device=devices[0])
            from .cluster.ray import RayDispatcher  # noqa: PLC0415 - every other run starts sooner without

            return RayDispatcher(self._ray, self._board, self._tally, self._deadline, limits, settings, observe)
        promises, slots = Promises(host_bytes, devices), make_slots(spares, settings)
        return Dispatcher(slots, self._board, self._tally, promises, self._deadline, limits, observe)

    def _interrupted_text(self, stopped: str) -> str:
        left = counted(len(self._board), "task")
        return f"{stopped}; {left} left; what is finished is kept, the same command resumes {self._joined.run.path}"


def exit_code_of(rows: Sequence[ModelRow]) -> int:
    """Return 3 where a task failed or a gate is closed, else 0."""
    return FAILED if any(row.status == "failed" or row.gate == "fail" for row in rows) else 0
