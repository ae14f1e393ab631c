"""A connection to a Ray cluster: orders go out, what came of them and signs of life come back through one queue."""

from __future__ import annotations

import importlib
import os
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import UsageError
from ..messages import TaskOutcome
from .ray_resources import Node, Wants
from .ray_task import Ear, NodeFacts, Order, Sign, Unseen, describe_node, do_task, do_task_afresh

_DEAF_S = 1.0
"""How long nobody listens for signs of life after listening failed."""
_LANE = "DFMPC_RAY_LANE"
_ANSWER_S = 120.0
"""How long a node may take to start a process and answer what it is like."""


class Loss(StrEnum):
    """Why an order came back without an outcome."""

    NODE = "node"
    """Its node, or what the node held, is gone."""
    MEMORY = "memory"
    """Ray ended the process because its host ran short of memory."""
    CRASH = "crash"
    CANCELLED = "cancelled"
    BROKEN = "broken"
    """It could not be carried out at all: an environment that does not start, code that does not load."""


@dataclass(frozen=True)
class Landed:
    """What came of order ``number``: its outcome, or why there is none and what Ray said."""

    number: int
    outcome: TaskOutcome | Unseen | None = None
    loss: Loss | None = None
    said: str = ""


class RayCluster:
    """``fd`` is readable while something has arrived."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        self._arrived: queue.SimpleQueue[Landed | list[Sign] | None] = queue.SimpleQueue()
        self._flying: dict[int, tuple[Any, Future[Any]]] = {}
        self._facts: dict[str, NodeFacts] = {}
        self._environment: dict[str, str] = {}
        self._do, self._do_afresh = ray.remote(do_task), ray.remote(max_calls=1)(do_task_afresh)
        self._ear: Any = None
        self._deaf, self._deaf_until = True, 0.0

    def device(self, asked: str | Sequence[str], threads: int) -> str:
        """Return what tasks compute on, cuda or cpu. Raises UsageError where no node has that, or ``threads`` CPUs."""
        names, nodes = [asked] if isinstance(asked, str) else list(asked), self.nodes()
        if names not in (["auto"], ["cpu"], ["cuda"]):
            raise UsageError(
                f"devices: {', '.join(names)}: with --executor ray give auto, cpu or cuda; Ray chooses which"
            )
        gpus = names != ["cpu"] and any(node.gpus > 0 for node in nodes)
        if names == ["cuda"] and not gpus:
            raise UsageError("devices: cuda: no node of the Ray cluster has a GPU; use --devices cpu or auto")
        able = [node for node in nodes if node.cpus >= threads and (node.gpus > 0 or not gpus)]
        if not able:
            raise UsageError(
                f"no node of the Ray cluster has {threads} CPUs{' and a GPU' if gpus else ''} (resources.threads): "
                "lower it, or start such a node"
            )
        return "cuda" if gpus else "cpu"

    def open(self, environment: Mapping[str, str], proof: Path) -> None:
        """Ask every node what it is like; from here on orders run in processes with ``environment``.

        Raises UsageError where one does not see ``proof`` or has another dfmpc.
        """
        self._environment = dict(environment)
        here = self._on(self._ray.get_runtime_context().get_node_id(), soft=False)
        ear = self._ray.remote(Ear).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
        self._ear = ear.remote()
        self._listen()
        for node in self.nodes():
            self._facts[node.id] = self._ask(node, proof)

    def nodes(self) -> list[Node]:
        """Return the nodes that live."""
        found = []
        for entry in self._ray.nodes():
            has, facts = entry["Resources"], self._facts.get(entry["NodeID"])
            if entry["Alive"]:
                cpus, gpus, memory = (float(has.get(name, 0.0)) for name in ("CPU", "GPU", "memory"))
                gpu_bytes = facts.gpu_bytes if facts is not None and gpus else None
                found.append(Node(entry["NodeID"], entry["NodeManagerHostname"], cpus, gpus, memory, gpu_bytes))
        return found

    def submit(self, order: Order, wants: Wants, node: str | None, *, lane: int, afresh: bool) -> None:
        """Hand ``order`` to Ray, which tries once; ``node``: where it would best run (None: anywhere)."""
        function = self._do_afresh if afresh else self._do
        ref = function.options(
            name=f"dfmpc {order.task.id}",
            num_cpus=wants.cpus,
            num_gpus=wants.gpus,
            memory=wants.memory,
            max_retries=0,
            retry_exceptions=False,
            # a task gets a process with the same environment: one of this lane, which has the lane's model loaded
            runtime_env={"env_vars": {**self._environment, _LANE: str(lane)}},
            scheduling_strategy="DEFAULT" if node is None else self._on(node, soft=True),
        ).remote(order, self._ear)
        future: Future[Any] = ref.future()
        self._flying[order.number] = ref, future
        future.add_done_callback(lambda ended: self._put(self._landed(order.number, ended)))

    def cancel(self, number: int) -> None:
        """End order ``number``: one that waits is withdrawn, the process of one at work is killed.

        An interrupt instead, which Ray offers too, would leave a process with half of a library imported.
        """
        if number in self._flying:
            self._ray.cancel(self._flying[number][0], force=True)

    def settle(self, timeout_s: float) -> None:
        """Wait until everything that is under way has come back, ``timeout_s`` seconds at most."""
        wait([future for _, future in self._flying.values()], timeout_s)

    def arrived(self) -> list[Landed | Sign]:
        """Return what has come since the last call; never waits."""
        _drain(self.fd)
        found: list[Landed | Sign] = []
        while not self._arrived.empty():
            each = self._arrived.get()
            if isinstance(each, Landed):
                self._flying.pop(each.number, None)
                found.append(each)
            else:
                found += each or []
                self._deaf = True
                self._deaf_until = time.monotonic() + (_DEAF_S if each is None else 0.0)
        if self._deaf and time.monotonic() >= self._deaf_until:
            self._listen()
        return found

    def close(self) -> None:
        """Let go of the pipe; what comes later is not heard."""
        read, write, self.fd, self._write = self.fd, self._write, -1, -1
        os.close(read)
        os.close(write)

    def _listen(self) -> None:
        self._deaf = False
        future: Future[Any] = self._ear.hear.remote().future()
        future.add_done_callback(lambda ended: self._put(None if ended.exception() else ended.result()))

    def _put(self, what: Landed | list[Sign] | None) -> None:
        """Called in a thread of Ray's."""
        self._arrived.put(what)
        try:
            os.write(self._write, b"!")
        except OSError:  # the pipe is full of what has not been read yet, or closed
            return

    def _landed(self, number: int, ended: Future[Any]) -> Landed:
        error = ended.exception()
        if error is None:
            return Landed(number, outcome=ended.result())
        return Landed(number, loss=_loss(self._ray.exceptions, error), said=first_line(error))

    def _on(self, node: str, *, soft: bool) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.NodeAffinitySchedulingStrategy(node, soft=soft)

    def _ask(self, node: Node, proof: Path) -> NodeFacts:
        asked = self._ray.remote(describe_node).options(
            num_cpus=0,
            max_retries=2,
            scheduling_strategy=self._on(node.id, soft=False),
        )
        try:
            facts: NodeFacts = self._ray.get(asked.remote(proof), timeout=_ANSWER_S)
        except self._ray.exceptions.RayError as error:
            raise UsageError(
                f"node {node.host} of the Ray cluster cannot run dfmpc: {first_line(error)}; install the same "
                "dfmpc[ray] there"
            ) from error
        if facts.version != __version__:
            raise UsageError(f"node {node.host} of the Ray cluster has dfmpc {facts.version}, this is {__version__}")
        if not facts.sees:
            raise UsageError(unseen_text(node.host, proof))
        return facts


def unseen_text(host: str, path: Path) -> str:
    """Return what is wrong with a node that does not see ``path``."""
    return (
        f"node {host} of the Ray cluster does not see {path}: the store must lie on a file system that all nodes share"
    )


def _loss(exceptions: Any, error: BaseException) -> Loss:
    kinds: Sequence[tuple[tuple[str, ...], Loss]] = (
        (("TaskCancelledError",), Loss.CANCELLED),
        (("OutOfMemoryError",), Loss.MEMORY),
        (("WorkerCrashedError",), Loss.CRASH),
        (("NodeDiedError", "LocalRayletDiedError", "ObjectLostError", "RayActorError"), Loss.NODE),
    )
    for names, loss in kinds:
        if isinstance(error, tuple(getattr(exceptions, name) for name in names if hasattr(exceptions, name))):
            return loss
    return Loss.BROKEN


def first_line(error: BaseException) -> str:
    """Return what an error of Ray's says in one line; of another process's traceback that is the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if any(line.startswith("File ") for line in lines) else lines[0])[:300]


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        return
