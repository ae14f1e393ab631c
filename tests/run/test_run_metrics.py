"""The Prometheus textfile, read back by Prometheus's own parser."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dfmpc.errors import StorageError
from dfmpc.report.rows import ModelRow
from dfmpc.run.metrics import MetricsSnapshot, write_metrics
from prometheus_client.parser import text_string_to_metric_families

NOON = datetime(2025, 1, 2, 12, tzinfo=UTC)
HOSTILE = 'a "job"\\n of\ntwo lines, größer {x="1"}'


def _row(model: str, plan: str, status: str = "done", **fields: object) -> ModelRow:
    return ModelRow("r", f"{model}/{plan}", model, plan, "rtn", status, NOON, **fields)  # type: ignore[arg-type]


def _snapshot(**changes: object) -> MetricsSnapshot:
    rows = [
        _row("a", "r4", bytes_before=1000, bytes_after=100, read_s=1.5, compress_s=2.0, write_s=0.25, evaluate_s=0.5),
        _row("a", "r8", "reused", bytes_before=1000, bytes_after=300, read_s=0.5),
        _row("b", "r4", "failed", bytes_before=50, error_class="CheckpointError", read_s=3.0),
        _row("c", "r4", "failed", error_class="CheckpointError"),
        _row("d", "r4", "failed", error_class="WorkerDiedError"),
    ]
    fields = {"tasks": {"done": 1, "reused": 1, "failed": 3, "running": 2}, "workers": 2, "rows": rows} | changes
    return MetricsSnapshot(run="2025-r", job=HOSTILE, started=NOON, **fields)  # type: ignore[arg-type]


def _samples(file: Path) -> dict[tuple[str, tuple[str, ...]], float]:
    families = list(text_string_to_metric_families(file.read_text()))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation and family.type != "unknown" for family in families)
    return {
        (sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def test_figures_of_a_run_at_work(tmp_path: Path) -> None:
    file = tmp_path / "dfmpc.prom"
    write_metrics(file, _snapshot())
    assert _samples(file) == {
        ("dfmpc_run_info", ("2025-r", HOSTILE)): 1,
        ("dfmpc_run_start_time_seconds", ()): NOON.timestamp(),
        ("dfmpc_run_finished", ()): 0,
        ("dfmpc_workers", ()): 2,
        ("dfmpc_tasks", ("waiting",)): 0,
        ("dfmpc_tasks", ("running",)): 2,
        ("dfmpc_tasks", ("done",)): 1,
        ("dfmpc_tasks", ("reused",)): 1,
        ("dfmpc_tasks", ("failed",)): 3,
        ("dfmpc_tasks", ("interrupted",)): 0,
        ("dfmpc_failures", ("CheckpointError",)): 2,
        ("dfmpc_failures", ("WorkerDiedError",)): 1,
        ("dfmpc_bytes_read_total", ()): 1050,
        ("dfmpc_bytes_before", ()): 2000,
        ("dfmpc_bytes_after", ()): 400,
        ("dfmpc_task_seconds_total", ("read",)): 5.0,
        ("dfmpc_task_seconds_total", ("compress",)): 2.0,
        ("dfmpc_task_seconds_total", ("write",)): 0.25,
        ("dfmpc_task_seconds_total", ("evaluate",)): 0.5,
    }


def test_the_end_replaces_what_was_there_and_everybody_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "dfmpc.prom"
    before = os.umask(0o077)
    try:
        write_metrics(file, _snapshot())
        write_metrics(file, _snapshot(exit_code=3, rows=[], tasks={}, workers=0))
    finally:
        os.umask(before)
    found = _samples(file)
    assert (found["dfmpc_run_finished", ()], found["dfmpc_exit_code", ()], found["dfmpc_workers", ()]) == (1, 3, 0)
    assert not any(name == "dfmpc_failures" for name, _ in found)
    assert file.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["dfmpc.prom"]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent: cannot be written"):
        write_metrics(tmp_path / "absent" / "dfmpc.prom", _snapshot())
