"""Memory that is promised to tasks at work: of the host, and of each device."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .board import Item
from .control_group import memory_limit
from .slots import Slot

_SHARE = 0.9
"""What part of the free memory may be promised."""


@dataclass
class Pool:
    """Bytes that can be promised; ``capacity`` None is without bound. A holder has one promise at a time.

    A promise above the capacity is given to whoever is the only holder: something too large still runs, alone.
    """

    capacity: float | None
    held: dict[Hashable, float] = field(default_factory=dict)
    closed_by: Hashable | None = None
    """The holder that asked to be alone."""

    def fits(self, holder: Hashable, size: float, *, alone: bool = False) -> bool:
        """Tell whether ``holder`` may have ``size`` bytes instead of what it has."""
        others = [promised for other, promised in self.held.items() if other != holder]
        if self.closed_by not in (None, holder):
            return False
        if not others:
            return True
        return not alone and (self.capacity is None or sum(others) + size <= self.capacity)

    def take(self, holder: Hashable, size: float, *, alone: bool = False) -> None:
        """Promise ``size`` bytes to ``holder`` in place of what it had."""
        self.held[holder] = size
        self.closed_by = holder if alone else (None if self.closed_by == holder else self.closed_by)

    def free(self, holder: Hashable) -> None:
        """Take a promise back."""
        self.held.pop(holder, None)
        if self.closed_by == holder:
            self.closed_by = None


class Promises:
    """The host's pool and one for each GPU, of which nothing is known until a worker has computed on it.

    Until then one worker at a time goes ahead there, so the first also fills the cache of compiled kernels.
    """

    def __init__(self, host_bytes: float | None, devices: Iterable[str]) -> None:
        self._host = Pool(host_bytes)
        self._devices = {device: Pool(0.0) for device in devices if device.startswith("cuda")}

    def learn(self, device: str, size: float) -> None:
        """Note how much memory ``device`` has, in bytes."""
        if device in self._devices:  # a model's own code may wake a GPU in a worker of the CPU
            self._devices[device].capacity = _SHARE * size

    def possible(self, slot: Slot, item: Item) -> bool:
        """Tell whether what ``slot`` needs with ``item`` on top of what it has can be promised now."""
        alone, (host, device) = item.history.mode.alone, _needs([*slot.at_hand, item])
        pool = self._devices.get(slot.device)
        return self._host.fits(slot.number, host, alone=alone) and (
            pool is None or pool.fits(slot.number, device, alone=alone)
        )

    def make(self, slot: Slot, item: Item) -> None:
        """Promise it."""
        self._take(slot, [*slot.at_hand, item], alone=item.history.mode.alone)

    def release(self, slot: Slot) -> None:
        """Take back what an idle slot had, and of a busy one what its tasks at hand do not need."""
        if slot.busy:
            self._take(slot, slot.at_hand, alone=any(item.history.mode.alone for item in slot.at_hand))
            return
        self._host.free(slot.number)
        if slot.device in self._devices:
            self._devices[slot.device].free(slot.number)

    def _take(self, slot: Slot, items: Sequence[Item], *, alone: bool) -> None:
        host, device = _needs(items)
        self._host.take(slot.number, host, alone=alone)
        if slot.device in self._devices:
            self._devices[slot.device].take(slot.number, device, alone=alone)


def _needs(items: Sequence[Item]) -> tuple[float, float]:
    """Return bytes of host and device: the larger of those at hand, and the largest input that may be read ahead."""
    first, host, device, ahead = items[0].model, 0.0, 0.0, 0
    for each in items:
        host = max(host, each.host_bytes)
        if not each.history.mode.on_cpu:
            device = max(device, each.device_bytes)
        if each.model != first:
            ahead = max(ahead, each.bytes)
    return host + ahead, device


def available_host_bytes() -> float | None:
    """Return the memory that may be promised on this host: nine tenths of what is free, within its control groups."""
    limits = [limit for limit in (_available(), memory_limit()) if limit is not None]
    return _SHARE * min(limits) if limits else None


def _available() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    found = [line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:")]
    return float(found[0]) * 1024 if found else None
