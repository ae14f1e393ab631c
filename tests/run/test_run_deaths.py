"""Workers that hang or are killed cost the task they were at, and nothing else."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import StorageError
from dfmpc.job.loader import load_job
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.ledger import Kind, fold, read_events
from dfmpc.run.schedule.roster import REST_S
from dfmpc.run.status import read_status
from dfmpc.run.store import RunFolder

PLANS: list[dict[str, object]] = [
    {"name": "r4", "method": "rtn", "bits": 4},
    {"name": "r8", "method": "rtn", "bits": 8},
]


def test_a_hung_worker_fails_one_task_and_a_killed_one_none(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        bench.model("good"),
        bench.model("hangs", "blocks_once", str(bench.folder / "hung")),
        bench.model("dies", "dies_once", str(bench.folder / "died")),
    ]
    # a worker's first task imports torch, which takes ten seconds here and three times as many on a busy machine
    job = bench.job(models, PLANS, resources={"task_timeout": "60s"})
    first = run_job(load_job(job), RunOptions(progress=False, devices="cpu,cpu"))
    assert first.exit_code == 3
    assert {row.task: (row.status, row.error_class) for row in first.rows} == {
        "good/r4": ("done", None),
        "good/r8": ("done", None),
        "hangs/r4": ("failed", "TaskTimeoutError"),
        "hangs/r8": ("done", None),
        "dies/r4": ("done", None),
        "dies/r8": ("done", None),
    }
    errors = {row.task: row for row in first.rows if row.error}
    assert "not finished after 60 s (resources.task_timeout)" in str(errors["hangs/r4"].error)
    assert (errors["hangs/r4"].failure, errors["hangs/r4"].attempts) == ("timeout", 1)
    log = f"logs/hangs/r4/{errors['hangs/r4'].attempt}.log"
    assert log in str(errors["hangs/r4"].error)
    assert (first.run / log).is_file()
    assert [event.kind for event in read_events(RunFolder(first.run))].count(Kind.WORKER_DIED) == 1
    assert list((bench.store / ".attempts").iterdir()) == []
    assert read_status(first.run).finished
    told = capsys.readouterr().err
    assert "dies/r4: host-oom, tried again alone: the worker (process" in told
    assert "was ended by SIGKILL" in told

    again = run_job(load_job(job), RunOptions(progress=False, retry_failed=True))
    assert again.run == first.run
    assert (again.exit_code, {row.status for row in again.rows}) == (0, {"done"})
    attempts = {task: state.attempts for task, state in fold(RunFolder(first.run)).items()}
    assert attempts == {"good/r4": 1, "good/r8": 1, "hangs/r4": 2, "hangs/r8": 1, "dies/r4": 2, "dies/r8": 1}


def test_a_model_beyond_the_memory_limit_is_not_started(bench: Any) -> None:
    job = bench.job([bench.model("good")], PLANS, resources={"devices": "cpu", "host_memory": "0.5GiB"})
    summary = run_job(load_job(job), RunOptions(progress=False))
    assert summary.exit_code == 3
    assert {row.error_class for row in summary.rows} == {"HostMemoryError"}
    needed = "predicted to need 0.56 GiB of memory (4 x checkpoint + 600 MB, 2 GB more for recipes that forward images)"
    assert f"{needed}, resources.host_memory is 0.50 GiB" in str(summary.rows[0].error)
    assert {state.attempts for state in fold(RunFolder(summary.run)).values()} == {0}


def test_where_no_worker_can_be_started_the_run_stops_and_a_rerun_does_it_all(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = []

    def no_process(*_: object) -> None:
        tries.append(time.monotonic())
        raise BlockingIOError(11, "Resource temporarily unavailable")

    job = bench.job([bench.model("a"), bench.model("b")], PLANS)
    with monkeypatch.context() as patched:
        patched.setattr("dfmpc.run.schedule.slots.WorkerProcess", no_process)
        summary = run_job(load_job(job), RunOptions(progress=False, devices="cpu"))
    assert (summary.exit_code, summary.rows) == (75, [])
    assert summary.stopped.startswith("stopped, as nobody is left to work: no worker could be started on cpu")
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert all(gap >= rest for gap, rest in zip(gaps, REST_S, strict=True)), (
        "what keeps a worker from starting may pass"
    )
    assert "4 tasks left" in capsys.readouterr().err

    again = run_job(load_job(job), RunOptions(progress=False, devices="cpu"))
    assert (again.run, again.exit_code, {row.status for row in again.rows}) == (summary.run, 0, {"done"})


def test_a_failure_whose_row_the_disk_refused_is_open_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise StorageError("no space")

    job = bench.job([bench.model("bad", "raises_a_bug"), bench.model("good")], PLANS[:1])
    with monkeypatch.context() as patched:
        patched.setattr("dfmpc.run.schedule.tally.write_part", refused)
        first = run_job(load_job(job), RunOptions(progress=False, devices="cpu"))
    assert first.exit_code == 3
    again = run_job(load_job(job), RunOptions(progress=False, devices="cpu"))
    assert (again.run, again.exit_code) == (first.run, 3)
    assert {row.task: row.status for row in again.rows} == {"bad/r4": "failed", "good/r4": "done"}


def test_leftovers_that_cannot_be_removed_are_told_and_block_nothing(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(store: Path) -> None:
        raise StorageError(f"{store}: permission denied")

    monkeypatch.setattr("dfmpc.run.scheduler.sweep", refused)
    summary = run_job(load_job(bench.job([bench.model("a")], PLANS[:1])), RunOptions(progress=False, devices="cpu"))
    assert (summary.exit_code, summary.rows[0].status) == (0, "done")
    assert f"warning: leftovers stay: {bench.store}: permission denied" in capsys.readouterr().err
