"""What a worker does for one model: its tasks, one after the other, each ending in a row whatever happens."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from ...artifact.commit import commit, discard, new_attempt
from ...artifact.key import TaskKey
from ...artifact.loader import load
from ...artifact.manifest import Manifest, damage, read_manifest
from ...artifact.writer import write_artifact
from ...compress.compress import compress_model
from ...compress.result import Compressed
from ...errors import DeviceError, DfmpcError, StorageError
from ...evaluate.gates import check_gates
from ...evaluate.scores import evaluate_artifact
from ...evaluate.settings import settings_for
from ...job.expand import Task
from ...models.factory import AllowList
from ...report.parts import write_part
from ...report.rows import LayerRow, ModelRow
from ..ledger import Event, Kind, Ledger
from ..messages import Started, TaskOutcome, WorkerSettings
from ..outcome import bare_row, failed, layer_rows, with_manifest, with_scores
from ..shared import SharedModel
from ..store import RunFolder, Store
from .attempt_log import attempt_log, log_traceback
from .explain import why_not_reused
from .memory import peak_bytes, reset_peak


@dataclass(frozen=True)
class GroupContext:
    """What the tasks of a group need from their worker."""

    settings: WorkerSettings
    ledger: Ledger
    announce: Callable[[Started], None]
    """Called when an attempt begins."""

    @property
    def run(self) -> RunFolder:
        """The run that the tasks belong to."""
        return RunFolder(self.settings.run)

    @property
    def store(self) -> Store:
        """The store that the artifacts go to."""
        return self.run.store


def run_group(tasks: Sequence[Task], context: GroupContext) -> Iterator[TaskOutcome]:
    """Do ``tasks``, all of one model, in order; yield each one's outcome once its row, log and events are kept.

    A task that fails gives a failed row and the next one goes on; a model that does not load fails all its tasks.
    """
    allow = AllowList.default(context.settings.allow_code)
    shared = SharedModel(tasks[0].model, allow, context.settings.device, context.settings.threads)
    for task in tasks:
        yield _Attempt(task, context, shared).run()


@dataclass
class _Timer:
    """Seconds of the parts of one attempt."""

    compress_s: float = 0.0
    write_s: float = 0.0
    evaluate_s: float = 0.0


class _Attempt:
    """One try at a task."""

    def __init__(self, task: Task, context: GroupContext, shared: SharedModel) -> None:
        self.task, self.context, self.shared = task, context, shared
        self.id = uuid.uuid4().hex[:12]
        self.timer = _Timer()
        self.row = bare_row(context.run, task, "interrupted", self.id, context.settings.device)
        self.explanation = ""
        self.problem = ""
        self.poisoned = False

    def run(self) -> TaskOutcome:
        """Do it, and keep what came of it."""
        self.context.announce(Started(self.task.id, self.id))
        self._record(Event(Kind.TASK_STARTED, task=self.task.id, attempt=self.id, device=self._device))
        row, layers = self._in_log()
        row = self._keep(self._measured(row), layers)
        finished = Kind.TASK_FAILED if row.status == "failed" else Kind.TASK_FINISHED
        self._record(
            Event(
                finished,
                task=row.task,
                attempt=self.id,
                status=row.status,
                error_class=row.error_class or "",
                error=row.error or "",
                device=self._device,
            )
        )
        return TaskOutcome(row, self.explanation, self.problem, self.poisoned)

    def _in_log(self) -> tuple[ModelRow, list[LayerRow]]:
        try:
            with attempt_log(self.context.run.log_file(self.task.model.name, self.task.plan.name, self.id)):
                return self._guarded()
        except StorageError as error:
            return self._failed(error), []

    def _guarded(self) -> tuple[ModelRow, list[LayerRow]]:
        reset_peak()
        _reset_device_peak(self._device)
        try:
            return self._do()
        except DfmpcError as error:
            log_traceback(error)
            return self._failed(error), []
        except Exception as error:  # noqa: BLE001 - a bug in one task, or foreign code's error, must not stop a night's run
            log_traceback(error)
            self.poisoned = _sticks(error)
            return self._failed(_device_failure(self._device, error) if self.poisoned else error), []

    def _do(self) -> tuple[ModelRow, list[LayerRow]]:
        key = self.shared.key(self.task)
        folder = self.context.store.artifact_folder(self.task.model.name, self.task.plan.name, key.key)
        seconds: dict[str, float] = {}
        reused = folder.exists() and not damage(folder)
        if not reused:
            self.explanation = why_not_reused(folder, key)
            self.problem = self.explanation if folder.exists() else ""
            seconds = self._make(key)
        manifest = read_manifest(folder)
        row = replace(self.row, status="reused" if reused else "done")
        self.row = with_manifest(row, manifest, self.context.store.root, folder, self.shared.inputs().size)
        self.row = self._evaluated(self.row, manifest)
        return self.row, layer_rows(self.row, manifest, seconds)

    def _make(self, key: TaskKey) -> dict[str, float]:
        """Compress, write and commit; return the seconds of each layer."""
        model = self.shared.model()
        started = time.perf_counter()
        threads = self.context.settings.threads
        compressed = compress_model(model, self.task.plan, self.task.layers, self._device, threads)
        self.timer.compress_s = time.perf_counter() - started
        started = time.perf_counter()
        self._write(key, compressed)
        self.timer.write_s = time.perf_counter() - started
        return {item.layer.name: item.seconds for item in compressed.layers}

    def _write(self, key: TaskKey, compressed: Compressed) -> None:
        store = self.context.store
        attempt = new_attempt(store.root, key.key)
        try:
            write_artifact(attempt, model=self.shared.model(), compressed=compressed, task=self.task, key=key)
            commit(attempt, store.artifact_folder(self.task.model.name, self.task.plan.name, key.key))
        except BaseException:
            discard(attempt)
            raise

    def _evaluated(self, row: ModelRow, manifest: Manifest) -> ModelRow:
        settings, store = self.context.settings, self.context.store
        started = time.perf_counter()
        scores = evaluate_artifact(
            artifact=lambda: load(store.root / str(row.artifact), allow_code=settings.allow_code),
            original=self.shared.original,
            settings=settings_for(settings.evaluate, self.task.model, manifest.input_shape, settings.seed),
            store=store.root,
            artifact_key=manifest.key,
            model_key=self.shared.model_key(),
            device=self._device,
        )
        self.timer.evaluate_s = time.perf_counter() - started
        return with_scores(row, scores, check_gates(settings.gates, scores))

    def _measured(self, row: ModelRow) -> ModelRow:
        read_s, timer = self.shared.take_seconds(), self.timer
        spent = read_s + timer.compress_s + timer.write_s
        made = row.status == "done" and row.bytes_before is not None
        return replace(
            row,
            finished_at=datetime.now(UTC),
            read_s=read_s,
            compress_s=timer.compress_s,
            write_s=timer.write_s,
            evaluate_s=timer.evaluate_s,
            gb_per_s=row.bytes_before / spent / 1e9 if made and row.bytes_before and spent else None,
            peak_host_bytes=peak_bytes(),
            peak_device_bytes=_peak_device_bytes(self._device),
        )

    def _keep(self, row: ModelRow, layers: list[LayerRow]) -> ModelRow:
        """Write the report part; where even that fails, the row says so and goes to the scheduler alone."""
        try:
            write_part(self.context.run.path, row, layers, self.id)
        except StorageError as error:
            self.problem = str(error)
            return row if row.status == "failed" else self._failed(error)
        return row

    def _record(self, event: Event) -> None:
        try:
            self.context.ledger.append(event)
        except StorageError as error:
            self.problem = self.problem or str(error)

    def _failed(self, error: BaseException) -> ModelRow:
        return failed(self.row, error)

    @property
    def _device(self) -> str:
        return self.context.settings.device


def _sticks(error: Exception) -> bool:
    """Tell whether a device error has made this process useless for the device."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("CUDA error", "Triton Error"))


def _device_failure(device: str, error: Exception) -> DeviceError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DeviceError(f"{device} failed in mid-task: {said}; run again with --retry-failed, or on other --devices")


def _reset_device_peak(device: str) -> None:
    if device.startswith("cuda") and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # bare in torch
        torch.cuda.reset_peak_memory_stats(device)


def _peak_device_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None
