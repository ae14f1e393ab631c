"""Several commands over one store at the same time end with one artifact a key and no error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dfmpc.artifact.verify import find_artifacts, verify
from dfmpc.run.ledger import Kind, read_events
from dfmpc.run.store import Store

PLANS: list[dict[str, object]] = [{"name": f"r{bits}", "method": "rtn", "bits": bits} for bits in (3, 4, 8)]


def _start(job: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dfmpc.cli", "run", str(job), "--json", "--devices", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _ends_well(command: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = command.communicate(timeout=240)
    assert command.returncode == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def _wait_until_all_have_begun(store: Path, count: int) -> None:
    end = time.monotonic() + 120
    while True:
        events = [event for run in Store(store).run_folders() for event in read_events(run)]
        if sum(event.kind is Kind.RUN_STARTED for event in events) == count:
            return
        assert time.monotonic() < end, f"fewer than {count} commands have begun"
        time.sleep(0.05)


@pytest.mark.slow
def test_one_job_twice_and_another_job_with_the_same_tasks_at_the_same_time(bench: Any) -> None:
    busy = bench.folder / "busy"
    busy.touch()
    models = [bench.model(name, checkpoint=bench.checkpoint(name, bench.state(seed=3))) for name in ("one", "two")]
    models[0] |= {"factory": "slow_networks:works_while", "args": [str(busy)]}
    job = bench.job(models, PLANS)
    other = bench.folder / "other.yaml"
    other.write_text(job.read_text().replace("name: bench", "name: other"))
    commands = [_start(job), _start(job), _start(other)]
    _wait_until_all_have_begun(bench.store, len(commands))  # before a run is finished, which nobody would join
    busy.unlink()
    ended = [_ends_well(command) for command in commands]

    assert ended[0]["run"] == ended[1]["run"] != ended[2]["run"]
    tasks = {f"{name}/{plan['name']}" for name in ("one", "two") for plan in PLANS}
    for document in ended:
        assert {row["task"] for row in document["models"]} == tasks
        assert {row["status"] for row in document["models"]} <= {"done", "reused"}
    artifacts = find_artifacts(bench.store)
    assert len(artifacts) == len(tasks)
    assert [finding for artifact in artifacts for finding in verify(artifact).findings] == []
    assert list((bench.store / ".attempts").iterdir()) == []


@pytest.mark.slow
def test_shards_that_run_at_the_same_time_share_one_run_and_do_each_task_once(bench: Any) -> None:
    models = [bench.model(name) for name in ("one", "two", "three")]
    job = bench.job(models, PLANS[:1])
    ended = [_ends_well(command) for command in [_start(job, "--shard", f"{index}/3") for index in range(3)]]
    assert len({document["run"] for document in ended}) == 1
    rows = [row["task"] for document in ended for row in document["models"] if row["status"] == "done"]
    assert sorted(rows) == ["one/r3", "three/r3", "two/r3"]
    report = Path(ended[0]["run"]) / "report" / "models"
    assert len(list(report.glob("*.parquet"))) == 1, "whoever ends last merges the parts"
