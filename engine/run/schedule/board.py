"""What is to do and who gets what next: tasks by model, the largest first, with their failures. Knows no process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ...job.task import Task
from ..failures import History

Test = Callable[["Item"], bool]


@dataclass
class Item:
    """A task on its way through a run."""

    task: Task
    bytes: int
    """Of the model's input files."""
    host_bytes: float
    device_bytes: float
    history: History = field(default_factory=History)
    not_before: float = 0.0
    """Monotonic time, in seconds."""
    avoid: set[str] = field(default_factory=set)
    """Devices on which it is not tried again while there are others."""

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.task.model.name


@dataclass(frozen=True)
class Asker:
    """Somebody who wants work."""

    model: str | None
    """The model he has loaded."""
    held_by_others: frozenset[str]
    """The models that others are at."""
    may: Test
    """What can be given to him."""
    pays: Callable[[str, int], bool]
    """Whether it pays to load a model that somebody is at already, so many tasks of which wait."""


class Board:
    """The tasks that no worker has yet."""

    def __init__(self, items: Iterable[Item]) -> None:
        groups: dict[str, deque[Item]] = {}
        for item in items:
            groups.setdefault(item.model, deque()).append(item)
        self._waiting, self._count = groups, sum(len(group) for group in groups.values())
        self._sort()
        self._delayed: list[Item] = []

    def __len__(self) -> int:
        return self._count

    def items(self) -> list[Item]:
        """Return all that waits."""
        return [item for group in self._waiting.values() for item in group]

    def take(self, asker: Asker, now: float) -> Item | None:
        """Return the next item for ``asker``, or None where there is none for him at ``now`` (monotonic seconds).

        Of the model that he has loaded where some is left; else the largest model that nobody is at; else the last task
        of the group that has most left, where reading its model a second time pays. Those that must be alone come when
        nothing else is left.
        """
        for alone in (False, True):
            for name in self._choices(asker):
                found = self._find(name, now, asker.may, alone=alone, last=name in asker.held_by_others)
                if found is not None:
                    return found
        return None

    def put_back(self, item: Item) -> None:
        """Let ``item`` wait again, before the others of its model."""
        self._count += 1
        if item.model in self._waiting:
            self._waiting[item.model].appendleft(item)
        else:
            self._waiting[item.model] = deque([item])
            self._sort()
        if item.not_before:
            self._delayed.append(item)

    def wait_s(self, now: float) -> float | None:
        """Return the seconds until the first item that waits for its time; None where none does."""
        self._delayed = [item for item in self._delayed if item.not_before > now]
        return min((item.not_before - now for item in self._delayed), default=None)

    def withdraw(self, test: Test) -> list[Item]:
        """Return the items of which ``test`` holds and keep the others."""
        found = [item for item in self.items() if test(item)]
        for item in found:
            self._waiting[item.model].remove(item)
        self._count -= len(found)
        self._waiting = {name: group for name, group in self._waiting.items() if group}
        return found

    def _sort(self) -> None:
        order = sorted(self._waiting.items(), key=lambda group: (-group[1][0].bytes, group[0]))
        self._waiting = dict(order)

    def _choices(self, asker: Asker) -> Iterator[str]:
        if asker.model in self._waiting:
            yield asker.model
        held = self._waiting.keys() & asker.held_by_others
        # taking one changes what waits, and ends this
        yield from (name for name in self._waiting if name not in held and name != asker.model)
        for name in sorted(held - {asker.model}, key=lambda name: (-self._left(name), name)):
            if asker.pays(name, len(self._waiting[name])):
                yield name

    def _left(self, name: str) -> int:
        return sum(item.bytes for item in self._waiting[name])

    def _find(self, name: str, now: float, may: Test, *, alone: bool, last: bool) -> Item | None:
        group = self._waiting.get(name, deque())
        for item in reversed(group) if last else group:
            if item.history.mode.alone is alone and item.not_before <= now and may(item):
                group.remove(item)
                self._count -= 1
                if not group:
                    del self._waiting[name]
                return item
        return None
