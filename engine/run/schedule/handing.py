"""Handing out: which slot gets which task of the board, how many at a time, and what is called back for others."""

from __future__ import annotations

from collections.abc import Sequence

from .board import Asker, Board, Item
from .deadline import Deadline
from .losses import Losses
from .reserve import Promises
from .roster import Roster
from .slots import Slot
from .tally import Tally

_LONG_S = 1.0
"""A worker that is at one task for so long does not soon begin those that wait behind it."""


class Handing:
    """Gives the slots what is on the board, each with memory promised beforehand."""

    def __init__(
        self,
        slots: Sequence[Slot],
        board: Board,
        tally: Tally,
        promises: Promises,
        deadline: Deadline,
        roster: Roster,
        losses: Losses,
    ) -> None:
        self._slots, self._board, self._tally, self._promises = slots, board, tally, promises
        self._deadline, self._roster, self._losses = deadline, roster, losses

    def hand_out(self, now: float) -> None:
        """Give every idle slot a task, then every busy one what it will soon begin; ``now``: monotonic seconds."""
        for slot in self._slots:
            while self._roster.can_work(slot, now) and not slot.busy and self._give(slot, now):
                pass
        for slot in self._slots:
            wanted = slot.wants(self._fair) if slot.busy and self._board else 0
            while wanted > 0 and self._roster.can_work(slot, now) and self._give(slot, now):
                wanted -= 1
        for slot in self._slots:
            slot.send()

    def call_back(self, now: float) -> float | None:
        """Call back what must not wait at its worker any longer; return the seconds until that may be due."""
        left = []
        for slot in self._slots:
            seconds = self._may_wait_s(slot, now) if slot.waiting and not slot.called_back else None
            if seconds is not None and seconds <= 0:
                slot.call_back()
            elif seconds is not None:
                left.append(seconds)
        return min(left, default=None)

    def _may_wait_s(self, slot: Slot, now: float) -> float | None:
        """Return for how long what waits at ``slot`` may stay there; None: until its turn comes.

        Behind a long task others may be glad of it, and memory was promised for it. By its turn its device may have
        been cordoned, or the time that is left too short for it.
        """
        if slot not in self._roster.usable:
            return 0.0
        limits = [self._deadline.slack_s(item.task.plan.name, item.bytes) for item in slot.not_begun]
        limits.append(slot.moved + _LONG_S - now if slot.crowded else None)
        return min((seconds for seconds in limits if seconds is not None), default=None)

    @property
    def _fair(self) -> int:
        """How many tasks may wait at one slot so that no other runs dry before it: fewer as the end comes nearer."""
        return len(self._board) // (2 * len(self._slots))

    def _give(self, slot: Slot, now: float) -> bool:
        """Give ``slot`` what is next for it; False where there is nothing. A worker may fail to start on it."""
        item = self._next_for(slot, now)
        if item is None:
            return False
        self._promises.make(slot, item)
        try:
            slot.give(item)
        except OSError as error:
            self._board.put_back(item)
            self._losses.false_start(slot, f"no worker could be started on {slot.device}: {error}")
        return True

    def _next_for(self, slot: Slot, now: float) -> Item | None:
        if slot.given and slot.given[-1].history.mode.alone:
            return None

        def may(item: Item) -> bool:
            if item.history.mode.alone and slot.busy:
                return False
            if slot.device in item.avoid and any(other.device not in item.avoid for other in self._roster.usable):
                return False
            if not self._deadline.allows(item.task.plan.name, item.bytes):
                return False
            return self._promises.possible(slot, item)

        others = frozenset(other.model for other in self._slots if other is not slot and other.busy and other.model)
        pays = self._tally.pays(started=slot.worker is not None)
        return self._board.take(Asker(slot.model, others, may, pays), now)
