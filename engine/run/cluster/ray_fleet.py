"""Which nodes of a Ray cluster live, and a lane for each order that they can have at once: who is where; pure."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ..schedule.board import Item
from .ray_resources import Node, Wants, seats, typical, wants_of
from .ray_task import Sign


@dataclass
class Lane:
    """Room for one order, and a Ray process of its own where it stays on a node.

    ``node`` and ``model`` are those of its last task, ``name`` tells it from other lanes.
    """

    name: int
    item: Item | None = None
    number: int = 0
    sent: float = 0.0
    """Monotonic time at which the order went out, in seconds."""
    pinned: bool = False
    """It was sent to a node, rather than anywhere."""
    sign: Sign | None = None
    """The last one of the order at hand; None while it waits in Ray's queue."""
    since: float = 0.0
    """Monotonic time at which the attempt began, in seconds."""
    heard: float = 0.0
    """Monotonic time of the last sign."""
    node: str | None = None
    model: str | None = None

    @property
    def busy(self) -> bool:
        """True while an order is out."""
        return self.item is not None

    @property
    def begun(self) -> bool:
        """True once a process is at the order."""
        return self.item is not None and self.sign is not None

    @property
    def device(self) -> str:
        """The device that the order is on; empty where none is known."""
        return self.sign.device if self.sign is not None else ""

    def fill(self, item: Item, number: int) -> None:
        """Note that order ``number`` is out for ``item``."""
        self.item, self.number, self.sign, self.model = item, number, None, item.model
        self.sent = time.monotonic()

    def hear(self, sign: Sign) -> None:
        """Take a sign of life."""
        now = time.monotonic()
        if sign.begun or self.sign is None:
            self.since = now
        self.sign, self.node, self.heard = sign, sign.node, now

    def clear(self) -> None:
        """Note that nothing is out any more."""
        self.item, self.sign = None, None


@dataclass
class Fleet:
    """The nodes, and lanes over all of them. ``threads`` are a task's; ``on_gpu``: tasks ask for a part of a GPU."""

    threads: int
    on_gpu: bool
    lanes: list[Lane] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)
    """Node by the name of a device."""
    cordoned: Collection[str] = ()
    """Devices that get no more. Ray lets nobody choose a GPU, so their nodes get no more tasks that want one."""
    _typical: Wants = field(default_factory=lambda: Wants(1, 0, 0))
    _able: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> list[Lane]:
        """Lanes with an order."""
        return [lane for lane in self.lanes if lane.busy]

    @property
    def afresh(self) -> bool:
        """True where a process must end after its task, as the next one might be given another GPU of its node."""
        return self.on_gpu and any(node.gpus > 1 for node in self.nodes)

    @property
    def usable(self) -> bool:
        """False where every node with a GPU has a cordoned one."""
        return not self.on_gpu or any(node.gpus > 0 and node.id not in self._bad() for node in self.nodes)

    def excuse(self, late_s: float) -> None:
        """Count nothing against the processes while this one was stopped: they may have been too."""
        for lane in self.busy if late_s > 1 else ():
            lane.heard, lane.since, lane.sent = time.monotonic(), lane.since + late_s, lane.sent + late_s

    def update(self, nodes: Sequence[Node], items: Sequence[Item]) -> set[str]:
        """Take note of the nodes that live now and of what waits; return the nodes that are gone."""
        gone = {node.id for node in self.nodes} - {node.id for node in nodes}
        self.nodes = list(nodes)
        if items:
            self._typical = typical(self.wants(item) for item in items)
        room = sum(seats(node, self._typical) for node in nodes)
        if room:
            self._able = time.monotonic()
        # One at least, as some clusters grow by what waits. And none more than can run: what waits in Ray is lost to
        # the board's order.
        wanted = max(1, room)
        idle = [lane for lane in self.lanes if not lane.busy]
        spare = idle[: max(0, len(self.lanes) - wanted)]
        self.lanes = [lane for lane in self.lanes if not any(lane is each for each in spare)]
        free = sorted(set(range(wanted + len(self.lanes))) - {lane.name for lane in self.lanes})
        self.lanes += [Lane(name) for name in free[: max(0, wanted - len(self.lanes))]]
        return gone

    def unable_s(self) -> float:
        """Return for how many seconds no node could have run a task."""
        return time.monotonic() - self._able

    def wants(self, item: Item) -> Wants:
        """Return what ``item`` asks of Ray."""
        return wants_of(item, self.threads, self.nodes, on_gpu=self.on_gpu)

    def place(self, lane: Lane, item: Item) -> str | None:
        """Return the node on which ``item`` would best run; None where Ray should choose.

        That is where the lane's last task ran, whose process is there and may have the model in memory, or a node
        without the devices to be avoided.
        """
        shunned = self._bad() | {self.homes[device] for device in item.avoid if device in self.homes}
        if shunned and self.on_gpu and not item.history.mode.on_cpu:
            others = [node for node in self.nodes if node.gpus > 0 and node.id not in shunned]
            allowed = others or [node for node in self.nodes if node.gpus > 0 and node.id not in self._bad()]
            return max(allowed, key=self._room).id if allowed else None
        known = [node for node in self.nodes if node.id == lane.node]
        return lane.node if known and self._room(known[0]) > 0 else None

    def _room(self, node: Node) -> int:
        return seats(node, self._typical) - sum(lane.busy and lane.node == node.id for lane in self.lanes)

    def _bad(self) -> set[str]:
        return {self.homes[device] for device in self.cordoned if device in self.homes}
