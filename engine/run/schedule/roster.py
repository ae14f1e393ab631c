"""Which slots may get work: those of a cordoned device, whose workers do not start or do not die, may not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .slots import Slot

FALSE_STARTS = 3
"""How many workers in a row may end before their first word until the slot is given up."""
REST_S = (1.0, 4.0)
"""Seconds before the second and third try to start a worker: what keeps it from starting may pass."""


class Roster:
    """The slots of a run. ``last_words`` say why the one that was given up last was."""

    def __init__(self, slots: Sequence[Slot], note: Callable[[str], None]) -> None:
        self.all, self.usable, self._note = list(slots), list(slots), note
        self.last_words = "no slot is usable"

    def can_work(self, slot: Slot, now: float) -> bool:
        """Tell whether ``slot`` may get a task at ``now`` (monotonic seconds)."""
        return slot in self.usable and slot.resting_until <= now

    def rest_s(self, now: float) -> float | None:
        """Return the seconds until the first of those that rest may work again; None where none rests."""
        return min((slot.resting_until - now for slot in self.usable if slot.resting_until > now), default=None)

    def false_start(self, slot: Slot, why: str, now: float) -> None:
        """Let ``slot`` rest after a worker that ended before it said a word; after some of these give it up."""
        slot.false_starts += 1
        if slot.false_starts >= FALSE_STARTS:
            self.give_up([slot], f"{why}; slot {slot.number} is given up")
        else:
            slot.resting_until = now + REST_S[slot.false_starts - 1]

    def cordon(self, devices: Collection[str]) -> None:
        """Give up the slots of ``devices``."""
        slots = [slot for slot in self.usable if slot.device in devices]
        names = ", ".join(sorted({slot.device for slot in slots}))
        self.give_up(slots, f"{names}: cordoned, as it failed under different tasks", told=True)

    def give_up(self, slots: Sequence[Slot], why: str, *, told: bool = False) -> None:
        """Give ``slots`` no more work."""
        for slot in slots:
            if slot in self.usable:
                self.usable.remove(slot)
                self.last_words = why
                if not told:
                    self._note(f"warning: {why}")
