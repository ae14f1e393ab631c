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
        self.visible = {name: visible_as(name) for name in dict.fromkeys(devices)}
        """What CUDA_VISIBLE_DEVICES must be for each device; to find that out may start a program."""
        self._boots: list[tuple[str | None, Boot]] = []
        try:
            for name in [name for name in devices for _ in range(per_device)][:most]:
                self._boots.append((self.visible[name], Boot(threads, self.visible[name])))
        except OSError:
            pass
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Spares:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, settings: WorkerSettings) -> Boot | None:
        """Return a process that lives and sees what ``settings`` say, None where none is left."""
        while (found := self._next(settings.visible)) is not None:
            if found.lives:
                return found
            found.discard()
        return None

    def _next(self, visible: str | None) -> Boot | None:
        for number, (sees, boot) in enumerate(self._boots):
            if sees == visible:
                del self._boots[number]
                return boot
        return None

    def close(self, but: int = 0) -> None:
        """End those that nobody took, but for the first ``but``."""
        while len(self._boots) > but:
            self._boots.pop()[1].discard()
