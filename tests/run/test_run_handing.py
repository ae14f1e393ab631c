"""How many tasks wait at a worker, what is called back from there, and who pays for what it began unheard."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dfmpc.job.methods import RtnPlan
from dfmpc.job.schema import Gates
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.run.failures import Failure, History
from dfmpc.run.ledger import Event, Kind, Ledger, fold
from dfmpc.run.messages import Alive, Recall, Recalled, RunTask, Started, WorkerSettings
from dfmpc.run.outcome import bare_row
from dfmpc.run.schedule import slots as slots_module
from dfmpc.run.schedule import tally as tally_module
from dfmpc.run.schedule.board import Board, Item
from dfmpc.run.schedule.deadline import Deadline
from dfmpc.run.schedule.dispatch import Dispatcher, Limits
from dfmpc.run.schedule.handing import Handing
from dfmpc.run.schedule.losses import Losses
from dfmpc.run.schedule.process import Ended
from dfmpc.run.schedule.progress import Progress
from dfmpc.run.schedule.reserve import Promises
from dfmpc.run.schedule.roster import Roster
from dfmpc.run.schedule.slots import AT_HAND, Slot, make_slots
from dfmpc.run.schedule.spares import Spares
from dfmpc.run.schedule.tally import Rules, Tally, seconds_of
from dfmpc.run.store import RunFolder


class Post:
    """A worker's place in the scheduler: keeps the words that are sent to it."""

    def __init__(self, *_: object) -> None:
        self.words: list[tuple[object, ...]] = []
        self.pid = os.getpid()
        self.answer: object = None

    def send(self, *messages: object) -> None:
        self.words.append(messages)

    def receive(self) -> tuple[object, ...]:
        return (self.answer,)

    def kill(self, grace_s: float = 0.0) -> Ended:  # noqa: ARG002 - the scheduler passes it
        return Ended(-11, "was ended by SIGSEGV")

    @property
    def orders(self) -> list[list[str]]:
        """The ids of the tasks of each word that has some."""
        found = [[each.task.id for each in word if isinstance(each, RunTask)] for word in self.words]
        return [ids for ids in found if ids]


class Desk:
    """Slots, a board of ``count`` models with one plan each, and who hands it out; no worker ever answers by itself."""

    def __init__(self, folder: Path, count: int, slots: int = 2) -> None:
        self.run = RunFolder(folder / "runs" / "20260101T000000000000Z-00000000")
        (self.run.path / "ledger").mkdir(parents=True)
        self.ledger = Ledger(self.run)
        self.items = {item.task.id: item for item in (_item(f"m{number:03}") for number in range(count))}
        self.board = Board(self.items.values())
        self.deadline = deadline = Deadline(None, 0.0)
        progress = Progress(dict.fromkeys(self.items, 1), shown=False)
        self.tally = Tally(self.run, self.board, self.ledger, progress, deadline, Rules())
        devices = ["cpu"] * slots
        self.slots = make_slots(
            Spares(devices), WorkerSettings(self.run.path, "cpu", 1, (), None, Gates(), 0, os.getpid())
        )
        self.slots = [replace(slot, number=number) for number, slot in enumerate(self.slots)]
        promises, self.roster = Promises(None, devices), Roster(self.slots, progress.note)
        self.losses = Losses(self.board, self.tally, promises, self.roster)
        self.handing = Handing(self.slots, self.board, self.tally, promises, deadline, self.roster, self.losses)

    def orders(self, number: int) -> list[list[str]]:
        worker = self.slots[number].worker
        assert isinstance(worker, Post)
        return worker.orders

    def begin(self, slot: Slot, count: int = 1) -> None:
        """Have the worker of ``slot`` begin what was given first."""
        for item in [each for each in slot.given if each.task.id not in slot.attempts][:count]:
            slot.began(Started(item.task.id, f"try-{item.model}"))

    def end(self, slot: Slot, seconds: float) -> None:
        """Have the worker of ``slot`` end all that it has begun, each after ``seconds``."""
        for task in list(slot.attempts):
            slot.settle(task, seconds)


def _item(model: str) -> Item:
    source = ModelSource(name=model, factory="nets:net", checkpoint=f"{model}.safetensors", input=[1])
    return Item(Task(id=f"{model}/p", model=source, plan=RtnPlan(name="p", method="rtn", bits=4)), 1, 4.0, 3.0)


@pytest.fixture(autouse=True)
def posts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "WorkerProcess", Post)


def _after_short_ones(desk: Desk, seconds: float) -> None:
    """Give every slot two tasks, and let the first end after ``seconds``."""
    desk.handing.hand_out(0.0)
    for slot in desk.slots:
        desk.begin(slot)
        desk.end(slot, seconds)
        desk.begin(slot)
    desk.handing.hand_out(0.0)


@pytest.mark.parametrize(("seconds", "waiting"), [(0.005, 16), (0.02, 5), (0.06, 1), (5.0, 1)])
def test_tasks_that_end_at_once_wait_at_their_worker_and_come_in_one_word(
    tmp_path: Path, seconds: float, waiting: int
) -> None:
    desk = Desk(tmp_path, 200)
    _after_short_ones(desk, seconds)
    for number, slot in enumerate(desk.slots):
        assert (slot.waiting, [len(word) for word in desk.orders(number)]) == (waiting, [2, waiting])
        desk.begin(slot, waiting // 2 - 1)
    desk.handing.hand_out(0.0)
    assert [len(desk.orders(number)) for number in (0, 1)] == [2, 2], "nothing is given while enough waits"


def test_the_last_tasks_are_shared_out(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 24)
    _after_short_ones(desk, 0.001)
    assert [slot.waiting for slot in desk.slots] == [5, 3], "a quarter of what is left, whoever asks"
    while desk.board:
        for slot in desk.slots:
            desk.begin(slot, 99)
        desk.handing.hand_out(0.0)
        assert all(slot.waiting <= max(1, len(desk.board)) for slot in desk.slots)


def test_a_task_that_failed_or_took_long_ends_the_giving_ahead(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 200, slots=1)
    _after_short_ones(desk, 0.001)
    (slot,) = desk.slots
    desk.begin(slot, 99)
    slot.settle(slot.given[0].task.id, None)
    desk.handing.hand_out(0.0)
    assert slot.waiting == 1


def test_what_waits_behind_a_long_task_is_called_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 200)
    _after_short_ones(desk, 0.001)
    stuck, idle = desk.slots
    desk.board.withdraw(lambda item: item.model != "m199")  # something is left that nobody may take
    for item in list(idle.given):
        idle.settle(item.task.id, 0.001)
    now = stuck.moved
    assert desk.handing.call_back(now) == pytest.approx(1.0)
    assert desk.handing.call_back(now + 1.5) is None
    assert desk.handing.call_back(now + 1.6) is None, "it is asked once"
    desk.board.withdraw(lambda _: True)
    worker = stuck.worker
    assert isinstance(worker, Post)
    assert [word for word in worker.words if isinstance(word[0], Recall)] == [(Recall(),)]

    waiting = [item.task.id for item in stuck.given if item.task.id not in stuck.attempts]
    for item in stuck.recall(waiting):
        desk.board.put_back(item)
    desk.handing.hand_out(now)
    assert (len(waiting), stuck.waiting, idle.waiting, len(desk.board)) == (16, 1, 4, 11)


def _recalls(slot: Slot) -> list[tuple[object, ...]]:
    worker = slot.worker
    assert isinstance(worker, Post)
    return [word for word in worker.words if isinstance(word[0], Recall)]


def test_what_waits_at_a_device_that_was_cordoned_is_called_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 200)
    desk.handing.hand_out(0.0)
    other, slot = desk.slots
    for each in desk.slots:
        desk.begin(each)
    assert (slot.waiting, desk.handing.call_back(0.0)) == (1, None)
    desk.roster.give_up([slot], "cordoned")
    desk.handing.call_back(0.0)
    assert (_recalls(slot), _recalls(other)) == ([(Recall(),)], [])


def test_what_is_just_beginning_is_not_asked_for_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 4, slots=1)
    desk.handing.hand_out(0.0)
    (slot,) = desk.slots
    desk.roster.give_up([slot], "cordoned")
    desk.handing.call_back(0.0)
    assert slot.recall([]) == [], "the worker has taken it, and has not said so yet"
    desk.handing.call_back(0.0)
    assert len(_recalls(slot)) == 1
    desk.begin(slot)
    desk.handing.call_back(0.0)
    assert len(_recalls(slot)) == 2, "another one may wait behind it"


def test_that_nothing_is_given_back_is_no_sign_of_work(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 4, slots=1)
    desk.handing.hand_out(0.0)
    (slot,) = desk.slots
    limits, promises = Limits(task_s=None, silent_s=60.0, grace_s=0.0), Promises(None, ["cpu"])
    dispatcher = Dispatcher(desk.slots, desk.board, desk.tally, promises, desk.deadline, limits)
    assert isinstance(slot.worker, Post)
    for message, heard in ((Recalled(()), False), (Alive(), True)):
        slot.heard, slot.worker.answer = 0.0, message
        dispatcher._receive(slot)
        assert (slot.heard > 0.0) is heard


def test_what_could_begin_too_late_for_the_deadline_is_called_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 4, slots=1)
    desk.handing.hand_out(0.0)
    (slot,) = desk.slots
    desk.begin(slot)
    desk.deadline.at = time.time() + 60
    assert desk.handing.call_back(0.0) == pytest.approx(60, abs=5), "of no task is known how long it takes"
    desk.deadline.observe("p", 1, 30.0)
    assert desk.handing.call_back(0.0) == pytest.approx(15, abs=5)
    desk.deadline.observe("p", 1, 50.0)
    desk.handing.call_back(0.0)
    assert (slot.waiting, _recalls(slot)) == (1, [(Recall(),)])


def test_the_ledger_is_read_once_for_all_that_a_worker_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, 200, slots=1)
    _after_short_ones(desk, 0.001)
    (slot,) = desk.slots
    desk.begin(slot, 16)
    for item in slot.given:
        desk.ledger.append(Event(Kind.TASK_FINISHED, task=item.task.id, attempt=f"try-{item.model}", status="done"))
    read: list[RunFolder] = []
    monkeypatch.setattr(tally_module, "fold", lambda run: (read.append(run), fold(run))[1])
    tasks = {item.task.id for item in slot.given}
    desk.losses.put_back(slot)
    assert (len(tasks), desk.tally.settled) == (17, tasks)
    assert len(read) == 2, "what was begun, and what was finished"


def test_what_a_worker_began_unheard_is_charged_and_what_it_did_not_begin_is_free(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 200, slots=1)
    _after_short_ones(desk, 0.001)
    (slot,) = desk.slots
    slot.ready = True
    first, second, third, *rest = [item.task.id for item in slot.given]
    said = slot.attempts[first].attempt
    for task in (first, second, third):
        desk.ledger.append(Event(Kind.TASK_STARTED, task=task, attempt=said))
    for task in (first, second):  # kept, but not said
        desk.ledger.append(Event(Kind.TASK_FINISHED, task=task, attempt=said, status="reused"))
    desk.losses.bury(slot)
    assert (slot.given, desk.tally.settled) == ([], {first, second})
    assert desk.items[third].history.counts == {Failure.CRASH: 1}
    assert {str(desk.items[task].history) for task in rest} == {str(History())}
    waiting = {item.task.id for item in desk.board.items()}
    assert waiting == desk.items.keys() - {"m000/p", first, second}


def test_of_many_that_were_begun_only_the_last_can_have_ended_the_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path, 200, slots=1)
    _after_short_ones(desk, 0.001)
    (slot,) = desk.slots
    slot.ready = True
    desk.begin(slot, 12)
    begun = [item.task.id for item in slot.given if item.task.id in slot.attempts]
    given = [item.task.id for item in slot.given]
    desk.losses.bury(slot)
    alone = [task for task in given if desk.items[task].history.mode.alone]
    assert (len(begun), alone) == (13, begun[-AT_HAND:])
    said = capsys.readouterr().err
    assert [task for task in given if task in said] == alone
    assert {item.task.id for item in desk.board.items()} == desk.items.keys() - {"m000/p"}


def test_what_is_cut_short_and_had_ended_before_waits_again_without_a_row(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 200, slots=1)
    _after_short_ones(desk, 0.001)
    (slot,) = desk.slots
    desk.begin(slot, 12)
    begun = [item.task.id for item in slot.given if item.task.id in slot.attempts]
    done = begun[-1]
    desk.ledger.append(Event(Kind.TASK_FINISHED, task=done, attempt=slot.attempts[done].attempt, status="done"))
    desk.losses.interrupt(slot)
    assert {task: row.status for task, row in desk.tally.rows.items()} == dict.fromkeys(begun[-3:-1], "interrupted")
    assert desk.tally.settled == {done}
    assert {item.task.id for item in desk.board.items()} == desk.items.keys() - {"m000/p", done}


def test_what_failed_here_before_and_waits_again_has_not_begun(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 2, slots=1)
    _, again = desk.items.values()
    desk.ledger.append(Event(Kind.TASK_STARTED, task=again.task.id, attempt="old"))
    desk.ledger.append(Event(Kind.ATTEMPT_FAILED, task=again.task.id, attempt="old", error="I/O"))
    desk.handing.hand_out(0.0)
    (slot,) = desk.slots
    slot.ready = True
    desk.begin(slot)
    guilty = slot.given[0]
    assert desk.losses.attempts(slot).keys() == {guilty.task.id}
    desk.losses.bury(slot)
    assert guilty.history.counts == {Failure.CRASH: 1}
    assert again.history.counts == {}


def test_a_model_that_was_called_back_is_nobodys(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 200)
    _after_short_ones(desk, 0.001)
    stuck, _ = desk.slots
    at_work = stuck.at_work
    assert at_work is not None
    assert stuck.model != at_work.model
    stuck.recall([item.task.id for item in stuck.given if item is not at_work])
    assert stuck.model == at_work.model


def test_an_attempt_of_an_earlier_process_of_the_same_number_is_nobodys(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 4, slots=1)
    item = desk.items["m000/p"]
    desk.ledger.append(Event(Kind.TASK_STARTED, task=item.task.id, attempt="old"))
    now = datetime.now(UTC)
    later = now + timedelta(seconds=5)
    assert desk.tally.begun_by(os.getpid(), later, [item]) == {}
    assert desk.tally.begun_by(os.getpid() + 1, now - timedelta(hours=1), [item]) == {}
    found = desk.tally.begun_by(os.getpid(), now - timedelta(hours=1), [item])
    assert found == {item.task.id: Started(item.task.id, "old")}
    assert fold(desk.run)[item.task.id].attempts == 1


def test_a_task_that_may_have_begun_unheard_has_a_little_longer(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 200, slots=1)
    desk.handing.hand_out(0.0)
    (slot,) = desk.slots
    slot.ready = True
    desk.begin(slot)
    assert slot.waiting == 1
    end = slot.deadline(10.0)
    assert end == pytest.approx(slot.since + 10.0)
    desk.end(slot, 0.001)
    desk.begin(slot)
    desk.handing.hand_out(0.0)
    assert slot.deadline(10.0) == pytest.approx(slot.since + 12.0)


def test_the_time_of_a_task_is_that_of_all_its_steps(tmp_path: Path) -> None:
    desk = Desk(tmp_path, 1)
    row = bare_row(desk.run, desk.items["m000/p"].task, "done", "a", "cpu")
    assert seconds_of(replace(row, read_s=1.0, compress_s=2.0, write_s=0.5, evaluate_s=None)) == 3.5
