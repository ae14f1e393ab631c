"""The ledger: events of several processes fold to one state a task, whatever a crash tore."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dfmpc.errors import StorageError
from dfmpc.run.ledger import Event, Kind, Ledger, fold, is_abandoned, read_events
from dfmpc.run.store import RunFolder


def _append(run: RunFolder, *events: Event) -> Path:
    ledger = Ledger(run)
    for event in events:
        ledger.append(event)
    ledger.close()
    return max(run.ledger.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)


def test_the_fold_follows_a_task_through_its_attempts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    _append(
        run,
        Event(Kind.RUN_STARTED),
        Event(Kind.TASK_STARTED, task="a/p", attempt="1", device="cpu"),
        Event(Kind.TASK_FAILED, task="a/p", attempt="1", error_class="CheckpointError", error="torn"),
        Event(Kind.TASK_STARTED, task="b/p", attempt="2"),
        Event(Kind.TASK_FINISHED, task="b/p", attempt="2", status="reused"),
        Event(Kind.TASK_STARTED, task="c/p", attempt="3"),
    )
    states = fold(run)
    assert {task: state.status for task, state in states.items()} == {
        "a/p": "failed",
        "b/p": "reused",
        "c/p": "running",
    }
    assert (states["a/p"].error_class, states["a/p"].error, states["a/p"].device) == ("CheckpointError", "torn", "cpu")
    # another process tries again: its events come later and win
    _append(
        run,
        Event(Kind.TASK_STARTED, task="a/p", attempt="4"),
        Event(Kind.TASK_FINISHED, task="a/p", attempt="4", status="done"),
        Event(Kind.INTERRUPTED),  # that scheduler's word: the task of another's worker goes on
    )
    assert fold(run)["c/p"].status == "running"
    _append(run, Event(Kind.INTERRUPTED, task="c/p", attempt="3"))
    states = fold(run)
    assert (states["a/p"].status, states["a/p"].attempts, states["a/p"].error) == ("done", 2, "")
    assert states["c/p"].status == "interrupted"
    assert len(list(run.ledger.iterdir())) == 3


def test_a_finished_task_stays_finished_whatever_another_command_tries_at_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    _append(
        run,
        Event(Kind.TASK_STARTED, task="a/p", attempt="1"),
        Event(Kind.TASK_STARTED, task="a/p", attempt="2"),
        Event(Kind.TASK_FINISHED, task="a/p", attempt="1", status="done"),
        Event(Kind.INTERRUPTED, task="a/p", attempt="2"),
    )
    assert (fold(run)["a/p"].status, fold(run)["a/p"].attempts) == ("done", 2)
    _append(run, Event(Kind.TASK_FINISHED, task="a/p", attempt="3", status="reused"))
    assert fold(run)["a/p"].status == "reused"


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_is_ignored_and_the_next_event_is_read(tmp_path: Path, cut: int) -> None:
    run = RunFolder(tmp_path)
    file = _append(
        run,
        Event(Kind.TASK_STARTED, task="a/p", attempt="1"),
        Event(Kind.TASK_FINISHED, task="a/p", attempt="1", status="done"),
    )
    whole = file.read_bytes()
    file.write_bytes(whole[: -1 - cut])
    assert fold(run)["a/p"].status == "running"
    with file.open("ab") as torn:  # what the same process would append next
        torn.write(whole[whole.rindex(b"\n{") :])
    assert fold(run)["a/p"].status == "done"


def test_every_line_names_its_time_and_the_file_its_writer(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    file = _append(run, Event(Kind.RUN_STARTED))
    owner, event = (json.loads(line) for line in file.read_text().splitlines() if line)
    assert owner["owner"]["pid"] == os.getpid()
    assert set(event) == {"at", "kind"}
    assert event["at"].endswith("+00:00")
    assert str(os.getpid()) in file.name
    assert [event.process for event in read_events(run)] == [file.stem]


def test_a_task_of_a_dead_process_is_abandoned_one_of_this_process_is_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from dfmpc.run.ledger import Event, Kind, Ledger\n"
        "from dfmpc.run.store import RunFolder\n"
        "Ledger(RunFolder(Path(sys.argv[1]))).append(Event(Kind.TASK_STARTED, task='dead/p', attempt='1'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    _append(run, Event(Kind.TASK_STARTED, task="ours/p", attempt="2"))
    states = fold(run)
    assert {task: is_abandoned(run, state) for task, state in states.items()} == {"dead/p": True, "ours/p": False}


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    ledger = Ledger(run)
    ledger.append(Event(Kind.RUN_STARTED))

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"task_finished cannot be recorded \(No space left on device\)"):
            ledger.append(Event(Kind.TASK_FINISHED, task="a/p"))
    ledger.append(Event(Kind.TASK_FINISHED, task="b/p", status="done"))
    assert fold(run)["b/p"].status == "done"
    assert "a/p" not in fold(run)
