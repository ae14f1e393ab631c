"""The loop that keeps the slots at work: hands out tasks, takes outcomes, buries dead workers, stops when it must."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

from ...errors import TaskTimeoutError, WorkerDiedError
from ..failures import Failure
from ..ledger import Event, Kind
from ..messages import Message, Ready, Recalled, Started, TaskOutcome
from .board import Board
from .deadline import Deadline
from .handing import Handing
from .interrupts import Interrupts
from .losses import EXIT_GRACE_S, Losses
from .reserve import Promises
from .roster import Roster
from .slots import Slot
from .tally import Tally, seconds_of

_LONGEST_WAIT_S = 3600.0
"""The system's own limit is 24 days."""
_LATE_S = 1.0
"""A wait that ends later than this was held up: by a stopped process, a frozen container, a suspended job."""


@dataclass(frozen=True)
class Limits:
    """Seconds: a task's longest time, the longest silence, and how long an ending run waits for what is at work."""

    task_s: float | None
    silent_s: float
    grace_s: float


class Dispatcher:
    """Runs the items of a board on slots, each with memory promised beforehand."""

    def __init__(
        self,
        slots: Sequence[Slot],
        board: Board,
        tally: Tally,
        promises: Promises,
        deadline: Deadline,
        limits: Limits,
        observe: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """``observe`` hears now and then how many tasks are at work and how many workers live."""
        self._slots, self._board, self._tally, self._promises = slots, board, tally, promises
        self._deadline, self._limits, self._observe = deadline, limits, observe
        self._roster = Roster(slots, tally.progress.note)
        self._losses = Losses(board, tally, promises, self._roster)
        self._handing = Handing(slots, board, tally, promises, deadline, self._roster, self._losses)

    def work(self, interrupts: Interrupts) -> str:
        """Do all that is on the board; return why some was left, in words, with the workers gone; empty if none was."""
        reason = ""
        try:
            while not reason and (self._board or self._busy()):
                # one time for all: what is not yet due when it could be handed out must be waited for below
                now, usable = time.monotonic(), len(self._roster.usable)
                self._handing.hand_out(now)
                if self._busy() or self._waiting_for_time(now):
                    self._show()
                    due = [self._board.wait_s(now), self._roster.rest_s(now), self._handing.call_back(now)]
                    self._await(interrupts, [*due, self._deadline.left_s()])
                    self._enforce_limits()
                    reason = self._reason_to_end(interrupts)
                elif len(self._roster.usable) == usable:  # else what was refused to others may be theirs now
                    reason = self._nobody_left()
            if reason:
                self._drain(interrupts, reason)
        finally:
            for slot in self._slots:
                self._losses.drop(slot)
        return reason if self._board else ""

    # waiting and hearing

    def _show(self) -> None:
        at_work = [item.task.id for slot in self._slots if (item := slot.at_work) is not None]
        self._tally.progress.running(at_work)
        self._observe(len(at_work), sum(slot.worker is not None for slot in self._slots))

    def _await(self, interrupts: Interrupts, waits: Sequence[float | None]) -> None:
        """Wait for a word, a dead worker, a signal, a limit, the next line of progress or the least of ``waits``."""
        slots: dict[object, Slot] = {sign: slot for slot in self._slots if slot.worker for sign in slot.worker.signs}
        began, wait_s = time.monotonic(), self._wait_s(waits)
        lines = [sign for slot in self._slots if slot.worker for sign in slot.worker.signs]
        found = wait([*lines, interrupts.fd], wait_s)
        self._excuse(time.monotonic() - began - wait_s)
        for ready in found:
            if ready == interrupts.fd:
                interrupts.clear()
            elif slots[ready].worker is not None:
                self._receive(slots[ready])

    def _wait_s(self, waits: Sequence[float | None]) -> float:
        now = time.monotonic()
        ends = [slot.deadline(self._limits.task_s) for slot in self._slots]
        ends += [slot.heard + self._limits.silent_s for slot in self._slots if slot.busy]
        left = [*waits, self._tally.progress.wait_s, *(end - now for end in ends if end is not None)]
        return max(0.0, min([_LONGEST_WAIT_S, *(each for each in left if each is not None)]))

    def _excuse(self, late_s: float) -> None:
        """Count nothing against the workers while this process was stopped: they may have been. Silence begins anew."""
        if late_s > _LATE_S:
            for slot in self._slots:
                slot.heard, slot.since = time.monotonic(), slot.since + late_s

    def _receive(self, slot: Slot) -> None:
        messages = slot.worker.receive() if slot.worker else None
        if messages is None:
            self._losses.bury(slot)
            return
        slot.ready, slot.false_starts = True, 0
        if not all(isinstance(message, Recalled) for message in messages):  # to that another thread than work's answers
            slot.heard = time.monotonic()
        for message in messages:
            self._hear(slot, message)
        if any(isinstance(message, (TaskOutcome, Recalled)) for message in messages):
            self._promises.release(slot)

    def _hear(self, slot: Slot, message: Message) -> None:
        if isinstance(message, Started):
            slot.began(message)
        elif isinstance(message, TaskOutcome):
            self._take(slot, message)
        elif isinstance(message, Recalled):
            for item in reversed(slot.recall(message.tasks)):
                self._board.put_back(item)
        elif isinstance(message, Ready) and message.device_bytes is not None:
            self._promises.learn(slot.device, message.device_bytes)

    def _take(self, slot: Slot, outcome: TaskOutcome) -> None:
        item = slot.settle(outcome.row.task, seconds_of(outcome.row) if outcome.failure is None else None)
        if item is None:
            return
        self._tally.take(item, outcome)
        if outcome.poisoned:
            self._losses.drop(slot, EXIT_GRACE_S)
            self._losses.put_back(slot)
            self._roster.cordon(self._tally.cordoned)

    # ends of workers

    def _enforce_limits(self) -> None:
        now, limit_s, silent_s = time.monotonic(), self._limits.task_s, self._limits.silent_s
        for slot in self._slots:
            deadline = slot.deadline(limit_s)
            silent = slot.busy and now >= slot.heard + silent_s
            late = deadline is not None and now >= deadline
            if not (silent or late) or slot.worker is None or slot.worker.has_word():
                continue  # what has come meanwhile is heard first
            self._losses.drop(slot)
            if silent:
                text = f"no sign of work for {silent_s:g} s (resources.stuck_after): the worker was killed"
                self._losses.lose(slot, Failure.STUCK, WorkerDiedError(text))
            else:
                text = f"not finished after {limit_s:g} s (resources.task_timeout): raise it, or leave the task out"
                self._losses.lose(slot, Failure.TIMEOUT, TaskTimeoutError(text))

    # ends of the run

    def _reason_to_end(self, interrupts: Interrupts) -> str:
        if interrupts.received is not None:
            return f"interrupted by {interrupts.received}"
        if self._tally.full:
            return f"stopped: {self._tally.full}"
        left = self._deadline.left_s()
        if left is not None and left <= 0:
            return "stopped by --deadline"
        return ""

    def _waiting_for_time(self, now: float) -> bool:
        """Tell whether something will be handed out later although nobody is at work now."""
        return self._roster.rest_s(now) is not None or (
            self._board.wait_s(now) is not None and bool(self._roster.usable)
        )

    def _nobody_left(self) -> str:
        """Nobody is at work and nothing can be handed out: too little time is left, or no slot is usable."""
        if self._roster.usable:
            return "stopped by --deadline: what is left would not end in time"
        return f"stopped, as nobody is left to work: {self._roster.last_words}"

    def _drain(self, interrupts: Interrupts, reason: str) -> None:
        """Call back what has not begun and give what has its time of grace; a second signal ends at once."""
        end = time.monotonic() + self._limits.grace_s
        for slot in self._slots:
            if slot.busy:
                slot.call_back()
        at_work = sum(len(slot.attempts) for slot in self._slots)
        if at_work:
            grace = f"up to {self._limits.grace_s:g} s for {at_work} at work; a second signal ends at once"
            self._tally.progress.note(f"{reason.partition(':')[0]}: {grace}")  # the whole reason is the last line
        while self._busy() and not interrupts.again and time.monotonic() < end:
            self._show()
            self._await(interrupts, [end - time.monotonic()])
            self._enforce_limits()
        for slot in self._slots:
            self._losses.interrupt(slot)
        self._tally.record(Event(Kind.INTERRUPTED))

    def _busy(self) -> bool:
        return any(slot.busy for slot in self._slots)
