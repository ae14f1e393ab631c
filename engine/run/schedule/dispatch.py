"""The loop that keeps the slots at work: hands out tasks, takes outcomes, buries dead workers, stops when it must."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

from ...errors import TaskTimeoutError, WorkerDiedError
from ..failures import Failure, classify_exit
from ..ledger import Event, Kind
from ..messages import Ready, Recall, Recalled, Started, TaskOutcome
from .board import Asker, Board, Item
from .deadline import Deadline
from .interrupts import Interrupts
from .process import Ended
from .reserve import Promises
from .roster import Roster
from .slots import Slot
from .tally import Tally

EXIT_GRACE_S = 5.0
"""How long a worker whose line broke may take to end by itself, so that its exit code is known."""
_WORTH_S = 10.0
"""Seconds of work that must be left in another slot's group before a worker is started just to help with it."""
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
        self._deadline, self._limits = deadline, limits
        self._observe = observe
        self._roster = Roster(slots, tally.progress.note)

    def work(self, interrupts: Interrupts) -> str:
        """Do all that is on the board; return why some was left, in words, with the workers gone; empty if none was."""
        reason = ""
        try:
            while not reason and (self._board or self._busy()):
                # one time for all: what is not yet due when it could be handed out must be waited for below
                now, usable = time.monotonic(), len(self._roster.usable)
                self._hand_out(now)
                if self._busy() or self._waiting_for_time(now):
                    self._show()
                    self._await(
                        interrupts, [self._board.wait_s(now), self._roster.rest_s(now), self._deadline.left_s()]
                    )
                    self._enforce_limits()
                    reason = self._reason_to_end(interrupts)
                elif len(self._roster.usable) == usable:  # else what was refused to others may be theirs now
                    reason = self._nobody_left()
            if reason:
                self._drain(interrupts, reason)
        finally:
            for slot in self._slots:
                self._drop(slot)
        return reason if self._board else ""

    # handing out

    def _hand_out(self, now: float) -> None:
        """Give every idle slot a task, and then every busy one its next."""
        for slot in self._slots:
            while self._roster.can_work(slot, now) and not slot.busy and self._give(slot, now):
                pass
        for slot in self._slots:
            while self._roster.can_work(slot, now) and slot.busy and slot.hungry and self._give(slot, now):
                pass

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
            self._false_start(slot, f"no worker could be started on {slot.device}: {error}")
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

        def pays(model: str, waiting: int) -> bool:
            seconds = self._tally.seconds_of(model)
            return seconds is not None and (slot.worker is not None or waiting * seconds >= _WORTH_S)

        others = frozenset(other.model for other in self._slots if other is not slot and other.busy and other.model)
        return self._board.take(Asker(slot.model, others, may, pays), now)

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
        message = slot.worker.receive() if slot.worker else None
        if message is None:
            self._bury(slot)
            return
        slot.ready, slot.false_starts, slot.heard = True, 0, time.monotonic()
        if isinstance(message, Started):
            slot.began(message)
        elif isinstance(message, TaskOutcome):
            self._take(slot, message)
        elif isinstance(message, Recalled):
            for item in slot.recall(message.tasks):
                self._board.put_back(item)
            self._promises.release(slot)
        elif isinstance(message, Ready) and message.device_bytes is not None:
            self._promises.learn(slot.device, message.device_bytes)

    def _take(self, slot: Slot, outcome: TaskOutcome) -> None:
        item = slot.settle(outcome.row.task)
        if item is None:
            return
        self._tally.take(item, outcome)
        if outcome.poisoned:
            self._drop(slot, EXIT_GRACE_S)
            self._put_back_rest(slot)
            self._roster.cordon(self._tally.cordoned)
        self._promises.release(slot)

    # ends of workers

    def _bury(self, slot: Slot) -> None:
        was_ready, idle = slot.ready, not slot.busy
        ended = self._drop(slot, EXIT_GRACE_S)
        self._tally.record(Event(Kind.WORKER_DIED, device=slot.device, error=ended.how))
        if not was_ready:
            self._false_start(slot, f"the worker on {slot.device} {ended.how} before it said a word")
        elif not idle:
            failure = Failure.CRASH if ended.code is None else classify_exit(ended.code)
            self._lose(slot, failure, WorkerDiedError(f"the worker {ended.how} while it was at this task"))

    def _false_start(self, slot: Slot, why: str) -> None:
        """Put everything back; after some of these in a row the slot is given up."""
        self._drop(slot)
        self._put_back_rest(slot)
        self._promises.release(slot)
        self._roster.false_start(slot, why, time.monotonic())

    def _drop(self, slot: Slot, grace_s: float = 0.0) -> Ended:
        """End the worker of ``slot``; one that cannot be ended keeps the slot for good."""
        ended = slot.drop_worker(grace_s)
        if ended.lives:
            self._roster.give_up([slot], f"the worker on {slot.device} {ended.how}; slot {slot.number} is given up")
        return ended

    def _lose(self, slot: Slot, failure: Failure, error: WorkerDiedError | TaskTimeoutError) -> None:
        """Charge what the worker was at; what it had not begun is free, and so are two of which one was to blame."""
        attempts = dict(slot.attempts)
        begun = [item for item in slot.given if item.task.id in attempts] or slot.given[:1]
        for item in begun:
            slot.settle(item.task.id)
        self._put_back_rest(slot)
        self._tally.lose(begun, attempts, failure, error, slot.device)
        self._promises.release(slot)

    def _put_back_rest(self, slot: Slot) -> None:
        for item in reversed(slot.given):
            started = slot.attempts.get(item.task.id)
            if started is None or not self._tally.finished_meanwhile(started):
                self._board.put_back(item)
        slot.given, slot.attempts = [], {}

    def _enforce_limits(self) -> None:
        now, limit_s, silent_s = time.monotonic(), self._limits.task_s, self._limits.silent_s
        for slot in self._slots:
            deadline = slot.deadline(limit_s)
            silent = slot.busy and now >= slot.heard + silent_s
            late = deadline is not None and now >= deadline
            if not (silent or late) or slot.worker is None or slot.worker.has_word():
                continue  # what has come meanwhile is heard first
            self._drop(slot)
            if silent:
                text = f"no sign of work for {silent_s:g} s (resources.stuck_after): the worker was killed"
                self._lose(slot, Failure.STUCK, WorkerDiedError(text))
            else:
                text = f"not finished after {limit_s:g} s (resources.task_timeout): raise it, or leave the task out"
                self._lose(slot, Failure.TIMEOUT, TaskTimeoutError(text))

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
            if slot.worker is not None and slot.busy:
                slot.worker.send(Recall())
        at_work = sum(len(slot.attempts) for slot in self._slots)
        if at_work:
            grace = f"up to {self._limits.grace_s:g} s for {at_work} at work; a second signal ends at once"
            self._tally.progress.note(f"{reason.partition(':')[0]}: {grace}")  # the whole reason is the last line
        while self._busy() and not interrupts.again and time.monotonic() < end:
            self._show()
            self._await(interrupts, [end - time.monotonic()])
            self._enforce_limits()
        for slot in self._slots:
            self._drop(slot)
            for item in list(slot.given):
                started = slot.attempts.get(item.task.id)
                if started is not None:
                    self._tally.interrupt(item, started, slot.device)
                if item.task.id not in self._tally.settled:
                    self._board.put_back(item)
        self._tally.record(Event(Kind.INTERRUPTED))

    def _busy(self) -> bool:
        return any(slot.busy for slot in self._slots)
