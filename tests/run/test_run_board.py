"""Who gets which task next."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from dfmpc.job.methods import RtnPlan
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.run.failures import History, Mode
from dfmpc.run.schedule.board import Asker, Board, Item
from hypothesis import given, settings
from hypothesis import strategies as st


def item(model: str, plan: str, size: int = 1, *, alone: bool = False, not_before: float = 0.0) -> Item:
    source = ModelSource(name=model, factory="nets:net", checkpoint=f"{model}.safetensors", input=[1])
    task = Task(id=f"{model}/{plan}", model=source, plan=RtnPlan(name=plan, method="rtn", bits=4))
    return Item(task, size, 4.0 * size, 3.0 * size, History(Mode(alone=alone)), not_before)


def asker(
    model: str | None = None,
    others: Sequence[str] = (),
    may: Callable[[Item], bool] = lambda _: True,
    pays: Callable[[str, int], bool] = lambda _model, _count: True,
) -> Asker:
    return Asker(model, frozenset(others), may, pays)


def given_to(board: Board, who: Asker, now: float = 0.0) -> list[str]:
    """Return all that ``who`` gets, one after the other, by task id."""
    found = []
    while (taken := board.take(who, now)) is not None:
        found.append(taken.task.id)
    return found


def test_the_largest_model_comes_first_and_its_plans_in_their_order() -> None:
    board = Board([item("s", "p", 1), item("l", "p", 9), item("m", "p", 5), item("l", "q", 9), item("k", "p", 5)])
    assert given_to(board, asker()) == ["l/p", "l/q", "k/p", "m/p", "s/p"]
    assert not board
    assert len(board) == 0


def test_what_is_loaded_already_comes_before_what_is_larger() -> None:
    board = Board([item("l", "p", 9), item("s", "p", 1), item("s", "q", 1)])
    assert given_to(board, asker("s")) == ["s/p", "s/q", "l/p"]


def test_a_model_that_somebody_is_at_comes_after_every_other_and_from_its_end() -> None:
    board = Board([*(item("l", plan, 9) for plan in "pqr"), item("s", "p", 1)])
    assert given_to(board, asker(None, ["l"])) == ["s/p", "l/r", "l/q", "l/p"]


def test_help_goes_to_whom_most_is_left() -> None:
    board = Board([item("l", "p", 9), *(item("m", plan, 5) for plan in "pq"), *(item("s", plan, 1) for plan in "pqr")])
    first = board.take(asker(None, ["l", "m", "s"]), 0.0)
    assert first is not None
    assert first.task.id == "m/q"  # 10 bytes are left of m, 9 of l, 3 of s


def test_help_is_given_only_where_it_pays() -> None:
    asked = []

    def pays(model: str, waiting: int) -> bool:
        asked.append((model, waiting))
        return model == "s"

    board = Board([*(item("l", plan, 9) for plan in "pq"), *(item("s", plan, 1) for plan in "pq")])
    assert given_to(board, asker(None, ["l", "s"], pays=pays)) == ["s/q", "s/p"]
    assert asked[:2] == [("l", 2), ("s", 2)]
    assert [left.task.id for left in board.items()] == ["l/p", "l/q"]


def test_what_must_be_alone_comes_when_nothing_else_is_left() -> None:
    board = Board([item("l", "p", 9, alone=True), item("l", "q", 9), item("s", "p", 1)])
    assert given_to(board, asker("l")) == ["l/q", "s/p", "l/p"]


def test_what_may_not_be_given_stays_for_another() -> None:
    board = Board([item("l", "p", 9), item("l", "q", 9)])
    assert given_to(board, asker(may=lambda it: it.task.plan.name != "p")) == ["l/q"]
    assert given_to(board, asker()) == ["l/p"]


def test_a_retry_waits_for_its_time() -> None:
    board = Board([item("l", "p", 9)])
    late = item("s", "p", 1, not_before=10.0)
    board.put_back(late)
    assert board.wait_s(4.0) == 6.0
    assert given_to(board, asker(), now=9.9) == ["l/p"]
    assert bool(board)
    assert board.wait_s(10.0) is None
    assert board.take(asker(), 10.0) is late
    assert board.wait_s(0.0) is None


def test_the_first_of_several_that_wait_is_the_one_that_is_waited_for() -> None:
    board = Board([])
    for plan, when in (("p", 30.0), ("q", 10.0), ("r", 20.0)):
        board.put_back(item("s", plan, not_before=when))
    assert [board.wait_s(now) for now in (0.0, 10.0, 25.0, 30.0)] == [10.0, 10.0, 5.0, None]


def test_what_comes_back_is_the_next_of_its_model_and_keeps_the_order_of_models() -> None:
    board = Board([item("l", "p", 9), item("m", "p", 5), item("m", "q", 5)])
    first = board.take(asker("m"), 0.0)
    assert first is not None
    board.put_back(first)
    assert given_to(board, asker("m")) == ["m/p", "m/q", "l/p"]
    board.put_back(item("s", "p", 1))
    board.put_back(item("l", "p", 9))
    assert given_to(board, asker()) == ["l/p", "s/p"]


def test_what_is_withdrawn_is_gone() -> None:
    board = Board([item("l", "p", 9), item("s", "p", 1), item("s", "q", 1)])
    withdrawn = board.withdraw(lambda it: it.task.plan.name == "p")
    assert [it.task.id for it in withdrawn] == ["l/p", "s/p"]
    assert given_to(board, asker()) == ["s/q"]


ITEMS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.booleans(), st.sampled_from([0.0, 3.0, 7.0])), max_size=24
)


@settings(max_examples=150, deadline=None)
@given(wanted=ITEMS, slots=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_everything_is_given_exactly_once_whoever_asks_when(
    wanted: list[tuple[str, int, bool, float]], slots: int, seed: int
) -> None:
    chance = random.Random(seed)
    items = [
        item(model, str(number), ord(model), alone=alone, not_before=when)
        for number, (model, _, alone, when) in enumerate(wanted)
    ]
    board = Board([it for it in items if not it.not_before])
    for it in items:
        if it.not_before:
            board.put_back(it)
    holds: list[list[Item]] = [[] for _ in range(slots)]
    ended: list[str] = []
    now, idle_rounds = 0.0, 0
    while board or any(holds):
        number = chance.randrange(slots)
        held = holds[number]
        others = {it.model for other in holds if other is not held for it in other}
        taken = board.take(asker(held[-1].model if held else None, sorted(others)), now) if len(held) < 2 else None
        if taken is not None:
            assert taken.not_before <= now
            if chance.random() < 0.2:
                board.put_back(taken)  # its worker died
            else:
                held.append(taken)
        elif held:
            ended.append(held.pop(0).task.id)
        elif not any(holds):
            wait = board.wait_s(now)
            assert wait is not None, "something waits, nobody is at work, and nothing will wake anybody"
            now += wait
        idle_rounds += 1
        assert idle_rounds < 10_000
    assert sorted(ended) == sorted(it.task.id for it in items)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_its_length_is_what_waits(count: int) -> None:
    board = Board([item("a", str(number)) for number in range(count)])
    assert (len(board), bool(board), len(board.items())) == (count, count > 0, count)
