"""Whatever is wrong with the report at the end of a run, the work is kept and told."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.loader import load_job
from dfmpc.report.rows import ModelRow
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.summary import RunSummary

PLANS: list[dict[str, object]] = [
    {"name": "r4", "method": "rtn", "bits": 4},
    {"name": "r8", "method": "rtn", "bits": 8},
]


def test_a_report_that_cannot_be_read_at_the_end_costs_no_row_of_this_command(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(run: Path) -> list[ModelRow]:
        raise UsageError(f"{run / 'report'}: torn or unreadable part of the report")

    job = bench.job([bench.model("net")], PLANS)
    monkeypatch.setattr("dfmpc.run.scheduler.read_models", unreadable)
    summary = run_job(load_job(job), RunOptions(progress=False, devices="cpu"))
    assert {row.task: row.status for row in summary.rows} == {"net/r4": "done", "net/r8": "done"}
    assert summary.exit_code == 3
    assert "torn or unreadable part of the report" in summary.unpublished


def test_a_task_that_left_no_row_is_done_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.job([bench.model("net")], PLANS)
    with monkeypatch.context() as patched:
        patched.setattr("dfmpc.run.schedule.tally.Tally._settle", lambda self, row: self.settled.add(row.task))
        patched.setattr("dfmpc.run.scheduler.read_models", lambda _: [])
        first = run_job(load_job(job), RunOptions(progress=False, devices="cpu"))
    assert (first.exit_code, first.rows) == (75, [])
    assert first.stopped == "2 tasks left no row; the same command does them again"


def test_the_metrics_of_a_resumed_run_count_what_was_done_before(bench: Any) -> None:
    job = bench.job([bench.model("bad", "raises_a_bug"), bench.model("good")], PLANS[:1])
    assert run_job(load_job(job), RunOptions(progress=False, devices="cpu")).exit_code == 3
    metrics = bench.folder / "run.prom"
    run_job(load_job(job), RunOptions(progress=False, devices="cpu", metrics=metrics, retry_failed=True))
    assert 'dfmpc_tasks{status="done"} 1' in metrics.read_text()
    assert 'dfmpc_tasks{status="failed"} 1' in metrics.read_text()


def test_a_signal_that_comes_at_the_very_end_ends_nothing(bench: Any) -> None:
    seen = []

    def signalled(summary: RunSummary) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        seen.append(summary.exit_code)

    job = bench.job([bench.model("net")], PLANS[:1])
    summary = run_job(load_job(job), RunOptions(progress=False, devices="cpu"), telling=lambda: signalled)
    assert (seen, summary.exit_code) == ([0], 0)
