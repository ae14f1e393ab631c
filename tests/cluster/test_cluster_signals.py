"""A cluster that stops a job signals all its processes, and the job's script hands the signal on: one request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dfmpc.run.cluster.options import Request
from dfmpc.run.cluster.slurm import render_slurm
from dfmpc.run.ledger import Kind, read_events
from dfmpc.run.schedule.interrupts import Interrupts
from dfmpc.run.status import read_status
from dfmpc.run.store import find_run

GRACE_S = 3


def test_signals_that_come_together_are_one_and_a_later_one_is_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dfmpc.run.schedule.interrupts.time.monotonic", lambda: clock[0])
    seen = []
    with Interrupts() as interrupts:
        for at, number in ((100.0, signal.SIGTERM), (100.9, signal.SIGUSR1), (101.1, signal.SIGUSR1)):
            clock[0] = at
            os.kill(os.getpid(), number)
            seen.append((interrupts.received, interrupts.again))
    assert seen == [("SIGTERM", False), ("SIGTERM", False), ("SIGTERM", True)]


def test_a_signal_to_every_process_of_a_job_leaves_its_task_the_grace(bench: Any) -> None:
    fifo = bench.folder / "fifo"
    os.mkfifo(fifo)
    model = bench.model("b", "blocks_while", str(fifo))
    job = bench.job([model], [{"name": "r4", "method": "rtn", "bits": 4}], resources={"devices": "cpu"})
    command = (sys.executable, "-m", "dfmpc.cli")
    request = Request(job=str(job), name="job", folder=str(bench.folder), command=command, grace_s=GRACE_S, requeues=0)
    script = bench.folder / "submit.sh"
    script.write_text(render_slurm(request))
    env = {**os.environ, "TMPDIR": str(bench.folder), "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0"}
    whole = subprocess.Popen(
        ["bash", str(script)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    worker = int(Path(fifo).read_text())
    begun = time.monotonic()
    os.kill(worker, signal.SIGTERM)
    os.killpg(whole.pid, signal.SIGTERM)
    said = whole.communicate(timeout=120)[0]
    assert time.monotonic() - begun >= GRACE_S, said
    assert whole.returncode == 75, said
    run = find_run(bench.store)
    assert read_status(run.path).interrupted == 1, said
    kinds = [event.kind for event in read_events(run)]
    assert Kind.INTERRUPTED in kinds
    assert Kind.WORKER_DIED not in kinds
