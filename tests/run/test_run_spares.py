"""Processes that start before the scheduler knows what there is to do: who gets them, and that none is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.gates import Gates
from dfmpc.job.loader import load_job
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.messages import Ready, WorkerSettings
from dfmpc.run.schedule import spares as spares_module
from dfmpc.run.schedule.process import Boot, WorkerProcess
from dfmpc.run.schedule.spares import Spares
from dfmpc.run.worker.main import ORPHANED

RTN4 = {"name": "p", "method": "rtn", "bits": 4}


class Started:
    """A process that only tells whether it was ended."""

    all: list[Started]
    interrupted_at = 0

    def __init__(self, threads: int, visible: str | None) -> None:
        if len(self.all) + 1 == self.interrupted_at:
            raise KeyboardInterrupt
        self.threads, self.visible, self.discarded, self.lives = threads, visible, False, True
        self.all.append(self)

    def discard(self) -> None:
        self.discarded = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    monkeypatch.setattr(Started, "all", [], raising=False)
    monkeypatch.setattr(spares_module, "Boot", Started)
    return Started.all


def settings(folder: Path, visible: str | None = None) -> WorkerSettings:
    return WorkerSettings(folder, "cpu", 1, (), None, Gates(), 0, os.getpid(), visible)


def test_each_slot_gets_a_process_that_sees_its_device(started: list[Started], tmp_path: Path) -> None:
    with Spares(["cuda:0", "cuda:1"], per_device=2, threads=3, most=3) as spares:
        assert [(each.threads, each.visible) for each in started] == [(3, "0"), (3, "0"), (3, "1")]
        taken = [spares.take(settings(tmp_path, visible)) for visible in ("1", "1", "0", None)]
        assert taken == [started[2], None, started[0], None]
    assert [each.discarded for each in started] == [False, True, False]


def test_one_that_has_died_is_nobodys_worker(started: list[Started], tmp_path: Path) -> None:
    spares = Spares(["cpu"], per_device=3, most=3)
    started[0].lives = started[2].lives = False
    assert [spares.take(settings(tmp_path)) for _ in range(2)] == [started[1], None]
    assert [each.discarded for each in started] == [True, False, True]


def test_those_for_which_there_is_no_work_are_ended(started: list[Started], tmp_path: Path) -> None:
    spares = Spares(["cpu"], per_device=3, most=3)
    spares.close(but=1)
    assert [each.discarded for each in started] == [False, True, True]
    assert spares.take(settings(tmp_path)) is started[0]


def test_an_interrupted_start_leaves_no_process(started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Started, "interrupted_at", 3)
    with pytest.raises(KeyboardInterrupt):
        Spares(["cpu"], per_device=3, most=3)
    assert [each.discarded for each in started] == [True, True]


def test_a_device_is_looked_up_once(started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(spares_module, "visible_as", lambda name: asked.append(name) or name[-1])
    Spares(["cuda:0", "cuda:1"], per_device=4, most=8)
    assert (asked, [each.visible for each in started]) == (["cuda:0", "cuda:1"], ["0"] * 4 + ["1"] * 4)


def test_where_processes_cannot_be_started_the_slots_are_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(spares_module, "Boot", refused)
    spares = Spares(["cpu", "cpu"], most=2)
    assert (spares.devices, spares.take(settings(Path()))) == (["cpu", "cpu"], None)


def test_a_process_started_early_serves_as_a_worker(tmp_path: Path) -> None:
    with Spares(["cpu"], most=1) as spares:
        boot = spares.take(settings(tmp_path))
        assert boot is not None
        (tmp_path / "ledger").mkdir()
        worker = WorkerProcess(settings(tmp_path), boot)
        assert worker.connection.poll(120)
        assert worker.receive() == (Ready(),)
        assert worker.pid == boot.process.pid
        assert worker.kill().code == -9


def test_one_that_was_reaped_by_somebody_else_is_discarded_all_the_same() -> None:
    boot = Boot(1)
    os.kill(boot.process.pid, signal.SIGKILL)
    os.waitpid(boot.process.pid, 0)  # as the kernel does where SIGCHLD is ignored
    boot.discard()
    assert boot.connection.closed


def test_one_whose_scheduler_dies_ends_by_itself_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    boot = Boot(1)
    boot.connection.close()
    assert boot.process.wait(120) == ORPHANED
    assert capfd.readouterr().err == ""


def test_a_run_that_cannot_start_leaves_no_process(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    boots: list[Boot] = []

    class Noted(Boot):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            boots.append(self)

    monkeypatch.setattr(spares_module, "Boot", Noted)
    job = bench.job([bench.model("a"), bench.model("b")], [RTN4])
    bench.store.parent.mkdir(exist_ok=True)
    bench.store.write_text("a file where the store should be")
    with pytest.raises(UsageError):
        run_job(load_job(job), RunOptions(progress=False, devices="cpu,cpu,cpu"))
    assert [boot.process.returncode for boot in boots] == [-9, -9], "one for each model"
