"""What follows from the end of a worker: which of its tasks pays for it, and which wait again."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ...errors import TaskTimeoutError, WorkerDiedError
from ..failures import Failure, classify_exit
from ..ledger import Event, Kind
from ..messages import Started
from .board import Board, Item
from .process import Ended
from .reserve import Promises
from .roster import Roster
from .slots import AT_HAND, Slot
from .tally import Tally

EXIT_GRACE_S = 5.0
"""How long a worker whose line broke may take to end by itself, so that its exit code is known."""


class Losses:
    """Ends workers, takes note of those that have ended, and puts back what they leave."""

    def __init__(self, board: Board, tally: Tally, promises: Promises, roster: Roster) -> None:
        self._board, self._tally, self._promises, self._roster = board, tally, promises, roster

    def bury(self, slot: Slot) -> None:
        """Take note that the worker of ``slot`` has ended by itself."""
        was_ready, idle = slot.ready, not slot.busy
        ended = self.drop(slot, EXIT_GRACE_S)
        self._tally.record(Event(Kind.WORKER_DIED, device=slot.device, error=ended.how))
        if not was_ready:
            self.false_start(slot, f"the worker on {slot.device} {ended.how} before it said a word")
        elif not idle:
            failure = Failure.CRASH if ended.code is None else classify_exit(ended.code)
            self.lose(slot, failure, WorkerDiedError(f"the worker {ended.how} while it was at this task"))

    def false_start(self, slot: Slot, why: str) -> None:
        """Put everything back; after some of these in a row the slot is given up."""
        self.drop(slot)
        self.put_back(slot)
        self._promises.release(slot)
        self._roster.false_start(slot, why, time.monotonic())

    def drop(self, slot: Slot, grace_s: float = 0.0) -> Ended:
        """End the worker of ``slot``; one that cannot be ended keeps the slot for good."""
        ended = slot.drop_worker(grace_s)
        if ended.lives:
            self._roster.give_up([slot], f"the worker on {slot.device} {ended.how}; slot {slot.number} is given up")
        return ended

    def lose(self, slot: Slot, failure: Failure, error: WorkerDiedError | TaskTimeoutError) -> None:
        """Charge what the worker was at; what it had not begun is free, and so are two of which one was to blame."""
        attempts = self.attempts(slot)
        begun = self._at_hand(slot, attempts) or slot.given[:1]
        for item in begun:
            slot.settle(item.task.id)
        self.put_back(slot)
        self._tally.lose(begun, attempts, failure, error, slot.device)
        self._promises.release(slot)

    def interrupt(self, slot: Slot) -> None:
        """End the worker of ``slot`` at once: what it was at is interrupted, and what is not finished waits again."""
        self.drop(slot)
        attempts = self.attempts(slot)
        for item in self._at_hand(slot, attempts):
            self._tally.interrupt(item, attempts[item.task.id], slot.device)
        self.put_back(slot)

    def put_back(self, slot: Slot) -> None:
        """Let what ``slot`` was given wait again, but for what its worker has finished without being heard."""
        finished = self._tally.finished_meanwhile(self.attempts(slot).values())
        for item in reversed(slot.given):
            if item.task.id not in finished:
                self._board.put_back(item)
        slot.given, slot.attempts = [], {}

    @staticmethod
    def _at_hand(slot: Slot, attempts: Mapping[str, Started]) -> list[Item]:
        return [item for item in slot.given if item.task.id in attempts][-AT_HAND:]

    def attempts(self, slot: Slot) -> dict[str, Started]:
        """Return what the worker of ``slot``, which is gone, had begun: it said so, or only the ledger knows."""
        return {**self._tally.begun_by(slot.pid, slot.born, slot.given), **slot.attempts}
