"""Workers that hang or are killed cost the task they were at, and nothing else."""

from __future__ import annotations

from typing import Any

from dfmpc.job.loader import load_job
from dfmpc.run.ledger import Kind, fold, read_events
from dfmpc.run.scheduler import RunOptions, run_job
from dfmpc.run.status import read_status
from dfmpc.run.store import RunFolder

PLANS: list[dict[str, object]] = [
    {"name": "r4", "method": "rtn", "bits": 4},
    {"name": "r8", "method": "rtn", "bits": 8},
]


def test_hung_and_killed_workers_fail_one_task_each_and_a_retry_finishes_only_those(bench: Any) -> None:
    models = [
        bench.model("good"),
        bench.model("hangs", "blocks_once", str(bench.folder / "hung")),
        bench.model("dies", "dies_once", str(bench.folder / "died")),
    ]
    job = bench.job(models, PLANS, resources={"task_timeout": "10s"})
    first = run_job(load_job(job), RunOptions(progress=False, devices="cpu,cpu"))
    assert first.exit_code == 3
    assert {row.task: (row.status, row.error_class) for row in first.rows} == {
        "good/r4": ("done", None),
        "good/r8": ("done", None),
        "hangs/r4": ("failed", "TaskTimeoutError"),
        "hangs/r8": ("done", None),
        "dies/r4": ("failed", "WorkerDiedError"),
        "dies/r8": ("done", None),
    }
    errors = {row.task: row for row in first.rows if row.error}
    assert "not finished after 10 s (resources.task_timeout)" in str(errors["hangs/r4"].error)
    assert "was ended by SIGKILL" in str(errors["dies/r4"].error)
    log = f"logs/dies/r4/{errors['dies/r4'].attempt}.log"
    assert log in str(errors["dies/r4"].error)
    assert (first.run / log).is_file()
    assert [event.kind for event in read_events(RunFolder(first.run))].count(Kind.WORKER_DIED) == 1
    assert list((bench.store / ".attempts").iterdir()) == []
    assert read_status(first.run).finished

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
    assert "predicted to need 0.56 GiB of memory (4 x checkpoint + 600 MB), resources.host_memory is 0.50 GiB" in str(
        summary.rows[0].error
    )
    assert {state.attempts for state in fold(RunFolder(summary.run)).values()} == {0}
