"""A worker whose device breaks tells what it has done before it ends. No device is needed: torch's words are put on."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.run.claims import start_run
from dfmpc.run.failures import Failure
from dfmpc.run.ledger import fold
from dfmpc.run.messages import Message, Ready, RunTask, TaskOutcome, WorkerSettings
from dfmpc.run.store import Store, freeze
from dfmpc.run.worker import make
from dfmpc.run.worker.line import Line
from dfmpc.run.worker.main import Worker
from dfmpc.run.worker.pinned import allocator


def _refuses(*_: object) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


PutOn = Callable[[Callable[..., Any]], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PutOn:
    """Return what makes torch say that a GPU was computed on, whose memory is what the argument returns."""

    def put_on(memory: Callable[..., Any]) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)

    return put_on


class Heard(Line):
    """A line to a worker that has one task to do; it is closed with the task's outcome."""

    def __init__(self, bench: Any) -> None:
        loaded = load_job(bench.job([bench.model("net")], [{"name": "r4", "method": "rtn", "bits": 4}]))
        (task,), store = expand(loaded), Store(loaded.store)
        store.prepare()
        self.run = start_run(store, freeze(loaded, [task])).run
        self.settings = WorkerSettings(self.run.path, "cpu", 1, (), None, loaded.job.gates, 0, 0)
        self.said: list[Message] = []
        self._ours, theirs = Pipe()
        self._ours.send((RunTask(task),))
        super().__init__(theirs)

    def send(self, *messages: Message) -> None:
        self.said += messages
        if any(isinstance(message, TaskOutcome) for message in messages):
            self._ours.close()

    @property
    def outcome(self) -> TaskOutcome:
        (found,) = (message for message in self.said if isinstance(message, TaskOutcome))
        return found

    @property
    def device_bytes(self) -> list[float]:
        ready = (message.device_bytes for message in self.said if isinstance(message, Ready))
        return [size for size in ready if size is not None]


def test_a_device_that_works_is_announced_once_something_was_done(bench: Any, gpu: PutOn) -> None:
    gpu(lambda *_: (1, 2))
    line = Heard(bench)
    Worker(line.settings, line).serve()
    assert (line.outcome.row.status, line.device_bytes) == ("done", [2.0])


def test_a_poisoned_worker_asks_nothing_of_its_device_and_tells_its_failure(
    bench: Any, gpu: PutOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(_refuses)
    monkeypatch.setattr(make, "compress_model", _refuses)
    line = Heard(bench)
    Worker(line.settings, line).serve()
    assert (line.outcome.failure, line.device_bytes) == (Failure.POISONED, [])


def test_a_device_that_breaks_between_tasks_costs_nothing_that_was_done(bench: Any, gpu: PutOn) -> None:
    gpu(_refuses)
    line = Heard(bench)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Worker(line.settings, line).serve()
    assert (line.outcome.row.status, line.outcome.failure) == ("done", None)
    assert [state.status for state in fold(line.run).values()] == ["done"]


def test_where_no_memory_can_be_locked_ordinary_pages_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def empty(size: int, **how: object) -> Any:
        asked.append({"size": size, **how})
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    allocate = allocator("cuda:0")
    assert allocate is not None
    data = allocate(5000)
    assert (len(data), data.readonly, bytes(data)) == (5000, False, bytes(5000))
    assert asked == [{"size": 5000, "dtype": torch.uint8, "pin_memory": True}]
