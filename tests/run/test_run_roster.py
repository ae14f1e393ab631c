"""Which slots may get work."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from dfmpc.job.gates import Gates
from dfmpc.run.messages import WorkerSettings
from dfmpc.run.schedule import process
from dfmpc.run.schedule.process import WorkerProcess
from dfmpc.run.schedule.roster import FALSE_STARTS, Roster
from dfmpc.run.schedule.slots import Slot


def _slot(number: int, device: str = "cpu") -> Slot:
    return Slot(WorkerSettings(Path("run"), device, 1, (), None, Gates(), 0, 0), number)


def test_a_slot_rests_longer_after_each_false_start_and_is_then_given_up() -> None:
    said: list[str] = []
    slot, other = _slot(0), _slot(1)
    roster, now = Roster([slot, other], said.append), 100.0
    waits = []
    for _ in range(FALSE_STARTS - 1):
        roster.false_start(slot, "no process", now)
        assert not roster.can_work(slot, now)
        assert roster.can_work(other, now)
        waits.append(roster.rest_s(now))
        now += waits[-1] or 0.0
        assert roster.can_work(slot, now)
    assert waits == [1.0, 4.0]
    roster.false_start(slot, "no process", now)
    assert (roster.usable, roster.rest_s(now)) == ([other], None)
    assert said == ["warning: no process; slot 0 is given up"]


def test_a_cordoned_device_loses_all_its_slots() -> None:
    slots = [_slot(0, "cuda:0"), _slot(1, "cuda:0"), _slot(2, "cuda:1")]
    roster = Roster(slots, lambda _: None)
    roster.cordon({"cuda:0"})
    assert roster.usable == slots[2:]
    assert roster.last_words == "cuda:0: cordoned, as it failed under different tasks"


def test_a_worker_that_does_not_die_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen(["sleep", "60"], start_new_session=True)

    class Asleep:
        """As if in uninterruptible sleep, which cannot be had without a broken driver or file system."""

        pid = real.pid

        def wait(self, seconds: float) -> int:
            raise subprocess.TimeoutExpired("worker", seconds)

    asleep: Any = Asleep()
    monkeypatch.setattr(process, "start_process", lambda *_: asleep)
    ended = WorkerProcess(_slot(0).settings).kill()
    assert (ended.code, ended.lives) == (None, True)
    assert ended.how == f"(process {real.pid}) did not die within 10 s of SIGKILL"
    assert real.wait() == -9
