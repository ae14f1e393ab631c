"""The scheduler's loop against workers that say exactly what a test has them say, over real sockets."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.job.schema import Gates
from dfmpc.run.failures import Failure
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.messages import Ready, RunTask, Started, TaskOutcome, WorkerSettings
from dfmpc.run.outcome import bare_row, failed
from dfmpc.run.resume import create_or_join_run
from dfmpc.run.schedule import slots as slots_module
from dfmpc.run.schedule.board import Board, Item
from dfmpc.run.schedule.deadline import Deadline
from dfmpc.run.schedule.dispatch import Dispatcher, Limits
from dfmpc.run.schedule.interrupts import Interrupts
from dfmpc.run.schedule.process import Boot, Ended, WorkerProcess
from dfmpc.run.schedule.progress import Progress
from dfmpc.run.schedule.reserve import Promises
from dfmpc.run.schedule.slots import make_slots
from dfmpc.run.schedule.spares import Spares
from dfmpc.run.schedule.tally import Rules, Tally
from dfmpc.run.store import RunFolder, Store, freeze

Script = Callable[["Actor", RunTask], None]


class Actor(WorkerProcess):
    """A worker without a process: ``script`` answers each task, on the other end of a real line, as it is sent."""

    script: Script
    began: list[tuple[str, bool]]

    def __init__(self, settings: WorkerSettings, _: Boot | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.connection, self.line = Connection(ours.detach()), Connection(theirs.detach())
        self.device, self.exit_code = settings.device, 0
        self.run = RunFolder(settings.run)
        self.attempts: dict[str, str] = {}
        self.say(Ready())

    @property
    def signs(self) -> list[Connection | int]:
        return [self.connection]

    pid = 0

    def send(self, *messages: object) -> None:
        for message in messages:
            if isinstance(message, RunTask):
                type(self).began.append((message.task.id, message.mode.alone))
                type(self).script(self, message)

    def say(self, message: object) -> None:
        if not self.line.closed:
            self.line.send((message,))

    def start(self, order: RunTask) -> str:
        attempt = self.attempts[order.task.id] = uuid.uuid4().hex[:12]
        self.say(Started(order.task.id, attempt))
        return attempt

    def end(self, order: RunTask, failure: Failure | None = None) -> None:
        attempt = self.attempts.get(order.task.id) or self.start(order)
        row = bare_row(self.run, order.task, "done", attempt, self.device)
        if failure is not None:
            row = failed(row, RuntimeError("as the script has it"))
        self.say(TaskOutcome(row, failure))

    def die(self, code: int = -11) -> None:
        self.exit_code = code
        self.line.close()

    def kill(self, grace_s: float = 0.0) -> Ended:  # noqa: ARG002 - the scheduler passes it
        self.line.close()
        self.connection.close()
        return Ended(self.exit_code, f"ended with {self.exit_code}")


PATIENT = Limits(None, 60.0, 1.0)


class Stage:
    """A run of ``plans`` × ``models`` without any computing."""

    def __init__(self, bench: Any, models: Sequence[str], plans: Sequence[str]) -> None:
        made = [{"name": name, "method": "rtn", "bits": 4} for name in plans]
        loaded = load_job(bench.job([bench.model(name) for name in models], made), allows=lambda _: True)
        tasks, store = expand(loaded), Store(loaded.store)
        store.prepare()
        self.run = create_or_join_run(store, freeze(loaded, tasks)).run
        self.ledger = Ledger(self.run)
        self.items = {task.id: Item(task, 1000, 0.0, 0.0) for task in tasks}
        self.board = Board(self.items.values())
        self.deadline = Deadline(None, 0.0)
        progress = Progress(dict.fromkeys(self.items, 1000), shown=False)
        self.tally = Tally(self.run, self.board, self.ledger, progress, self.deadline, Rules())

    def work(self, script: Script, devices: Sequence[str] = ("cpu",), limits: Limits = PATIENT) -> str:
        settings = WorkerSettings(self.run.path, "cpu", 1, (), None, Gates(), 0, os.getpid())
        Actor.script, Actor.began = staticmethod(script), []
        slots = make_slots(Spares(devices), settings)
        with Interrupts() as interrupts:
            dispatcher = Dispatcher(slots, self.board, self.tally, Promises(None, devices), self.deadline, limits)
            return dispatcher.work(interrupts)

    @property
    def ends(self) -> dict[str, tuple[str, str | None, int | None]]:
        return {row.task: (row.status, row.failure, row.attempts) for row in self.tally.rows.values()}


@pytest.fixture(autouse=True)
def actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "WorkerProcess", Actor)


DONE = ("done", None, None)


def test_a_worker_killed_in_mid_word_costs_one_attempt(bench: Any) -> None:
    stage = Stage(bench, ["a"], ["p"])

    def script(actor: Actor, order: RunTask) -> None:
        actor.start(order)
        if len(Actor.began) == 1:
            os.write(actor.line.fileno(), (5000).to_bytes(4, "big") + b"half a word")
            actor.die()
        else:
            actor.end(order)

    assert stage.work(script) == ""
    assert stage.ends == {"a/p": DONE}
    assert Actor.began == [("a/p", False), ("a/p", False)]


def test_what_ended_before_its_limit_is_heard_before_it_is_judged(bench: Any) -> None:
    """The scheduler itself was late: words lie in the line, and the time of all of them is over."""
    stage = Stage(bench, ["a"], ["p", "q"])

    def script(actor: Actor, order: RunTask) -> None:
        actor.start(order)
        time.sleep(0.3)  # of the scheduler's own time
        actor.end(order)

    assert stage.work(script, limits=Limits(0.2, 0.2, 1.0)) == ""
    assert stage.ends == {"a/p": DONE, "a/q": DONE}
    assert [task for task, _ in Actor.began] == ["a/p", "a/q"]


@pytest.mark.parametrize(("code", "failure"), [(-11, "crash"), (-9, "host-oom")])
def test_of_two_that_were_in_flight_each_is_tried_alone_and_the_guilty_one_fails(
    bench: Any, code: int, failure: str
) -> None:
    stage = Stage(bench, ["a"], ["p", "q", "r"])

    def script(actor: Actor, order: RunTask) -> None:
        actor.start(order)
        if order.task.id == "a/p" and not order.mode.alone:
            return  # its commit is slow
        if order.task.id == "a/q":
            actor.die(code)
        else:
            actor.end(order)

    assert stage.work(script) == ""
    assert stage.ends == {"a/p": DONE, "a/q": ("failed", failure, 2), "a/r": DONE}
    assert [began for began in Actor.began if began[1]] == [("a/p", True), ("a/q", True), ("a/q", True)]


def test_what_was_kept_before_the_worker_ended_is_not_done_again(bench: Any) -> None:
    stage = Stage(bench, ["a"], ["p", "q"])

    def script(actor: Actor, order: RunTask) -> None:
        attempt = actor.start(order)
        if order.task.id == "a/p":  # done and kept, but not said
            stage.ledger.append(Event(Kind.TASK_STARTED, task="a/p", attempt=attempt))
            stage.ledger.append(Event(Kind.TASK_FINISHED, task="a/p", attempt=attempt, status="done"))
        elif len(Actor.began) == 2:
            actor.die()
        else:
            actor.end(order)

    assert stage.work(script) == ""
    assert Actor.began == [("a/p", False), ("a/q", False), ("a/q", False)]
    assert stage.tally.settled == {"a/p", "a/q"}


def test_a_retry_that_falls_due_between_two_looks_is_neither_lost_nor_left(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks of the loop at the clock time goes by, as it always does; here enough to be seen."""
    stage = Stage(bench, ["a"], ["p", "q", "r", "s"])

    def late_look() -> float:
        time.sleep(0.02)
        return time.monotonic()

    monkeypatch.setattr("dfmpc.run.failures.BACKOFF_S", (0.01, 0.03, 0.05))
    monkeypatch.setattr("dfmpc.run.schedule.dispatch.time", SimpleNamespace(monotonic=late_look))

    def script(actor: Actor, order: RunTask) -> None:
        actor.start(order)
        actor.end(order, Failure.IO if [task for task, _ in Actor.began].count(order.task.id) < 4 else None)

    assert stage.work(script) == ""
    assert set(stage.ends.values()) == {DONE}
    assert len(Actor.began) == 16


def test_every_slot_has_a_task_before_one_has_two(bench: Any) -> None:
    stage = Stage(bench, ["a", "b"], ["p"])
    orders: list[tuple[Actor, RunTask]] = []

    def script(actor: Actor, order: RunTask) -> None:
        orders.append((actor, order))
        if len(orders) == 2:  # the first ends when the second has begun, on another worker
            for each, its in orders:
                each.end(its)

    assert stage.work(script, devices=["cpu", "cpu"], limits=Limits(None, 5.0, 1.0)) == ""
    assert len({id(actor) for actor, _ in orders}) == 2
    assert set(stage.ends.values()) == {DONE}


def test_what_one_slot_must_leave_is_its_own_when_the_other_is_given_up(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(bench, ["a"], ["p"])
    stage.items["a/p"].avoid.add("cpu")

    class Absent(Actor):
        def __init__(self, settings: WorkerSettings, _: Boot | None = None) -> None:
            if settings.device != "cpu":
                raise BlockingIOError(11, "Resource temporarily unavailable")
            super().__init__(settings)

    monkeypatch.setattr(slots_module, "WorkerProcess", Absent)
    Absent.began = []
    Absent.script = staticmethod(lambda actor, order: actor.end(order))
    assert stage.work(lambda actor, order: actor.end(order), devices=["cpu", "cuda:0"]) == ""
    assert stage.ends == {"a/p": DONE}


def test_two_tasks_that_poison_a_device_have_it_left_alone(bench: Any) -> None:
    stage = Stage(bench, ["a", "b", "c"], ["p"])

    def script(actor: Actor, order: RunTask) -> None:
        actor.end(order, Failure.POISONED if actor.device == "cuda:0" else None)

    assert stage.work(script, devices=["cuda:0", "cuda:1"]) == ""
    assert set(stage.ends.values()) == {DONE}
    assert stage.tally.cordoned <= {"cuda:0"}


def test_limits_of_forty_days_are_waited_for(bench: Any) -> None:
    stage = Stage(bench, ["a"], ["p"])
    stage.deadline.at = time.time() + 40 * 86400
    limits = Limits(40 * 86400.0, 40 * 86400.0, 1.0)
    assert stage.work(lambda actor, order: actor.end(order), limits=limits) == ""
    assert stage.ends == {"a/p": DONE}


def test_an_ending_run_waits_without_spinning(bench: Any) -> None:
    """The deadline has passed, a line of progress is due, and the task at work takes its time."""
    stage = Stage(bench, ["a"], ["p"])
    stage.deadline.at = time.time() + 3600

    def script(actor: Actor, order: RunTask) -> None:
        actor.start(order)
        stage.deadline.at = time.time() + 0.3

    used = time.thread_time()  # not what other threads of this process do meanwhile
    assert stage.work(script, limits=Limits(None, 60.0, 2.0)) == "stopped by --deadline"
    assert time.thread_time() - used < 1.0
    assert stage.ends["a/p"][0] == "interrupted"


def test_a_full_disk_ends_the_run_once_and_fails_nothing(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(bench, ["a"], ["p", "q", "r"])
    reason = stage.work(lambda actor, order: actor.end(order, Failure.NO_SPACE))
    assert reason.startswith("stopped: ")
    assert {status for status, _, _ in stage.ends.values()} == {"interrupted"}
    assert len(stage.board) == 3
    assert Path(stage.run.path / "ledger").is_dir()
