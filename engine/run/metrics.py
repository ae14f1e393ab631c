"""A run's figures for Prometheus, as a file that node_exporter's textfile collector picks up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..artifact.storage import replacing
from ..report.rows import ModelRow

STATUSES = ("waiting", "running", "done", "reused", "failed", "interrupted")
_PHASES = ("read", "compress", "write", "evaluate")
_KEPT = ("done", "reused")


@dataclass(frozen=True)
class MetricsSnapshot:
    """How a run stands. ``exit_code`` is None until it has ended."""

    run: str
    job: str
    started: datetime
    """When this command began, with its time zone."""
    tasks: Mapping[str, int]
    """Tasks by status; the words are ``STATUSES``, and one that is left out counts none."""
    workers: int
    """Worker processes that live."""
    rows: Sequence[ModelRow]
    """The newest row of every task that has ended."""
    exit_code: int | None = None


@dataclass(frozen=True)
class _Metric:
    name: str
    kind: str
    text: str
    samples: Sequence[tuple[Mapping[str, str], float]]


def write_metrics(path: Path, snapshot: MetricsSnapshot) -> None:
    """Write ``snapshot`` to ``path`` in Prometheus's text format, whole or not at all, readable by everybody.

    The collector reads files whose name ends in ``.prom``. Raises StorageError where the file system refuses.
    """
    with replacing(path) as draft:  # and not brought to the disk: it is written again in seconds
        draft.write_bytes(metrics_text(snapshot).encode())
        draft.chmod(0o644)


def metrics_text(snapshot: MetricsSnapshot) -> str:
    """Return ``snapshot`` in Prometheus's text format (version 0.0.4)."""
    return "".join(f"{line}\n" for metric in _metrics(snapshot) for line in _lines(metric))


def _metrics(snapshot: MetricsSnapshot) -> list[_Metric]:
    code, rows = snapshot.exit_code, snapshot.rows
    kept = [row for row in rows if row.status in _KEPT]
    read = {row.model: row.bytes_before or 0 for row in rows}
    failures = Counter(row.error_class or "" for row in rows if row.status == "failed")
    return [
        _Metric("dfmpc_run_info", "gauge", "Run and job.", [({"run": snapshot.run, "job": snapshot.job}, 1)]),
        _one("dfmpc_run_start_time_seconds", "gauge", "When the command began.", snapshot.started.timestamp()),
        _one("dfmpc_run_finished", "gauge", "1 once the command has ended.", int(code is not None)),
        _Metric("dfmpc_exit_code", "gauge", "Exit code, once it has.", [] if code is None else [({}, code)]),
        _one("dfmpc_workers", "gauge", "Worker processes that live.", snapshot.workers),
        _Metric(
            "dfmpc_tasks",
            "gauge",
            "Tasks by status.",
            [({"status": name}, snapshot.tasks.get(name, 0)) for name in STATUSES],
        ),
        _Metric(
            "dfmpc_failures",
            "gauge",
            "Failed tasks by class of error.",
            [({"error_class": name}, count) for name, count in sorted(failures.items())],
        ),
        _one("dfmpc_bytes_read_total", "counter", "Bytes of checkpoints, each model's once.", sum(read.values())),
        _one("dfmpc_bytes_before", "gauge", "Checkpoints of finished tasks.", _total(kept, "bytes_before")),
        _one("dfmpc_bytes_after", "gauge", "Artifacts of finished tasks, in bytes.", _total(kept, "bytes_after")),
        _Metric(
            "dfmpc_task_seconds_total",
            "counter",
            "Seconds that workers spent on tasks, by phase.",
            [({"phase": phase}, _total(rows, f"{phase}_s")) for phase in _PHASES],
        ),
    ]


def _one(name: str, kind: str, text: str, value: float) -> _Metric:
    return _Metric(name, kind, text, [({}, value)])


def _total(rows: Sequence[ModelRow], column: str) -> float:
    return sum(getattr(row, column) or 0 for row in rows)


def _lines(metric: _Metric) -> Iterator[str]:
    yield f"# HELP {metric.name} {metric.text}"
    yield f"# TYPE {metric.name} {metric.kind}"
    for labels, value in metric.samples:
        inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
        yield f"{metric.name}{{{inside}}} {value}" if inside else f"{metric.name} {value}"


def _escaped(text: str) -> str:
    """Return a label's value as the format wants it; a lone surrogate of a file's name has no UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
