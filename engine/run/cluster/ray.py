"""The loop that keeps a Ray cluster at work: one Ray task for each attempt, with the rules of the local workers."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

from ...errors import DfmpcError, TaskTimeoutError, WorkerDiedError
from ..failures import Failure
from ..ledger import Event, Kind
from ..messages import TaskOutcome, WorkerSettings
from ..schedule.board import Asker, Board, Item
from ..schedule.deadline import Deadline
from ..schedule.dispatch import Limits
from ..schedule.interrupts import Interrupts
from ..schedule.tally import Tally
from ..store import RunFolder
from .ray_cluster import Landed, Loss, RayCluster, unseen_text
from .ray_fleet import Fleet, Lane
from .ray_losses import Losses
from .ray_task import Order, Unseen, absolute_allow_list, environment_for

_LOOK_S = 2.0
"""Time between two looks at which nodes live."""
_NOBODY_S = 600.0
"""How long the cluster may be without a node that could run a task until the run ends."""
_PINNED_S = 60.0
"""How long an order may wait for its lane's node, which others may be using, until any node will do."""
_SETTLE_S = 3.0
"""How long an ending run waits for processes to be killed."""


class RayDispatcher:
    """Runs the items of a board on a Ray cluster; ``settings`` are the workers', whose device is cuda or cpu."""

    def __init__(
        self,
        cluster: RayCluster,
        board: Board,
        tally: Tally,
        deadline: Deadline,
        limits: Limits,
        settings: WorkerSettings,
        observe: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """``observe`` hears now and then how many tasks are at work and how many processes are at them."""
        self._cluster, self._board, self._tally = cluster, board, tally
        self._deadline, self._limits, self._observe = deadline, limits, observe
        self._settings = replace(settings, allow_code=absolute_allow_list(settings.allow_code))
        self._fleet = Fleet(settings.threads, settings.device == "cuda", cordoned=tally.cordoned)
        self._proof = _proof(tally.run)
        self._orders, self._looked = 0, 0.0
        self._losses = Losses(board, tally)
        self._blind = ""

    def work(self, interrupts: Interrupts) -> str:
        """Do all that is on the board; return why some was left, in words; empty if none was.

        Raises UsageError, before anything is started, where a node cannot take part.
        """
        self._cluster.open(environment_for(self._settings.threads), self._proof)
        reason = ""
        try:
            while not reason and (self._board or self._fleet.busy):
                now = time.monotonic()
                self._look()
                self._hand_out(now)
                if self._fleet.busy or self._board.wait_s(now) is not None:
                    self._show()
                    self._await(interrupts, [self._board.wait_s(now), self._deadline.left_s()])
                    self._enforce_limits()
                    reason = self._reason_to_end(interrupts)
                else:
                    reason = self._nobody_left()
            if reason:
                self._drain(interrupts, reason)
        finally:
            self._kill()
        return reason if self._board else ""

    # handing out

    def _look(self, *, now: bool = False) -> None:
        """See which nodes live; what was on one that is gone is tried elsewhere."""
        if not now and time.monotonic() < self._looked + _LOOK_S:
            return
        self._looked = time.monotonic()
        hosts = {node.id: node.host for node in self._fleet.nodes}
        gone = self._fleet.update(self._cluster.nodes(), self._board.items())
        for lane in self._fleet.busy:
            if lane.sign is not None and lane.sign.node in gone:
                self._cluster.cancel(lane.number)
                self._losses.with_node(lane, f"node {hosts[lane.sign.node]} is gone")
        if gone:
            self._recall()  # Ray may wait for a minute for a dead node's answer, and what fits may have changed

    def _hand_out(self, now: float) -> None:
        for lane in self._fleet.lanes:
            if lane.busy or (item := self._next_for(lane, now)) is None:
                continue
            wants, node = self._fleet.wants(item), self._fleet.place(lane, item)
            self._orders += 1
            lane.fill(item, self._orders)
            lane.pinned = node is not None
            self._cluster.submit(self._order(item), wants, node, lane=lane.name, afresh=self._fleet.afresh)

    def _next_for(self, lane: Lane, now: float) -> Item | None:
        if not self._fleet.usable:
            return None

        def may(item: Item) -> bool:
            return self._deadline.allows(item.task.plan.name, item.bytes)

        others = frozenset(other.model for other in self._fleet.busy if other.model)
        pays = self._tally.pays(started=lane.model is not None)
        return self._board.take(Asker(lane.model, others, may, pays), now)

    def _order(self, item: Item) -> Order:
        return Order(
            number=self._orders,
            task=item.task,
            mode=item.history.mode,
            settings=self._settings,
            code_path=tuple(os.path.abspath(entry) for entry in sys.path),
            proof=self._proof,
            beat_s=min(10.0, max(1.0, self._limits.silent_s / 10)),
        )

    # waiting and hearing

    def _show(self) -> None:
        at_work = [lane.item.task.id for lane in self._fleet.lanes if lane.item is not None and lane.begun]
        self._tally.progress.running(at_work)
        self._observe(len(at_work), len(at_work))

    def _await(self, interrupts: Interrupts, waits: list[float | None]) -> None:
        """Wait for an outcome, a sign, a signal, the next look at the nodes or the least of ``waits``, in seconds."""
        left = [*waits, self._tally.progress.wait_s, self._looked + _LOOK_S - time.monotonic()]
        began, wait_s = time.monotonic(), max(0.0, min(each for each in left if each is not None))
        found = wait([self._cluster.fd, interrupts.fd], wait_s)
        self._fleet.excuse(time.monotonic() - began - wait_s)
        if interrupts.fd in found:
            interrupts.clear()
        self._receive()

    def _receive(self) -> None:
        lanes = {lane.number: lane for lane in self._fleet.busy}
        for each in self._cluster.arrived():
            lane = lanes.get(each.number)
            if lane is None or lane.number != each.number or lane.item is None:
                continue  # it was given up
            if isinstance(each, Landed):
                self._land(lane, lane.item, each)
            else:
                self._fleet.homes[each.device] = each.node
                lane.hear(each)

    def _land(self, lane: Lane, item: Item, landed: Landed) -> None:
        if isinstance(landed.outcome, TaskOutcome):
            self._losses.known.add(landed.outcome.row.attempt)
            lane.clear()
            self._tally.take(item, landed.outcome)
        elif isinstance(landed.outcome, Unseen):
            self._blind = unseen_text(landed.outcome.host, landed.outcome.path)
            lane.clear()
            self._board.put_back(item)
        elif landed.loss is Loss.NODE:
            self._losses.with_node(lane, landed.said)
        elif landed.loss is Loss.CANCELLED:
            self._losses.with_node(lane, "it was cancelled by somebody else")
        else:
            self._lose_process(lane, landed)

    # ends of processes

    def _lose_process(self, lane: Lane, landed: Landed) -> None:
        """Charge the task, unless the process went with its node."""
        self._look(now=True)
        sign, nodes = lane.sign, {node.id for node in self._fleet.nodes}
        if landed.loss is Loss.CRASH and sign is not None and sign.node not in nodes:
            self._losses.with_node(lane, landed.said)
            return
        classes = {Loss.MEMORY: Failure.HOST_OOM, Loss.CRASH: Failure.CRASH}
        self._tally.record(Event(Kind.WORKER_DIED, device=lane.device, error=landed.said))
        error = WorkerDiedError(f"its process on the Ray cluster was lost: {landed.said}")
        self._losses.charge(lane, classes.get(landed.loss or Loss.BROKEN, Failure.BUG), error)

    def _enforce_limits(self) -> None:
        limit_s, silent_s = self._limits.task_s, self._limits.silent_s
        for lane in self._fleet.busy:
            now = time.monotonic()
            if lane.begun and now >= lane.heard + silent_s:
                text = f"no sign of work for {silent_s:g} s (resources.stuck_after): the worker was killed"
                self._end(lane, Failure.STUCK, WorkerDiedError(text))
            elif lane.begun and limit_s is not None and now >= lane.since + limit_s:
                text = f"not finished after {limit_s:g} s (resources.task_timeout): raise it, or leave the task out"
                self._end(lane, Failure.TIMEOUT, TaskTimeoutError(text))
            elif not lane.begun and lane.pinned and now >= lane.sent + _PINNED_S:
                self._withdraw(lane)

    def _end(self, lane: Lane, failure: Failure, error: DfmpcError) -> None:
        self._cluster.cancel(lane.number)
        self._losses.charge(lane, failure, error)

    # ends of the run

    def _reason_to_end(self, interrupts: Interrupts) -> str:
        left = self._deadline.left_s()
        if interrupts.received is not None:
            return f"interrupted by {interrupts.received}"
        if self._tally.full or self._blind:
            return f"stopped: {self._tally.full or self._blind}"
        if left is not None and left <= 0:
            return "stopped by --deadline"
        if self._fleet.unable_s() > _NOBODY_S and not any(lane.begun for lane in self._fleet.lanes):
            return f"stopped: for {_NOBODY_S:g} s the Ray cluster has had no node that could run a task"
        return ""

    def _nobody_left(self) -> str:
        if self._fleet.usable:
            return "stopped by --deadline: what is left would not end in time"
        return "stopped, as nobody is left to work: every node with a GPU has one that failed under different tasks"

    def _recall(self) -> None:
        """Withdraw what waits in Ray's queue; what has begun unheard is killed with its process."""
        for lane in self._fleet.busy:
            if not lane.begun:
                self._withdraw(lane)

    def _withdraw(self, lane: Lane) -> None:
        self._cluster.cancel(lane.number)
        self._losses.started(lane)  # an attempt that had begun unheard is nobody else's
        if lane.item is not None:
            self._board.put_back(lane.item)
        lane.clear()
        lane.node = None

    def _drain(self, interrupts: Interrupts, reason: str) -> None:
        """Withdraw what has not begun and give what has its time of grace; a second signal ends at once."""
        end = time.monotonic() + self._limits.grace_s
        self._recall()
        if self._fleet.busy:
            grace = (
                f"up to {self._limits.grace_s:g} s for {len(self._fleet.busy)} at work; a second signal ends at once"
            )
            self._tally.progress.note(f"{reason}: {grace}")
        while self._fleet.busy and not interrupts.again and time.monotonic() < end:
            self._show()
            self._await(interrupts, [end - time.monotonic()])
            self._enforce_limits()
            self._look()
        cut = self._kill()
        for lane, item in cut:
            started, device = self._losses.started(lane), lane.device
            lane.clear()
            if started is not None:
                self._tally.interrupt(item, started, device)
            if item.task.id not in self._tally.settled:
                self._board.put_back(item)
        self._tally.record(Event(Kind.INTERRUPTED))

    def _kill(self) -> list[tuple[Lane, Item]]:
        """End what is at work and return it."""
        busy = [(lane, lane.item) for lane in self._fleet.busy if lane.item is not None]
        for lane, _ in busy:
            self._cluster.cancel(lane.number)
        if busy:
            self._cluster.settle(_SETTLE_S)
        return busy


def _proof(run: RunFolder) -> Path:
    """Return this process's ledger file, of which no machine has a copy; where there is none the task list."""
    own = run.ledger.glob(f"{socket.gethostname()}-{os.getpid()}-*.jsonl")
    return max(own, key=lambda file: file.stat().st_mtime, default=run.tasks_file)
