"""What follows where a Ray task comes back without an outcome: who is charged, by what the ledger says of it."""

from __future__ import annotations

from collections import Counter

from ...errors import DfmpcError, WorkerDiedError
from ..failures import Failure
from ..ledger import Event, Kind, read_events
from ..messages import Started
from ..schedule.board import Board
from ..schedule.tally import Tally
from .ray_fleet import Lane

_WITH_NODE = 5
"""How often a task may lose its node at no cost; after that it counts as a crash."""


class Losses:
    """Clears the lanes of what is lost, and has the tally charge it or the board take it back.

    ``known`` are the attempts of the run that are accounted for.
    """

    def __init__(self, board: Board, tally: Tally) -> None:
        self._board, self._tally = board, tally
        self._with_node: Counter[str] = Counter()
        self.known = {event.attempt for event in read_events(tally.run)}

    def with_node(self, lane: Lane, why: str) -> None:
        """Try again elsewhere at no cost, unless that has happened too often."""
        if lane.item is None:
            return
        item, started = lane.item, self.started(lane)
        self._with_node[item.task.id] += 1
        if self._with_node[item.task.id] > _WITH_NODE:
            error = WorkerDiedError(f"its node was lost {_WITH_NODE + 1} times, the last time: {why}")
            self.charge(lane, Failure.CRASH, error)
            return
        lane.clear()
        if started is None or not self._tally.finished_meanwhile([started]):
            self._board.put_back(item)
            self._tally.progress.note(f"{item.task.id}: tried again elsewhere at no cost: {why}")

    def charge(self, lane: Lane, failure: Failure, error: DfmpcError) -> None:
        """Charge the task, by the process's own last words in the ledger where there are some.

        What Ray says of a process that is gone is the same after SIGKILL, by the kernel for want of memory too, and
        after SIGSEGV (ray 2.60: WorkerCrashedError without fields; the exit detail of ray.util.state, which takes a
        dashboard, names these causes as possible). So a crash is tried again alone, as want of memory would be.
        """
        if lane.item is None:
            return
        item, started, device = lane.item, self.started(lane), lane.device
        lane.clear()
        attempts = {}
        if started is not None:
            attempts[item.task.id] = started
            said = self._last_words(started)
            if said is not None:
                failure, error, device = Failure(said.failure), WorkerDiedError(said.error), said.device
        if failure is Failure.CRASH:
            item.history.suspect()
        self._tally.lose([item], attempts, failure, error, device)

    def started(self, lane: Lane) -> Started | None:
        """Return the attempt that the lane's order has come to, by its signs or else by the ledger."""
        if lane.item is None:
            return None
        task = lane.item.task.id
        found = [lane.sign.attempt] if lane.sign is not None else self._begun(task)
        self.known.update(found)
        return Started(task, found[-1]) if found else None

    def _begun(self, task: str) -> list[str]:
        return [
            event.attempt
            for event in read_events(self._tally.run)
            if event.task == task and event.kind is Kind.TASK_STARTED and event.attempt not in self.known
        ]

    def _last_words(self, started: Started) -> Event | None:
        for event in read_events(self._tally.run):
            if event.kind is Kind.ATTEMPT_FAILED and event.attempt == started.attempt and event.failure:
                return event
        return None
