"""Real commands, real signals: what is killed costs its attempts in flight, and the rerun does no more than those."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dfmpc.artifact.verify import find_artifacts, verify
from dfmpc.report.parts import read_models
from dfmpc.run.ledger import Kind, fold, read_events
from dfmpc.run.store import RunFolder, Store

pytestmark = pytest.mark.slow
LIMIT_S = 200.0
R4: dict[str, object] = {"name": "r4", "method": "rtn", "bits": 4}
R8: dict[str, object] = {"name": "r8", "method": "rtn", "bits": 8}


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return what ``condition`` returns once that is true."""
    end = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return found


@dataclass
class Command:
    """A ``dfmpc run`` over ``job`` in a process of its own."""

    job: Path
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._out, self._err = self.job.with_name("out"), self.job.with_name("err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dfmpc.cli", "run", str(self.job), "--json", *self.options],
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                # a test run in the background may have SIGINT ignored, which children inherit
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one thread
            )

    def said(self, text: str) -> str:
        """Wait until stderr has ``text``, and return it all."""
        until(lambda: text in self._err.read_text(), f"{text!r} was not said")
        return self._err.read_text()

    def ended(self) -> tuple[int, str]:
        """Return the exit code and stderr."""
        return self.process.wait(LIMIT_S), self._err.read_text()

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._out.read_text())
        return found

    @property
    def statuses(self) -> dict[str, str]:
        return {row["task"]: row["status"] for row in self.document["models"]}


def slow(bench: Any, name: str, width: int = 8) -> tuple[dict[str, object], Path]:
    """Return a model that is at work until the file, which is there, is removed; it is larger than a plain one."""
    file = bench.folder / f"{name}.busy"
    file.touch()
    checkpoint = bench.checkpoint(name, bench.state("plain", width))
    model = bench.model(name, "plain", str(file), width, checkpoint=checkpoint)
    return {**model, "factory": "slow_networks:works_while"}, file


def worker_of(file: Path) -> int:
    """Wait until a worker is at the slow model of ``file``; return its process id."""
    return int(until(Path(f"{file}.pid").is_file, "nobody is at it") and Path(f"{file}.pid").read_text())


def children(pid: int) -> list[int]:
    """Return the processes whose parent is ``pid``."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def the_run(bench: Any) -> RunFolder:
    (run,) = Store(bench.store).run_folders()
    return run


def done(bench: Any) -> list[str]:
    """Return the tasks that the ledger says are finished."""
    runs = Store(bench.store).run_folders() if bench.store.is_dir() else []
    return [task for run in runs for task, state in fold(run).items() if state.status in ("done", "reused")]


def check_whole(bench: Any, tasks: int) -> None:
    """Check that every task has one row and one artifact, each artifact is sound, and nothing else is left."""
    rows = read_models(the_run(bench).path)
    assert (len(rows), {row.status for row in rows} - {"reused"}) == (tasks, {"done"})
    artifacts = find_artifacts(bench.store)
    assert len(artifacts) == tasks == len({artifact.parent for artifact in artifacts})
    assert [finding for artifact in artifacts for finding in verify(artifact).findings] == []
    assert list((bench.store / ".attempts").iterdir()) == []
    assert list(bench.store.rglob("*.tmp")) == []


def started(bench: Any) -> Counter[str]:
    """Return how many attempts at each task began."""
    return Counter(event.task for event in read_events(the_run(bench)) if event.kind is Kind.TASK_STARTED)


def test_a_worker_that_is_killed_costs_one_attempt(bench: Any) -> None:
    model, busy = slow(bench, "slow", 16)
    command = Command(bench.job([model, bench.model("plain")], [R4, R8], resources={"devices": "cpu"}))
    os.kill(worker_of(busy), signal.SIGKILL)
    busy.unlink()
    code, err = command.ended()
    assert code == 0, err
    assert "slow/r4: host-oom, tried again alone" in err
    assert set(command.statuses.values()) == {"done"}
    assert started(bench) == {"slow/r4": 2, "slow/r8": 1, "plain/r4": 1, "plain/r8": 1}
    check_whole(bench, 4)


def test_the_parents_death_takes_all_workers_and_costs_what_was_in_flight(bench: Any) -> None:
    (first, busy), (second, busy_too) = slow(bench, "slow", 16), slow(bench, "slow2", 12)
    job = bench.job([first, second, bench.model("plain")], [R4], resources={"devices": ["cpu", "cpu", "cpu"]})
    command = Command(job)
    workers = {worker_of(busy), worker_of(busy_too)}
    until(lambda: done(bench) == ["plain/r4"], "the plain model was not finished")
    assert workers <= set(children(command.process.pid))
    handles = [os.pidfd_open(pid) for pid in children(command.process.pid)]
    command.process.kill()
    assert command.ended()[0] == -9
    for handle in handles:
        assert select.select([handle], [], [], 60.0)[0], "a worker outlived its scheduler"  # they are at work for ever
        os.close(handle)

    busy.unlink()
    busy_too.unlink()
    again = Command(job)
    code, err = again.ended()
    assert code == 0, err
    assert "2 tasks to do" in err
    assert started(bench) == {"slow/r4": 2, "slow2/r4": 2, "plain/r4": 1}
    check_whole(bench, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_lets_the_task_at_work_end_and_begins_no_other(bench: Any, number: signal.Signals) -> None:
    model, busy = slow(bench, "slow", 16)
    job = bench.job([model, bench.model("plain")], [R4], resources={"devices": "cpu"})
    command = Command(job, ("--grace", "150"))
    worker_of(busy)
    command.process.send_signal(number)
    command.said(f"interrupted by {number.name}: up to 150 s for 1 at work; a second signal ends at once")
    busy.unlink()
    code, err = command.ended()
    assert code == 75, err
    assert f"interrupted by {number.name}; 1 task left" in err
    assert command.statuses == {"slow/r4": "done"}
    again = Command(job)
    assert again.ended()[0] == 0
    assert again.statuses == {"slow/r4": "done", "plain/r4": "done"}
    assert started(bench) == {"slow/r4": 1, "plain/r4": 1}
    check_whole(bench, 2)


def test_a_second_signal_ends_at_once(bench: Any) -> None:
    model, busy = slow(bench, "slow", 16)
    job = bench.job([model, bench.model("plain")], [R4], resources={"devices": "cpu"})
    command = Command(job, ("--grace", "150"))
    worker = os.pidfd_open(worker_of(busy))
    command.process.send_signal(signal.SIGTERM)
    command.said("up to 150 s for 1 at work")
    time.sleep(1.1)  # signals within a second are one
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(100) == 75  # the grace is longer
    assert select.select([worker], [], [], 0)[0], "the worker outlived its scheduler"
    os.close(worker)
    assert command.statuses == {"slow/r4": "interrupted"}
    busy.unlink()
    again = Command(job)
    assert again.ended()[0] == 0
    check_whole(bench, 2)


def test_a_stopped_worker_is_found_and_replaced(bench: Any) -> None:
    model, busy = slow(bench, "slow", 16)
    resources = {"devices": "cpu", "stuck_after": 3}
    command = Command(bench.job([model, bench.model("plain")], [R4], resources=resources))
    worker = worker_of(busy)
    os.kill(worker, signal.SIGSTOP)
    busy.unlink()
    code, err = command.ended()
    assert code == 0, err
    assert "slow/r4: stuck, tried again once more: no sign of work for 3 s" in err
    assert not Path(f"/proc/{worker}").exists()
    assert started(bench) == {"slow/r4": 2, "plain/r4": 1}
    check_whole(bench, 2)


def test_a_suspended_job_goes_on_where_it_was(bench: Any) -> None:
    model, busy = slow(bench, "slow", 16)
    command = Command(bench.job([model], [R4], resources={"devices": "cpu", "stuck_after": 3}))
    processes = [command.process.pid, worker_of(busy)]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8)  # what is tried is that this much time goes by
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    busy.unlink()
    code, err = command.ended()
    assert code == 0, err
    assert "stuck" not in err
    assert started(bench) == {"slow/r4": 1}


def test_a_worker_whose_child_lives_on_is_missed_at_once(bench: Any) -> None:
    model = bench.model("forks", "plain", str(bench.folder / "marker"))
    model["factory"] = "slow_networks:forks_and_dies_once"
    command = Command(bench.job([model], [R4], resources={"devices": "cpu", "stuck_after": 3600}))
    code, err = command.ended()
    assert code == 0, err
    assert "forks/r4: host-oom, tried again alone" in err
    check_whole(bench, 1)


def _kill_now_and_then(bench: Any, command: Command, every: int, last: int, chance: random.Random) -> int:
    """Kill a random worker each time that ``every`` more tasks are done, until ``last`` are; return how many."""
    killed = 0
    for count in range(every, last + 1, every):
        until(lambda count=count: len(done(bench)) >= count or command.process.poll() is not None, "no progress")
        workers = sorted(children(command.process.pid))
        if workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
            killed += 1
    return killed


def test_sixty_tasks_and_every_tenth_worker_killed(bench: Any) -> None:
    models = [bench.model(f"m{number:02}") for number in range(12)]
    plans: list[dict[str, object]] = [{"name": f"r{bits}", "method": "rtn", "bits": bits} for bits in (3, 4, 5, 6, 8)]
    job = bench.job(models, plans, resources={"devices": ["cpu", "cpu"], "threads": 1})
    command = Command(job)
    # those at which one was killed are tried alone, after all the others: so nobody is killed twice before 42 are done
    killed = _kill_now_and_then(bench, command, every=6, last=42, chance=random.Random(4))
    code, err = command.ended()
    assert code == 0, err
    assert killed == 7
    assert len(command.statuses) == 60
    events = read_events(the_run(bench))
    ends = Counter(event.task for event in events if event.kind is Kind.TASK_FINISHED)
    assert (len(ends), set(ends.values())) == (60, {1})
    assert 60 <= sum(started(bench).values()) <= 60 + 2 * killed
    check_whole(bench, 60)
