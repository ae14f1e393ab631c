"""The thread behind a worker: how long it may be at the disk, and where its errors go."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dfmpc.artifact.commit import commit
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.models.factory import AllowList
from dfmpc.run.claims import start_run
from dfmpc.run.failures import Mode
from dfmpc.run.ledger import Ledger
from dfmpc.run.messages import Message, TaskOutcome, WorkerSettings
from dfmpc.run.shared import SharedModel
from dfmpc.run.store import Store, freeze
from dfmpc.run.worker import finisher
from dfmpc.run.worker.attempt import Attempt, Context
from dfmpc.run.worker.finisher import Finisher


class Attempted:
    """One attempt at one task in this process."""

    def __init__(self, bench: Any) -> None:
        loaded = load_job(bench.job([bench.model("net")], [{"name": "r4", "method": "rtn", "bits": 4}]))
        (self._task,), store = expand(loaded), Store(loaded.store)
        store.prepare()
        self.run = start_run(store, freeze(loaded, [self._task])).run
        self._said: list[Message] = []
        self.finisher = Finisher(self.run, Ledger(self.run), self._said.append)
        settings = WorkerSettings(self.run.path, "cpu", 1, (), None, loaded.job.gates, 0, 0)
        self._context = Context(settings, Ledger(self.run), self._said.append, self.finisher)

    def outcome(self) -> TaskOutcome:
        """Make it and return what came of it."""
        shared = SharedModel(self._task.model, AllowList.default(()))
        Attempt(self._task, Mode(), self._context, shared).run()
        self.finisher.close()
        (outcome,) = (message for message in self._said if isinstance(message, TaskOutcome))
        return outcome

    def log(self) -> str:
        """Return the text of the attempt's log."""
        row = self.outcome().row
        return self.run.log_file(row.model, row.bit_plan, row.attempt).read_text()


def test_the_bytes_say_how_long_a_disk_may_take(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(finisher, "time", SimpleNamespace(monotonic=lambda: now))
    it = Finisher(bench.folder, bench.folder, lambda _: None)
    assert not it.writes
    with it.bringing(int(20e9)):
        assert it.writes
        now += 1999
        assert it.writes
        now += 2
        assert not it.writes
    with pytest.raises(OSError, match="full"), it.bringing(int(20e9)):
        raise OSError("full")
    assert not it.writes
    it.close()


def test_a_commit_is_such_a_time(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watched(attempt: Path, target: Path) -> bool:
        seen.append(it.finisher.writes)
        return commit(attempt, target)

    monkeypatch.setattr(finisher, "_SLOW", 0.001)
    monkeypatch.setattr("dfmpc.run.worker.attempt.commit", watched)
    it = Attempted(bench)
    assert it.outcome().row.status == "done"
    assert seen == [True]
    assert not it.finisher.writes
