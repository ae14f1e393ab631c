"""Processes that become workers later: they import what those need while the scheduler finds out what there is to do.

To import takes a worker longer than it takes the scheduler to join or make its run; one after the other, both would
wait where a run only reuses what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from ..messages import WorkerSettings
from .devices import visible_as
from .process import Boot


class Spares:
    """``devices`` with ``per_device`` slots each, and a process for each of the first ``most`` of these slots.

    Whoever takes a process answers for it; ``close`` ends the others.
    """

    def __init__(self, devices: Sequence[str], per_device: int = 1, threads: int = 1, most: int = 0) -> None:
        """Start them; where that fails, whoever wants a worker later is told why."""
        self.devices, self.per_device = list(devices), per_device
        self._boots: list[tuple[str | None, Boot]] = []
        for name in [name for name in devices for _ in range(per_device)][:most]:
            visible = visible_as(name)
            try:
                self._boots.append((visible, Boot(threads, visible)))
            except OSError:
                break

    def __enter__(self) -> Spares:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, settings: WorkerSettings) -> Boot | None:
        """Return a process that sees what ``settings`` say, None where none is left."""
        for number, (visible, boot) in enumerate(self._boots):
            if visible == settings.visible:
                del self._boots[number]
                return boot
        return None

    def close(self) -> None:
        """End those that nobody took."""
        while self._boots:
            self._boots.pop()[1].discard()
