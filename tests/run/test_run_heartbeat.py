"""A worker that waits for a slow disk gives signs of life."""

from __future__ import annotations

import threading

import pytest
from dfmpc.run.worker import heartbeat
from dfmpc.run.worker.heartbeat import Heartbeat


class Watched:
    """What a heartbeat asks, and what it has said."""

    def __init__(self) -> None:
        self.writing = False
        self._beats = 0
        self._beats_when_asked: list[int] = []
        self._asked = threading.Semaphore(0)
        Heartbeat(self._beat, self._counter, lambda: self.writing)

    def periods(self, count: int) -> int:
        """Sleep through ``count`` whole periods and return the beats in them, however late this thread comes to it."""
        first = len(self._beats_when_asked) + 1  # behind the period that is under way
        while len(self._beats_when_asked) <= first + count:
            assert self._asked.acquire(timeout=30)
        return self._beats_when_asked[first + count] - self._beats_when_asked[first]

    def _beat(self) -> None:
        self._beats += 1

    def _counter(self) -> int:
        self._beats_when_asked.append(self._beats)
        self._asked.release()
        return 0


def test_who_waits_for_a_disk_gives_signs_as_long_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.05)
    monkeypatch.setattr(heartbeat, "_WORK_S", 10.0)  # whatever this thread computes
    watched = Watched()
    assert watched.periods(4) == 0
    watched.writing = True
    assert watched.periods(4) == 4
    watched.writing = False
    assert watched.periods(4) == 0
