"""One try at a task: reused or made, evaluated, and handed to the finisher; torch comes in when something computes."""

from __future__ import annotations

import importlib
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...artifact.commit import commit, discard, new_attempt
from ...artifact.key import TaskKey
from ...artifact.manifest import Manifest, inspect
from ...errors import DeviceError, StorageError
from ...evaluate.cache import cached_scores
from ...evaluate.settings import settings_for
from ...job.task import Task
from ...report.rows import LayerRow, ModelRow
from ..failures import Failure, Mode, classify
from ..ledger import Event, Kind, Ledger
from ..messages import Send, Started, TaskOutcome, WorkerSettings
from ..outcome import bare_row, failed, judged, layer_rows, with_manifest, with_scores
from ..shared import SharedModel
from ..store import RunFolder, Store
from .attempt_log import append_traceback, attempt_log
from .explain import why_not_reused
from .finisher import Finisher
from .memory import peak_bytes, peak_device_bytes, reset_peak

if TYPE_CHECKING:
    from ...compress.result import Compressed
    from ...evaluate.cache import Scores
    from ...models.load import LoadedModel


make_module = f"{__package__}.make"


@dataclass(frozen=True)
class Context:
    """What attempts need from whoever makes them."""

    settings: WorkerSettings
    ledger: Ledger
    send: Send
    finisher: Finisher

    @cached_property
    def run(self) -> RunFolder:
        """The run that the tasks belong to."""
        return RunFolder(self.settings.run)

    @cached_property
    def store(self) -> Store:
        """The store that the artifacts go to."""
        return self.run.store


@dataclass
class _Made:
    """What an attempt has come to so far."""

    row: ModelRow
    layers: list[LayerRow] = field(default_factory=list)
    failure: Failure | None = None
    explanation: str = ""
    problem: str = ""
    refused: Exception | None = None
    """Why the artifact could not be committed."""
    compress_s: float = 0.0
    write_s: float = 0.0
    commit_s: float = 0.0
    evaluate_s: float = 0.0


class Attempt:
    """One try at ``task`` in the way of ``mode``; ``shared`` is its model, computing on the right device already."""

    def __init__(self, task: Task, mode: Mode, context: Context, shared: SharedModel) -> None:
        self.task, self.mode, self.context, self.shared = task, mode, context, shared
        self.id = uuid.uuid4().hex[:12]
        named = "cpu" if mode.on_cpu else context.settings.device
        self.made = _Made(bare_row(context.run, task, "interrupted", self.id, named))

    @property
    def device(self) -> str:
        """The device that computes, by torch's name."""
        return self.mode.device(self.context.settings.computes_on)

    def run(self) -> Failure | None:
        """Do it up to what the finisher does behind it; return the class of a failure that is known by now."""
        self.context.send(Started(self.task.id, self.id))
        if self._recorded(
            Event(Kind.TASK_STARTED, task=self.task.id, attempt=self.id, device=self.made.row.device or "")
        ):
            self._guarded()
        made = self._measured()
        self.context.finisher.put(lambda: self._end(made), lambda: self._log)
        return made.failure

    @property
    def _log(self) -> Path:
        return self.context.run.log_file(self.task.model.name, self.task.plan.name, self.id)

    def _guarded(self) -> None:
        reset_peak(self.device)
        try:
            self._do()
        except Exception as error:  # noqa: BLE001 - a bug in one task, or foreign code's error, must not stop a night's run
            append_traceback(self._log, error)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.made.failure = classify(error)
        if self.made.failure is Failure.POISONED:
            error = _device_failure(self.made.row.device or "", error)
        self.made.row = failed(self.made.row, error)

    def _do(self) -> None:
        key, made = self.shared.key(self.task), self.made
        folder = self.context.store.artifact_folder(self.task.model.name, self.task.plan.name, key.key)
        found = inspect(folder)
        if found.manifest is not None and not found.findings:
            self._reuse(found.manifest, folder)
            return
        made.explanation = why_not_reused(folder, key)
        made.problem = made.explanation if folder.exists() else ""
        with attempt_log(self._log):
            self._make(key, folder)

    def _reuse(self, manifest: Manifest, folder: Path) -> None:
        self._describe("reused", manifest, folder, folder)
        self._evaluate(manifest, folder, loaded=lambda: None)
        self.made.layers = layer_rows(self.made.row, manifest, {})

    def _make(self, key: TaskKey, target: Path) -> None:
        """Compress, and write into an attempt's folder; the finisher commits it while the network is evaluated."""
        self._bring_torch()
        from .make import compress  # noqa: PLC0415 - a run that only reuses goes without

        model = self.shared.model()
        started = time.perf_counter()
        compressed = compress(self.task, self.shared, self.device, self.context.settings.threads)
        self.made.compress_s = time.perf_counter() - started
        started = time.perf_counter()
        attempt = new_attempt(self.context.store.root, key.key)
        try:
            manifest = self._write(attempt, model, compressed, key)
            self._describe("done", manifest, target, attempt)
        except BaseException:
            _discard_quietly(attempt)
            raise
        self.made.write_s = time.perf_counter() - started
        self._evaluate_and_commit(manifest, attempt, target)
        self.made.layers = layer_rows(self.made.row, manifest, {it.layer.name: it.seconds for it in compressed.layers})

    def _write(self, attempt: Path, model: LoadedModel, compressed: Compressed, key: TaskKey) -> Manifest:
        from ...artifact.writer import write_artifact  # noqa: PLC0415 - the same

        return write_artifact(attempt, model=model, compressed=compressed, task=self.task, key=key)

    def _evaluate_and_commit(self, manifest: Manifest, attempt: Path, target: Path) -> None:
        """Have it committed once nothing reads it any more; it is whole even where its evaluation fails."""
        handed = False

        def hand_over() -> None:
            nonlocal handed
            if not handed:
                handed = True
                self.context.finisher.put(lambda: self._commit(attempt, target), lambda: self._log)

        try:
            self._evaluate(manifest, attempt, loaded=hand_over)
        finally:
            hand_over()

    def _bring_torch(self) -> None:
        """Import what computes, and let the task's time begin anew: those seconds are the process's, not the task's."""
        if make_module not in sys.modules:
            importlib.import_module(make_module)
            self.context.send(Started(self.task.id, self.id))

    def _describe(self, status: Literal["done", "reused"], manifest: Manifest, folder: Path, lies_in: Path) -> None:
        size = self.shared.inputs().size
        self.made.row = with_manifest(self.made.row, status, manifest, self.context.store.root, folder, lies_in, size)

    def _evaluate(self, manifest: Manifest, folder: Path, loaded: Callable[[], None]) -> None:
        """Add the scores, kept ones where there are; ``loaded`` is called once ``folder`` is no longer needed."""
        settings, started = self.context.settings, time.perf_counter()
        wanted = settings_for(settings.evaluate, self.task.model, manifest.input_shape, settings.seed)
        scores: Scores | None = cached_scores(wanted, store=self.context.store.root, artifact_key=manifest.key)
        if scores is None:
            self._bring_torch()
            from .make import evaluate  # noqa: PLC0415 - the same

            started = time.perf_counter()
            with attempt_log(self._log):
                scores = evaluate(
                    manifest,
                    folder,
                    self.shared,
                    wanted,
                    store=self.context.store.root,
                    worker=settings,
                    device=self.device,
                    divisor=self.mode.divisor,
                    loaded=loaded,
                )
        self.made.evaluate_s = time.perf_counter() - started
        self.made.row = with_scores(self.made.row, scores)

    def _commit(self, attempt: Path, target: Path) -> None:
        started = time.perf_counter()
        try:
            with self.context.finisher.bringing(_size_of(attempt)):
                commit(attempt, target)
        except Exception as error:  # noqa: BLE001 - it is this task's, whatever the worker is at by now
            self.made.refused = error
            append_traceback(self._log, error)
            _discard_quietly(attempt)
        self.made.commit_s = time.perf_counter() - started

    def _measured(self) -> _Made:
        self.made.row = replace(
            self.made.row,
            finished_at=datetime.now(UTC),
            read_s=self.shared.take_seconds(),
            peak_host_bytes=peak_bytes(),
            peak_device_bytes=peak_device_bytes(self.device),
        )
        return self.made

    def _end(self, made: _Made) -> None:
        """In the finisher, behind the commit: settle the row and have it kept and told."""
        if made.refused is not None and made.failure is None:
            made.row, made.failure, made.layers = failed(made.row, made.refused), classify(made.refused), []
        row = replace(
            made.row,
            compress_s=made.compress_s,
            write_s=made.write_s,
            commit_s=made.commit_s,
            evaluate_s=made.evaluate_s,
            gb_per_s=_rate(made),
        )
        own = self.task.gates
        row = judged(row, self.context.settings.gates if own is None else own)
        self.context.finisher.report(TaskOutcome(row, made.failure, made.explanation, made.problem), made.layers)

    def _recorded(self, event: Event) -> bool:
        """Append to the ledger; a full disk is said at the end, and anything else fails the attempt."""
        try:
            self.context.ledger.append(event)
        except StorageError as error:
            self.made.problem = self.made.problem or str(error)
        except Exception as error:  # noqa: BLE001 - it costs this task, not the worker
            append_traceback(self._log, error)
            self._fail(error)
            return False
        return True


def _rate(made: _Made) -> float | None:
    row, spent = made.row, (made.row.read_s or 0.0) + made.compress_s + made.write_s
    return row.bytes_before / spent / 1e9 if row.status == "done" and row.bytes_before and spent else None


def _device_failure(device: str, error: Exception) -> DeviceError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DeviceError(f"{device} failed in mid-task: {said}; run again with --retry-failed, or on other --devices")


def _size_of(attempt: Path) -> int:
    return sum(file.stat().st_size for file in attempt.iterdir())


def _discard_quietly(attempt: Path) -> None:
    try:
        discard(attempt)
    except StorageError:
        return  # the next run sweeps it
