"""Signals to a real command: what is finished stays, nothing half-written remains, the same command resumes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dfmpc.job.loader import load_job
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.schedule.progress import Progress
from dfmpc.run.status import read_status

PLANS: list[dict[str, object]] = [{"name": "r4", "method": "rtn", "bits": 4}]
LIMIT_S = 120.0


def _command(job: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dfmpc.cli", "run", str(job), "--json", "--grace", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background may have SIGINT ignored, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - one thread
    )


def _blocked_worker(fifo: Path) -> int:
    """Wait until the blocking factory has said its process's number, and return it."""
    pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready, _, _ = select.select([pipe], [], [], LIMIT_S)
        assert ready, "the blocking factory was not reached"
        return int(os.read(pipe, 100))
    finally:
        os.close(pipe)


def _job_that_blocks(bench: Any) -> tuple[Path, Path]:
    """Return a job whose first model (the larger file) finishes and whose second blocks while the FIFO exists."""
    fifo = bench.folder / "fifo"
    os.mkfifo(fifo)
    large = bench.checkpoint("first", bench.state("plain", 16))
    models = [bench.model("second", "blocks_while", str(fifo)), bench.model("first", "plain", 16, checkpoint=large)]
    return bench.job(models, PLANS, resources={"devices": "cpu"}), fifo


def _wait_for_one_done(store: Path) -> None:
    """The second task begins while the worker's finisher may still have the first."""
    end = time.monotonic() + LIMIT_S
    while read_status(store).done < 1:
        assert time.monotonic() < end, "the first task was not finished"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_command_exits_75_and_resumes(bench: Any, number: signal.Signals) -> None:
    job, fifo = _job_that_blocks(bench)
    command = _command(job)
    worker = _blocked_worker(fifo)
    _wait_for_one_done(bench.store)
    command.send_signal(number)
    out, err = command.communicate(timeout=LIMIT_S)
    assert command.returncode == 75
    assert f"interrupted by {number.name}; 1 task left" in err
    assert "the same command resumes" in err
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    before = {row["task"]: row for row in json.loads(out)["models"]}
    assert {task: row["status"] for task, row in before.items()} == {"first/r4": "done", "second/r4": "interrupted"}
    assert list((bench.store / ".attempts").iterdir()) == []
    status = read_status(bench.store)
    assert (status.done, status.interrupted, status.finished) == (1, 1, False)

    fifo.unlink()
    resumed = _command(job)
    out, err = resumed.communicate(timeout=LIMIT_S)
    assert resumed.returncode == 0, err
    assert f"dfmpc: goes on with run {status.run}: 1 task to do\n" in err
    after = {row["task"]: row for row in json.loads(out)["models"]}
    assert {row["status"] for row in after.values()} == {"done"}
    assert after["first/r4"] == before["first/r4"]
    assert [run.name for run in (bench.store / "runs").glob("[!.]*")] == [status.run.name]


def test_a_signal_after_the_last_task_interrupts_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished_then_signalled(self: Progress, task: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "finished", finished_then_signalled)
    job = bench.job([bench.model("only")], PLANS, resources={"devices": "cpu"})
    summary = run_job(load_job(job, allows=lambda _: True), RunOptions(progress=False))
    assert ([row.status for row in summary.rows], summary.exit_code) == (["done"], 0)
    assert read_status(bench.store).finished


def test_a_killed_scheduler_takes_its_workers_along_and_leaves_a_run_that_says_so(bench: Any) -> None:
    job, fifo = _job_that_blocks(bench)
    command = _command(job)
    worker = os.pidfd_open(_blocked_worker(fifo))
    _wait_for_one_done(bench.store)
    assert read_status(bench.store).running == 1
    command.kill()
    command.communicate(timeout=LIMIT_S)
    ended, _, _ = select.select([worker], [], [], LIMIT_S)
    os.close(worker)
    assert ended, "the worker outlived its scheduler"
    status = read_status(bench.store)
    assert (status.done, status.interrupted, status.running, status.finished) == (1, 1, 0, False)
