"""What a task asks of a Ray cluster, and how many such tasks the cluster can run at once; pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..schedule.board import Item

_STEPS = 8
"""A GPU is divided into so many parts at most."""
_SHARE = 0.9
"""What part of a GPU's memory may be promised."""


@dataclass(frozen=True)
class Node:
    """A node that lives. ``memory`` is what Ray may promise of it, in bytes; ``gpu_bytes`` None: not known."""

    id: str
    host: str
    cpus: float
    gpus: float
    memory: float
    gpu_bytes: float | None = None


@dataclass(frozen=True)
class Wants:
    """What Ray reserves for one task; ``memory`` in bytes of the host."""

    cpus: float
    gpus: float
    memory: int


def gpu_share(device_bytes: float, gpu_bytes: float | None) -> float:
    """Return the part of a GPU, in eighths, that ``device_bytes`` take; a whole one where its memory is not known."""
    if gpu_bytes is None:
        return 1.0
    return min(1.0, max(1, math.ceil(_STEPS * device_bytes / (_SHARE * gpu_bytes))) / _STEPS)


def wants_of(item: Item, threads: int, nodes: Sequence[Node], *, on_gpu: bool) -> Wants:
    """Return what ``item`` asks for; what is larger than any node, or must be alone, gets all of the largest one."""
    largest, mode = max((node.memory for node in nodes), default=item.host_bytes), item.history.mode
    memory = largest if mode.alone else min(item.host_bytes, largest)
    if not on_gpu or mode.on_cpu:
        return Wants(threads, 0.0, int(memory))
    smallest = min((node.gpu_bytes for node in nodes if node.gpu_bytes is not None), default=None)
    return Wants(threads, 1.0 if mode.alone else gpu_share(item.device_bytes, smallest), int(memory))


def typical(wants: Iterable[Wants]) -> Wants:
    """Return the mean of ``wants``, of which there is at least one."""
    listed = list(wants)
    cpus, gpus, memory = (
        sum(values) / len(listed)
        for values in zip(*((each.cpus, each.gpus, each.memory) for each in listed), strict=True)
    )
    return Wants(cpus, gpus, int(memory))


def seats(node: Node, wants: Wants) -> int:
    """Return how many tasks that want ``wants`` the node can run at once."""
    pairs = ((node.cpus, wants.cpus), (node.gpus, wants.gpus), (node.memory, wants.memory))
    return int(min((have / want for have, want in pairs if want > 0), default=0.0))
