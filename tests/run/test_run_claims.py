"""Many processes that start a run of one list at the same moment end up in one run, whoever dies on the way."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from dfmpc.artifact.attempts import sweep
from dfmpc.errors import StorageError, UsageError
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.report.parts import write_part
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.outcome import bare_row
from dfmpc.run.resume import JoinedRun, create_or_join_run
from dfmpc.run.store import RunFolder, Store, freeze

PROCESSES, ROUNDS = 8, 10
LIMIT_S = 250.0
SPAWN = multiprocessing.get_context("spawn")
TASKS = ("a/r4", "a/r8", "b/r4", "b/r8")


def _write_job(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "b.pt2").write_bytes(b"12345")
    (folder / "job.yaml").write_text(
        f"""
version: 1
name: nightly
output: {json.dumps(str(folder / "store"))}
models: [{{program: a.pt2}}, {{program: b.pt2}}]
bit_plans: [{{name: r4, method: rtn, bits: 4}}, {{name: r8, method: rtn, bits: 8}}]
"""
    )


def _join(folder: Path, **options: bool) -> JoinedRun:
    loaded = load_job(folder / "job.yaml")
    store = Store(loaded.store)
    store.prepare()
    return create_or_join_run(store, freeze(loaded, expand(loaded)), **options)


def _runs(folder: Path) -> list[str]:
    return [run.run_id for run in Store(folder / "store").run_folders()]


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "store" / ".attempts").iterdir()]


def _fail(run: RunFolder, *names: str) -> None:
    """Leave what a failed task leaves: its event and its row."""
    ledger = Ledger(run)
    for task in run.frozen().tasks:
        if task.id in (names or TASKS):
            write_part(run.path, bare_row(run, task, "failed", "a1", "cpu"), [], "a1")
            ledger.append(Event(Kind.TASK_FAILED, task=task.id, attempt="a1", status="failed"))
    ledger.close()


def _race(root: Path, start: Barrier, answers: SimpleQueue[Any], rounds: int) -> None:
    for turn in range(rounds):
        start.wait(LIMIT_S)
        joined = _join(root / str(turn))
        answers.put((turn, joined.run.run_id, joined.resumed, len(joined.open_tasks)))


def _raced(root: Path, rounds: int) -> list[Any]:
    """Have eight processes join the jobs of ``root``'s folders 0, 1, ... at once; return what each found in each."""
    start, answers = SPAWN.Barrier(PROCESSES), SPAWN.SimpleQueue()
    racers = [SPAWN.Process(target=_race, args=(root, start, answers, rounds)) for _ in range(PROCESSES)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(LIMIT_S)
    assert [racer.exitcode for racer in racers] == [0] * PROCESSES
    return [answers.get() for _ in range(PROCESSES * rounds)]


def _join_once(folder: Path) -> None:
    _join(folder)


def _ended(folder: Path) -> int | None:
    process = SPAWN.Process(target=_join_once, args=(folder,))
    process.start()
    process.join(LIMIT_S)
    return process.exitcode


def test_eight_processes_at_once_start_one_run_ten_times_over(tmp_path: Path) -> None:
    for turn in range(ROUNDS):
        _write_job(tmp_path / str(turn))
    got = _raced(tmp_path, ROUNDS)
    for turn in range(ROUNDS):
        mine = [answer for answer in got if answer[0] == turn]
        assert _runs(tmp_path / str(turn)) == [mine[0][1]]
        assert {answer[1] for answer in mine} == {mine[0][1]}
        assert sorted(answer[2] for answer in mine) == [False] + [True] * (PROCESSES - 1), "one of them made it"
        assert {answer[3] for answer in mine} == {len(TASKS)}
        assert _leftovers(tmp_path / str(turn)) == []


def test_who_is_killed_between_claim_and_folder_leaves_a_name_that_the_next_one_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_job(tmp_path)
    monkeypatch.setenv("DFMPC_FAULT", "after-claim=kill")
    assert _ended(tmp_path) == -signal.SIGKILL
    (claim,) = (tmp_path / "store/runs/.claims").iterdir()
    assert (_runs(tmp_path), claim.name[16:]) == ([], "-after-none")
    monkeypatch.delenv("DFMPC_FAULT")
    joined = _join(tmp_path)
    assert (_runs(tmp_path), joined.resumed) == ([claim.read_text()], False)
    assert joined.run.frozen().bytes == joined.bytes == {"a": 0, "b": 5}
    assert len(sweep(tmp_path / "store")) == 1, "what the dead one had prepared"
    assert _leftovers(tmp_path) == []


def test_each_finished_run_is_followed_by_one_new_run(tmp_path: Path) -> None:
    _write_job(tmp_path)
    first = _join(tmp_path)
    assert _join(tmp_path).run == first.run
    _fail(first.run)
    second = _join(tmp_path)
    assert (second.resumed, _runs(tmp_path)) == (False, [first.run.run_id, second.run.run_id])
    _fail(second.run)
    assert _join(tmp_path).run.run_id not in (first.run.run_id, second.run.run_id)
    claims = [path.name[17:] for path in Store(tmp_path / "store").claims.iterdir() if path.suffix != ".made"]
    assert sorted(claims) == [f"after-{first.run.run_id}", f"after-{second.run.run_id}", "after-none"]


def test_a_latecomer_that_saw_the_finished_run_joins_the_one_that_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_job(tmp_path)
    first = _join(tmp_path)
    _fail(first.run)
    second = _join(tmp_path)
    _fail(second.run, "a/r4", "b/r4")
    monkeypatch.setattr("dfmpc.run.resume.same_list", lambda *_: iter([first.run]))
    late = _join(tmp_path)
    assert (late.run, late.resumed, [task.id for task in late.open_tasks]) == (second.run, True, ["a/r8", "b/r8"])
    assert len(_runs(tmp_path)) == 2


def test_failed_tasks_of_the_newest_run_are_joined_on_request(tmp_path: Path) -> None:
    _write_job(tmp_path)
    first = _join(tmp_path)
    _fail(first.run)
    again = _join(tmp_path, retry_failed=True)
    assert (again.run, again.resumed, len(again.open_tasks)) == (first.run, True, 4)


def test_a_run_that_was_removed_is_not_made_again_under_its_old_name(tmp_path: Path) -> None:
    _write_job(tmp_path)
    first = _join(tmp_path)
    shutil.rmtree(first.run.path)
    second = _join(tmp_path)
    assert _runs(tmp_path) == [second.run.run_id]
    assert second.run.run_id > first.run.run_id
    assert _join(tmp_path).run == second.run


def test_a_hundred_runs_that_were_collected_since_yesterday_are_followed_by_one(tmp_path: Path) -> None:
    """Runs of one list may be made and collected every hour; eight processes look for the next name at once."""
    folder, gone = tmp_path / "0", []
    _write_job(folder)
    for _ in range(100):
        gone.append(_join(folder).run)
        shutil.rmtree(gone[-1].path)
    assert len({run.run_id for run in gone}) == 100
    got = _raced(tmp_path, 1)
    (run,) = _runs(folder)
    assert run > gone[-1].run_id
    assert {answer[1] for answer in got} == {run}
    assert sorted(answer[2] for answer in got) == [False] + [True] * (PROCESSES - 1), "one of them made it"
    assert _leftovers(folder) == []


def test_names_that_lead_back_are_told(tmp_path: Path) -> None:
    _write_job(tmp_path)
    first = _join(tmp_path).run
    shutil.rmtree(first.path)
    shutil.rmtree(_join(tmp_path).run.path)
    (claim,) = Store(tmp_path / "store").claims.glob(f"*-after-{first.run_id}")
    claim.write_text(first.run_id)
    with pytest.raises(StorageError, match=rf"the names lead back to {first.run_id}: remove this folder"):
        _join(tmp_path)


def test_a_run_whose_list_is_torn_is_passed_over(tmp_path: Path) -> None:
    _write_job(tmp_path)
    first = _join(tmp_path)
    first.run.tasks_file.write_text("{torn")
    second = _join(tmp_path)
    assert (second.resumed, second.run == first.run) == (False, False)
    assert _join(tmp_path).run == second.run


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (errno.EPERM, UsageError, r"\.claims is on a file system without hard links .*another --output"),
        (errno.ENOSPC, StorageError, r"the disk is full"),
    ],
    ids=["no-links", "full"],
)
def test_what_keeps_a_claim_from_being_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], text: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    _write_job(tmp_path)
    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(error, match=text):
        _join(tmp_path)
    assert (_runs(tmp_path), _leftovers(tmp_path)) == ([], [])


def test_a_claim_that_names_no_run_is_told_by_its_name(tmp_path: Path) -> None:
    _write_job(tmp_path)
    shutil.rmtree(_join(tmp_path).run.path)
    (claim,) = Store(tmp_path / "store").claims.glob("*-none")
    claim.write_text("../elsewhere")
    with pytest.raises(StorageError, match=r"-after-none names no run but '\.\./elsewhere': remove this file"):
        _join(tmp_path)


def test_a_rename_that_was_done_but_not_reported_makes_the_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS asks again when an answer is lost, and then does not find what it has renamed."""
    rename = os.rename

    def lost(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    _write_job(tmp_path)
    monkeypatch.setattr(os, "rename", lost)
    joined = _join(tmp_path)
    monkeypatch.undo()
    assert (_runs(tmp_path), len(joined.open_tasks)) == ([joined.run.run_id], len(TASKS))
    assert _join(tmp_path).run == joined.run
    assert _leftovers(tmp_path) == []
