"""The thread behind a worker: how long it may be at the disk, and where its errors go."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dfmpc.artifact.commit import commit
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.models.factory import AllowList
from dfmpc.report.rows import ModelRow
from dfmpc.run.claims import start_run
from dfmpc.run.failures import Mode
from dfmpc.run.ledger import Ledger
from dfmpc.run.messages import Message, TaskOutcome, WorkerSettings
from dfmpc.run.shared import SharedModel
from dfmpc.run.store import RunFolder, Store, freeze
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
        self.ledger = Ledger(self.run)
        self._said: list[Message] = []
        self.finisher = Finisher(self.run, self.ledger, self._hear)
        settings = WorkerSettings(self.run.path, "cpu", 1, (), None, loaded.job.gates, 0, 0)
        self._context = Context(settings, Ledger(self.run), self._hear, self.finisher)

    def _hear(self, *messages: Message) -> None:
        self._said += messages

    def outcome(self) -> TaskOutcome:
        """Make it and return what came of it."""
        shared = SharedModel(self._task.model, AllowList.default(()))
        Attempt(self._task, Mode(), self._context, shared).run()
        self.finisher.close()
        (outcome,) = (message for message in self._said if isinstance(message, TaskOutcome))
        return outcome

    def log_of(self, outcome: TaskOutcome) -> Path:
        """Return the file of the attempt's log."""
        row = outcome.row
        return self.run.log_file(row.model, row.bit_plan, row.attempt)


def test_the_bytes_say_how_long_a_disk_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(finisher, "time", SimpleNamespace(monotonic=lambda: now))
    run = RunFolder(tmp_path)
    it = Finisher(run, Ledger(run), lambda *_: None)
    assert not it.writes
    with it.bringing(int(20e9)):
        assert it.writes
        now += 2002
        assert it.writes
        now += 2
        assert not it.writes
    with it.bringing(1):
        now += 2
        assert it.writes, "a disk may be busy with others' bytes"
        now += 2
        assert not it.writes
    with pytest.raises(OSError, match="full"), it.bringing(int(20e9)):
        raise OSError("full")
    assert not it.writes
    it.close()


def test_reused_tasks_are_reported_together_until_none_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finisher, "_BATCH_S", 3600.0)  # patience alone would tell much later
    said: list[tuple[Message, ...]] = []
    waiting = [True, True, False]
    run = RunFolder(tmp_path)
    it = Finisher(run, Ledger(run), lambda *messages: said.append(messages), more=lambda: waiting.pop(0))
    for number in range(3):
        name = f"net-{number}/r4"
        row = ModelRow(
            run="r", task=name, model=f"net-{number}", bit_plan="r4", method="rtn", status="reused",
            finished_at=datetime.now(UTC), attempt=f"a{number}", dfmpc_version="0", torch_version="0",
        )  # fmt: skip
        it.put(lambda row=row: it.report(TaskOutcome(row), []), lambda: tmp_path / "log")
    end = time.monotonic() + 60
    while not said and time.monotonic() < end:
        time.sleep(0.001)
    (together,) = said
    assert [message.row.task for message in together] == ["net-0/r4", "net-1/r4", "net-2/r4"]
    it.close()
    assert len(said) == 1


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


@pytest.mark.parametrize("where", ["write_parts", "Ledger.append_all", "Attempt._commit"])
def test_an_error_behind_a_worker_is_in_the_log_of_its_own_task(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    def fails(*_: object) -> None:
        raise LookupError(f"from {where}")

    it = Attempted(bench)
    if where == "write_parts":
        monkeypatch.setattr(finisher, "write_parts", fails)
    elif where == "Ledger.append_all":
        monkeypatch.setattr(it.ledger, "append_all", fails)
    else:
        monkeypatch.setattr("dfmpc.run.worker.attempt.commit", fails)
    outcome = it.outcome()
    assert (outcome.row.status, outcome.row.error_class) == ("failed", "LookupError")
    text = it.log_of(outcome).read_text()
    assert text.startswith("Traceback (most recent call last):")
    assert text.count(f"LookupError: from {where}") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_step_that_raises_ends_the_worker_and_is_in_the_log_of_its_own_task(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from dfmpc.run.ledger import Ledger
from dfmpc.run.store import RunFolder
from dfmpc.run.worker.finisher import Finisher

run = RunFolder(Path(sys.argv[1]))
finisher = Finisher(run, Ledger(run), print)
finisher.put(lambda: None, lambda: run.log_file("first", "p", "1"))
finisher.put(lambda: 1 // 0, lambda: run.log_file("second", "p", "2"))
finisher.close()
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (finisher.BROKEN, "", "")
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.log")] == ["logs/second/p/2.log"]
    assert "ZeroDivisionError" in (tmp_path / "logs/second/p/2.log").read_text()
