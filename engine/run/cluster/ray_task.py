"""What runs in the processes of a Ray cluster: one attempt a task with its signs of life, and what a node is like."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import __version__, faults
from ...job.task import Task
from ...models.factory import DEFAULT_MODULES, AllowList
from ..failures import Failure, Mode
from ..ledger import Ledger
from ..messages import Message, Send, Started, TaskOutcome, WorkerSettings
from ..schedule.process import thread_variables, triton_cache
from ..store import RunFolder
from ..worker.attempt import Attempt, Context
from ..worker.finisher import Finisher
from ..worker.heartbeat import Heartbeat
from ..worker.held import HeldModel
from ..worker.pinned import allocator
from ..worker.prefetch import Prefetcher

POISONED = 72
"""Exit code of a process whose device is lost to it; what came of its task is in the ledger."""


@dataclass(frozen=True)
class Order:
    """One attempt at ``task``. ``number`` tells it from others; ``beat_s`` is the time between signs of life."""

    number: int
    task: Task
    mode: Mode
    settings: WorkerSettings
    code_path: tuple[str, ...]
    """Where the scheduler imports from."""
    proof: Path
    """A file that the scheduler wrote into the run's folder: who sees it shares the file system."""
    beat_s: float


@dataclass(frozen=True)
class Sign:
    """The process on ``node`` (its id) works at order ``number``; ``begun``: its time counts from here."""

    number: int
    attempt: str
    node: str
    device: str
    begun: bool


@dataclass(frozen=True)
class Unseen:
    """Nothing was done: the host does not see the path."""

    host: str
    path: Path


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself."""

    version: str
    """Of its dfmpc."""
    sees: bool
    """Whether the run's folder is there."""
    gpu_bytes: float | None
    """Memory of its smallest GPU, None where that cannot be told."""


class Ear:
    """The actor that signs of life go to; whoever listens gets what came since the last time."""

    def __init__(self) -> None:
        self._signs: list[Sign] = []
        self._changed = asyncio.Event()

    async def tell(self, sign: Sign) -> None:
        """Take a sign."""
        self._signs.append(sign)
        self._changed.set()

    async def hear(self) -> list[Sign]:
        """Wait until there is a sign; return all there are."""
        await self._changed.wait()
        self._changed.clear()
        signs, self._signs = self._signs, []
        return signs


def absolute_allow_list(allow_code: tuple[str, ...]) -> tuple[str, ...]:
    """Return the allow-list with what this process's environment adds, for processes in other folders."""
    allow = AllowList.default(allow_code)
    return (*(name for name in allow.modules if name not in DEFAULT_MODULES), *map(str, allow.folders))


def environment_for(threads: int) -> dict[str, str]:
    """Return the environment of processes that compute with ``threads`` threads."""
    asked = os.environ.get(faults.VARIABLE)
    return thread_variables(threads) | ({faults.VARIABLE: asked} if asked else {})


def do_task(order: Order, ear: Any) -> TaskOutcome | Unseen:
    """Make one attempt in this process and return its outcome, which is in the ledger by then.

    After an error that sticks to the process it ends instead of returning.
    """
    _adopt(order.code_path)
    if not order.proof.is_file():
        return Unseen(socket.gethostname(), order.proof)
    outcome = _bench_for(order, ear).attempt(order)
    if outcome.poisoned:
        os._exit(POISONED)
    return outcome


def do_task_afresh(order: Order, ear: Any) -> TaskOutcome | Unseen:
    """``do_task`` for processes that end after it: each keeps to one GPU, and Ray may give the next task another."""
    return do_task(order, ear)


def describe_node(proof: Path) -> NodeFacts:
    """Tell what this node has and sees."""
    return NodeFacts(__version__, proof.is_file(), _smallest_gpu())


def _smallest_gpu() -> float | None:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return min(float(line) for line in told.stdout.splitlines()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _adopt(code_path: tuple[str, ...]) -> None:
    """Import from where the scheduler does, after what Ray itself needs, and keep compiled kernels on this node."""
    sys.path.extend(entry for entry in code_path if entry not in sys.path)
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache())


class _Voice:
    """Tells which order this process is at: when it begins, and every ``beat_s`` seconds in which it does something."""

    def __init__(self, ear: Any, node: str) -> None:
        self._ear, self._node = ear, node
        self._sign: Sign | None = None
        self._next = 0.0
        self._beat_s = 0.0

    def begin(self, order: Order, attempt: str, device: str) -> None:
        self._beat_s = order.beat_s
        self._sign = Sign(order.number, attempt, self._node, device, begun=True)
        self._say(self._sign)

    def beat(self) -> None:
        sign = self._sign
        if sign is not None and time.monotonic() >= self._next:
            self._say(replace(sign, begun=False))

    def end(self) -> None:
        self._sign = None

    def _say(self, sign: Sign) -> None:
        self._next = time.monotonic() + self._beat_s
        self._ear.tell.remote(sign)


class _Bench:
    """What this process keeps between the orders of one run: its ledger file and the last model."""

    def __init__(self, settings: WorkerSettings, voice: _Voice) -> None:
        self.settings, self._voice = settings, voice
        self._run = RunFolder(settings.run)
        self._ledger = Ledger(self._run)
        self._prefetcher = Prefetcher(
            settings.readers, int(settings.read_ahead), allocate=allocator(settings.computes_on)
        )
        self._model = HeldModel(settings, self._prefetcher)
        self._finisher: Finisher | None = None
        Heartbeat(voice.beat, lambda: self._prefetcher.bytes_read, self._writes)

    def attempt(self, order: Order) -> TaskOutcome:
        """Make the attempt and wait until its outcome is kept."""
        ended: list[TaskOutcome] = []

        def send(*messages: Message) -> None:
            for message in messages:
                if isinstance(message, Started):
                    self._voice.begin(order, message.attempt, self.settings.device)
                elif isinstance(message, TaskOutcome):
                    ended.append(message)

        self._model.settle(self._made(order, send))
        return ended[0]

    def _made(self, order: Order, send: Send) -> Failure | None:
        self._finisher = finisher = Finisher(self._run, self._ledger, send)
        try:
            shared = self._model.of(order.task.model, order.mode)
            return Attempt(order.task, order.mode, Context(self.settings, self._ledger, send, finisher), shared).run()
        finally:
            finisher.close()
            self._voice.end()

    def _writes(self) -> bool:
        return self._finisher is not None and self._finisher.writes


_bench: _Bench | None = None


def _bench_for(order: Order, ear: Any) -> _Bench:
    """Return this process's bench; there is a new one where the run or the device is another."""
    global _bench  # noqa: PLW0603 - a Ray worker has no other place that outlives a task
    settings = _settled(order.settings, order.mode)
    if _bench is None or _bench.settings != settings:
        faults.enter("worker")
        _bench = _Bench(settings, _Voice(ear, _context().get_node_id()))
    return _bench


def _settled(settings: WorkerSettings, mode: Mode) -> WorkerSettings:
    """Name the GPU that Ray has given this process; it is the only one that torch sees here."""
    gpus = [] if mode.on_cpu or not settings.device.startswith("cuda") else _context().get_accelerator_ids()["GPU"]
    if not gpus:
        return replace(settings, device="cpu")
    return replace(settings, device=f"cuda:{gpus[0]}@{socket.gethostname()}", visible=str(gpus[0]))


def _context() -> Any:
    import ray  # noqa: PLC0415 - an extra; whoever runs this has it

    return ray.get_runtime_context()
