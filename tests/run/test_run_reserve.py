"""Memory is promised before a task is given, and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from dfmpc.job.methods import RtnPlan
from dfmpc.job.schema import Gates
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.run.failures import History, Mode
from dfmpc.run.messages import Started, WorkerSettings
from dfmpc.run.schedule.board import Item
from dfmpc.run.schedule.reserve import Pool, Promises, available_host_bytes
from dfmpc.run.schedule.slots import AT_HAND, Slot


def test_promises_fit_up_to_the_capacity() -> None:
    pool = Pool(10.0)
    pool.take("a", 6.0)
    assert pool.fits("b", 4.0)
    assert not pool.fits("b", 4.1)
    pool.take("b", 4.0)
    assert pool.fits("a", 6.0)  # instead of what it has
    assert not pool.fits("a", 6.1)
    pool.free("b")
    assert pool.fits("a", 10.0)


def test_what_is_too_large_runs_by_itself() -> None:
    pool = Pool(10.0)
    assert pool.fits("a", 99.0)
    pool.take("a", 99.0)
    assert not pool.fits("b", 0.1)
    pool.free("a")
    assert pool.fits("b", 0.1)


def test_without_a_bound_everything_fits() -> None:
    pool = Pool(None)
    pool.take("a", 1e30)
    assert pool.fits("b", 1e30)


def test_one_who_is_alone_waits_for_the_others_and_then_keeps_them_out() -> None:
    pool = Pool(10.0)
    pool.take("a", 1.0)
    assert not pool.fits("b", 1.0, alone=True)
    pool.free("a")
    assert pool.fits("b", 1.0, alone=True)
    pool.take("b", 1.0, alone=True)
    assert not pool.fits("a", 1.0)
    pool.take("b", 1.0)  # its next one need not be alone
    assert pool.fits("a", 1.0)


def test_freeing_the_one_who_is_alone_lets_the_others_in() -> None:
    pool = Pool(10.0)
    pool.take("b", 1.0, alone=True)
    pool.free("b")
    assert pool.fits("a", 1.0)
    pool.free("nobody")
    assert pool.held == {}


PLAIN, ON_CPU = Mode(), Mode(on_cpu=True)


def slot(number: int, device: str = "cpu") -> Slot:
    settings = WorkerSettings(Path("run"), device, 1, (), None, Gates(), 0, 1)
    return Slot(settings, number)


def item(model: str, *, size: int = 1, host: float = 0.0, device: float = 0.0, mode: Mode = PLAIN) -> Item:
    source = ModelSource(name=model, factory="nets:net", checkpoint=f"{model}.safetensors", input=[1])
    task = Task(id=f"{model}/p", model=source, plan=RtnPlan(name="p", method="rtn", bits=4))
    return Item(task, size, host, device, History(mode))


def give(promises: Promises, to: Slot, it: Item) -> None:
    assert promises.possible(to, it)
    promises.make(to, it)
    to.given.append(it)


def test_the_host_is_shared_by_all_slots() -> None:
    promises, first, second = Promises(10.0, ["cpu"]), slot(0), slot(1)
    give(promises, first, item("a", host=7.0))
    assert not promises.possible(second, item("b", host=4.0))
    give(promises, second, item("b", host=3.0))
    promises.release(first)  # it is busy
    assert not promises.possible(second, item("b", host=4.0))
    first.given.clear()
    promises.release(first)
    assert promises.possible(second, item("b", host=10.0))


def test_a_large_task_that_ends_leaves_its_promise_to_others_though_small_ones_wait_behind_it() -> None:
    promises, first, second = Promises(100.0, ["cpu"]), slot(0), slot(1)
    large, small = item("large", host=95.0), item("small", host=5.0)
    give(promises, first, large)
    give(promises, first, small)
    assert not promises.possible(second, item("b", host=50.0))
    first.given.remove(large)
    promises.release(first)
    assert promises.possible(second, item("b", host=94.0))
    assert not promises.possible(second, item("b", host=96.0))


def test_what_has_ended_and_only_waits_to_be_reported_needs_no_memory() -> None:
    promises, first, second = Promises(100.0, ["cpu"]), slot(0), slot(1)
    for each in [item("large", host=95.0), *(item(f"small-{number}", host=5.0) for number in range(AT_HAND))]:
        give(promises, first, each)
        first.began(Started(each.task.id, "try"))
    promises.release(first)
    assert promises.possible(second, item("b", host=94.0))
    assert not promises.possible(second, item("b", host=96.0))


def test_a_gpu_that_a_worker_of_the_cpu_tells_of_is_nobodys() -> None:
    promises = Promises(10.0, ["cpu"])
    promises.learn("cpu", 80.0)
    assert promises.possible(slot(0), item("a", device=1e9))


def test_the_next_model_is_in_memory_beside_the_one_at_work() -> None:
    promises, first, second = Promises(10.0, ["cpu"]), slot(0), slot(1)
    give(promises, second, item("z", host=2.0))
    give(promises, first, item("a", size=1, host=5.0))
    assert promises.possible(first, item("a", size=1, host=8.0))  # the larger of two tasks of one model
    assert promises.possible(first, item("b", size=3, host=5.0))  # 5 and 3 read ahead
    assert not promises.possible(first, item("b", size=4, host=5.0))


def test_a_gpu_is_one_workers_until_its_memory_is_known() -> None:
    promises = Promises(None, ["cuda:0", "cuda:1"])
    first, second, elsewhere = slot(0, "cuda:0"), slot(1, "cuda:0"), slot(2, "cuda:1")
    give(promises, first, item("a", device=1.0))
    assert not promises.possible(second, item("b", device=1.0))
    assert promises.possible(elsewhere, item("b", device=1.0))
    promises.learn("cuda:0", 10.0)  # nine tenths of it may be promised
    assert promises.possible(second, item("b", device=8.0))
    assert not promises.possible(second, item("b", device=8.1))


def test_on_the_cpu_a_task_needs_nothing_of_its_slots_gpu() -> None:
    promises, first, second = Promises(None, ["cuda:0"]), slot(0, "cuda:0"), slot(1, "cuda:0")
    promises.learn("cuda:0", 10.0)
    give(promises, first, item("a", device=9.0))
    assert not promises.possible(second, item("b", device=1.0))
    assert promises.possible(second, item("b", device=1.0, mode=ON_CPU))
    give(promises, first, item("c", device=2.0, mode=ON_CPU))  # after the one that is on the GPU still
    assert not promises.possible(second, item("b", device=1.0))


def test_alone_means_on_the_whole_host() -> None:
    promises, first, second = Promises(100.0, ["cpu"]), slot(0), slot(1)
    give(promises, first, item("a", host=1.0))
    assert not promises.possible(second, item("b", host=1.0, mode=Mode(alone=True)))
    first.given.clear()
    promises.release(first)
    give(promises, second, item("b", host=1.0, mode=Mode(alone=True)))
    assert not promises.possible(first, item("c", host=1.0))
    second.given.clear()
    promises.release(second)
    assert promises.possible(first, item("c", host=1.0))


def test_what_may_be_promised_here_is_below_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_host_bytes()
    assert free is not None
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    total = next(float(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemTotal:"))
    assert 0 < free < 0.9 * total
    limits = iter([1_000_000.0, None])
    monkeypatch.setattr("dfmpc.run.schedule.reserve.memory_limit", lambda: next(limits))
    assert available_host_bytes() == 900_000
    unlimited = available_host_bytes()
    assert unlimited is not None
    assert 0.7 * free <= unlimited < 0.9 * total, "a limit of a container that these tests run in counts no more"
