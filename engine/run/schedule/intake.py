"""What comes onto the board: tasks with their predicted memory, less those that could not run even alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...errors import HostMemoryError
from ...job.task import Task
from ..sizes import predicted_device_bytes, predicted_host_bytes
from .board import Board, Item
from .tally import Tally

_GIB = 2**30


def items_of(tasks: Sequence[Task], sizes: Mapping[str, int]) -> Iterator[Item]:
    """Yield ``tasks`` with the memory they will need; ``sizes`` are the bytes of their models' files by task id."""
    for task in tasks:
        size = sizes[task.id]
        yield Item(task, size, predicted_host_bytes(size, [task.plan]), predicted_device_bytes(size, [task.plan]))


def refuse_large(board: Board, tally: Tally, limit: float | None) -> None:
    """Fail the tasks that would not fit into ``limit`` bytes of host memory even alone."""
    for item in board.withdraw(lambda item: limit is not None and item.host_bytes > limit):
        error = HostMemoryError(
            f"{item.model} is predicted to need {item.host_bytes / _GIB:.2f} GiB of memory "
            "(4 x checkpoint + 600 MB, 2 GB more for recipes that forward images), "
            f"resources.host_memory is {(limit or 0) / _GIB:.2f} GiB: raise it, or leave the model out"
        )
        tally.fail(item.task, error)
