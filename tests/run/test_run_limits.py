"""Runs that come to an end of time or space, and runs divided in many ways: the same artifacts in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dfmpc.artifact.verify import find_artifacts, verify
from dfmpc.run.ledger import Kind, read_events
from dfmpc.run.store import Store

pytestmark = pytest.mark.slow
LIMIT_S = 250.0
PLANS: list[dict[str, object]] = [{"name": f"r{bits}", "method": "rtn", "bits": bits} for bits in (4, 8)]


def start(job: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dfmpc.cli", "run", str(job), "--json", "--output", str(store), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def end(command: subprocess.Popen[str]) -> tuple[int, dict[str, str], str]:
    """Return exit code, statuses by task, and stderr."""
    out, err = command.communicate(timeout=LIMIT_S)
    rows = json.loads(out)["models"] if out else []
    return command.returncode, {row["task"]: row["status"] for row in rows}, err


def attempts(store: Path) -> list[str]:
    """Return the task of every attempt that began in the one run of ``store``."""
    (run,) = Store(store).run_folders()
    return [event.task for event in read_events(run) if event.kind is Kind.TASK_STARTED]


def slow_model(bench: Any) -> tuple[dict[str, object], Path]:
    """Return a model that is at work until the file is removed; ``<file>.pid`` appears when it is."""
    file, checkpoint = bench.folder / "busy", bench.checkpoint("slow", bench.state("plain", 16))
    file.touch()
    model = {**bench.model("slow", "plain", str(file), 16, checkpoint=checkpoint)}
    return {**model, "factory": "slow_networks:works_while"}, file


def wait_for(file: Path) -> None:
    limit = time.monotonic() + LIMIT_S
    while not file.exists():
        assert time.monotonic() < limit, f"{file} did not appear"
        time.sleep(0.02)


def artifact_bytes(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes() for path in Store(store).artifacts.rglob("*") if path.is_file()
    }


def test_nothing_is_started_that_would_not_end_in_time(bench: Any) -> None:
    job = bench.job([bench.model("a"), bench.model("b")], PLANS[:1], resources={"devices": "cpu"})
    code, rows, err = end(start(job, bench.store, "--deadline", "5s", "--grace", "20"))
    assert (code, rows) == (75, {})
    assert "stopped by --deadline" in err
    assert "2 tasks left" in err
    assert attempts(bench.store) == []
    code, rows, err = end(start(job, bench.store))
    assert (code, rows) == (0, {"a/r4": "done", "b/r4": "done"}), err
    assert sorted(attempts(bench.store)) == ["a/r4", "b/r4"]


def test_a_task_at_work_at_the_deadline_has_its_grace_and_no_other_begins(bench: Any) -> None:
    model, busy = slow_model(bench)
    job = bench.job([model, bench.model("b")], PLANS[:1], resources={"devices": "cpu"})
    command = start(job, bench.store, "--deadline", "150s", "--grace", "125")
    wait_for(Path(f"{busy}.pid"))
    assert command.stderr is not None
    said = ""
    while "stopped by --deadline: up to 125 s for 1 at work" not in said:
        line = command.stderr.readline()
        assert line, said
        said += line
    busy.unlink()
    code, rows, err = end(command)
    assert (code, rows) == (75, {"slow/r4": "done"}), err
    assert end(start(job, bench.store))[:2] == (0, {"slow/r4": "done", "b/r4": "done"})
    assert sorted(attempts(bench.store)) == ["b/r4", "slow/r4"]


def fill(path: Path, *, but: int) -> None:
    """Fill the disk of ``path`` up to ``but`` bytes."""
    path.unlink(missing_ok=True)
    free = os.statvfs(path.parent)
    path.write_bytes(bytes(free.f_bavail * free.f_frsize - but))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that is a disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs a file system of its own, which may not be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_stops_the_run_until_it_has_grown(bench: Any, small_disk: Path) -> None:
    model, busy = slow_model(bench)
    job = bench.job([model, bench.model("b"), bench.model("c")], PLANS, resources={"devices": "cpu"})
    store = small_disk / "store"
    command = start(job, store)
    wait_for(Path(f"{busy}.pid"))
    ballast = small_disk / "ballast"
    fill(ballast, but=8192)  # enough for a few lines of the ledger
    busy.unlink()
    code, rows, err = end(command)
    assert code == 75, err
    assert set(rows.values()) <= {"interrupted"}
    (last,) = [line for line in err.splitlines() if "the same command resumes" in line]
    assert "stopped: " in last
    assert "No space left on device" in last
    assert "free" in last

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, rows, err = end(start(job, store))
    assert code == 0, err
    assert (len(rows), set(rows.values())) == (6, {"done"})
    found = find_artifacts(store)
    assert len(found) == 6
    assert [finding for artifact in found for finding in verify(artifact).findings] == []
    assert list(Store(store).attempts.iterdir()) == []


def test_a_disk_that_is_too_full_to_start_a_run_is_told_once_and_may_be_tried_again(
    bench: Any, small_disk: Path
) -> None:
    job, store = bench.job([bench.model("a")], PLANS[:1], resources={"devices": "cpu"}), small_disk / "store"
    for pages in range(6):  # what the probes, the draft of the run, its list and its claim take one after another
        fill(small_disk / "ballast", but=pages * 4096)
        code, rows, err = end(start(job, store, "--no-preflight"))
        assert (code, rows) == (75, {}), (pages, err)
        (said,) = err.splitlines()
        assert said.startswith(f"error: output {store}: no run can be started (No space left on device): free some")
        assert list(small_disk.glob("store/.attempts/*")) == []
    assert Store(store).run_folders() == []
    (small_disk / "ballast").unlink()
    assert end(start(job, store))[:2] == (0, {"a/r4": "done"})
    assert len(Store(store).run_folders()) == 1


@pytest.mark.timeout(900)  # nine commands
def test_however_a_run_is_divided_its_artifacts_are_the_same(bench: Any) -> None:
    models = []
    for number, width in enumerate((16, 12, 8, 4)):
        checkpoint = bench.checkpoint(f"m{number}", bench.state("plain", width, seed=number))
        models.append(bench.model(f"m{number}", "plain", width, checkpoint=checkpoint))
    job = bench.job(models, PLANS, resources={"threads": 1})
    found: dict[str, dict[str, bytes]] = {}
    for workers in (1, 2, 4):
        store = bench.folder / f"workers-{workers}"
        code, rows, err = end(start(job, store, "--devices", ",".join(["cpu"] * workers)))
        assert (code, len(rows), set(rows.values())) == (0, 8, {"done"}), err
        found[store.name] = artifact_bytes(store)
    for count in (1, 2, 3):
        store = bench.folder / f"shards-{count}"
        commands = [start(job, store, "--devices", "cpu", "--shard", f"{index}/{count}") for index in range(count)]
        ended = [end(command) for command in commands]
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert sum(status == "done" for _, rows, _ in ended for status in rows.values()) == 8
        assert len(Store(store).run_folders()) == 1
        found[store.name] = artifact_bytes(store)
    assert len(found["workers-1"]) == 8 * 2
    assert [name for name, files in found.items() if files != found["workers-1"]] == []
