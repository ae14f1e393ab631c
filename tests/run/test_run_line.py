"""What goes over the line between a worker and its scheduler: words that wait for one another, tasks that go back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest
from dfmpc.job.methods import RtnPlan
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.run.messages import Alive, Ready, Recall, Recalled, RunTask, Started
from dfmpc.run.worker.line import Inbox, Line


class Ends:
    """Both ends of a line."""

    def __init__(self) -> None:
        self.scheduler, worker = Pipe()
        self._worker: Connection = worker
        self.line = Line(worker)

    def heard(self) -> list[tuple[object, ...]]:
        """Return the words that have come to the scheduler."""
        found = []
        while self.scheduler.poll():
            found.append(self.scheduler.recv())
        return found


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.scheduler.close()


def order(model: str, plan: str = "p") -> RunTask:
    source = ModelSource(name=model, factory="nets:net", checkpoint=f"{model}.safetensors", input=[1])
    return RunTask(Task(id=f"{model}/{plan}", model=source, plan=RtnPlan(name=plan, method="rtn", bits=4)))


def test_what_is_held_goes_before_what_comes_next_and_in_one_word(ends: Ends) -> None:
    first, second = Started("a/p", "1"), Started("b/p", "2")
    ends.line.hold(first)
    ends.line.hold(second)
    assert ends.heard() == []
    ends.line.send(Alive())
    assert ends.heard() == [(first, second, Alive())]
    ends.line.flush()
    assert ends.heard() == []
    ends.line.hold(first)
    ends.line.flush()
    ends.line.send(Ready())
    assert ends.heard() == [(first,), (Ready(),)]


def test_a_scheduler_that_is_gone_is_no_error(ends: Ends) -> None:
    ends.scheduler.close()
    ends.line.hold(Started("a/p", "1"))
    ends.line.flush()
    ends.line.send(Alive())
    assert ends.line.receive() is None


class Listening:
    """An inbox, and a sign for every word that has come."""

    def __init__(self, ends: Ends) -> None:
        self._words = threading.Semaphore(0)
        self._ends = ends
        self.inbox = Inbox(ends.line, arrived=self._words.release)

    def send(self, *messages: object) -> None:
        self._ends.scheduler.send(messages)
        assert self._words.acquire(timeout=30)


def test_tasks_that_were_not_begun_go_back_all_at_once(ends: Ends) -> None:
    it = Listening(ends)
    it.send(order("a"), order("b"), order("c"))
    begun = it.inbox.next()
    assert begun is not None
    assert (begun.task.id, len(it.inbox)) == ("a/p", 2)
    it.send(Recall(), order("d"))
    assert ends.heard() == [(Recalled(("b/p", "c/p")),)]
    left = it.inbox.next()
    assert left is not None
    assert left.task.id == "d/p"
    ends.scheduler.close()
    assert it.inbox.next() is None


def test_the_model_that_is_read_next_is_the_first_that_is_neither_at_work_nor_still_to_be_read(ends: Ends) -> None:
    it = Listening(ends)
    assert it.inbox.model_after(None) is None
    it.send(order("a"), order("a", "q"), order("b"), order("c"))

    def model(name: str) -> ModelSource:
        return order(name).task.model

    assert it.inbox.model_after(None) == model("a")
    it.inbox.next()
    assert it.inbox.model_after(None) is None, "the one at work is not read yet"
    assert it.inbox.model_after(model("a")) == model("b")
    it.inbox.next()
    assert it.inbox.model_after(model("a")) == model("b")
    it.inbox.next()
    assert it.inbox.model_after(model("a")) is None
    assert it.inbox.model_after(model("b")) == model("c")
