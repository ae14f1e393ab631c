"""A worker process as its scheduler sees it: started, spoken to, killed, and asked how it ended.

It is started by its own command line rather than by multiprocessing, so that the caller's main module is not run
again, the thread counts stand in the environment before torch is imported, and the process leads a session of its
own: Ctrl-C reaches the scheduler alone, and one signal reaches whatever the worker started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection

from ..messages import Message, ToWorker, WorkerSettings

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from dfmpc.run.worker.main import main; main()"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SPIN = "GOMP_SPINCOUNT"
"""How long an idle OpenMP thread spins before it sleeps. The default (300,000) makes every small operation wait for a
thread that another process has displaced: on a busy node that was ten times slower."""
_TRITON = "TRITON_CACHE_DIR"
_SCRATCH = ("SLURM_TMPDIR", "LOCAL_SCRATCH")


DIE_S = 10.0
"""How long a worker may take to end after SIGKILL until it is left behind."""


@dataclass(frozen=True)
class Ended:
    """How a worker ended: its exit code (negative: the signal), None where it never began, and the same in words."""

    code: int | None
    how: str
    lives: bool = False
    """True for one that not even SIGKILL has ended: nothing is started in its place."""


class Boot:
    """A process that imports what a worker needs and then waits for its settings; OSError where it cannot be started.

    It ends by itself when its line closes, so also when this process dies.
    """

    def __init__(self, threads: int, visible: str | None = None) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = start_process(theirs.fileno(), environment_of(threads, visible))
            self.connection: Connection = Connection(ours.detach())

    @property
    def lives(self) -> bool:
        """False once it has ended."""
        return self.process.poll() is None

    def discard(self) -> None:
        """End it without its having been a worker; one that SIGKILL does not end is left behind."""
        self.process.kill()
        with self.connection, contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(DIE_S)


class WorkerProcess:
    """One worker, from a process that ``boot`` has started or from a new one; OSError where that cannot be started."""

    def __init__(self, settings: WorkerSettings, boot: Boot | None = None) -> None:
        boot = boot or Boot(settings.threads, settings.visible)
        self._process, self.connection = boot.process, boot.connection
        self._sentinel = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else None
        self.send(settings)

    @property
    def signs(self) -> list[Connection | int]:
        """What becomes readable when the worker has said something or has ended.

        The line alone would not do: whatever the worker forked holds it open too.
        """
        return [self.connection] if self._sentinel is None else [self.connection, self._sentinel]

    def send(self, *messages: ToWorker) -> None:
        """Send ``messages`` at once; a worker that is gone is noticed by the next ``receive``."""
        try:
            self.connection.send(messages)
        except OSError:
            return

    def has_word(self) -> bool:
        """Tell whether ``receive`` has something to return."""
        return self.connection.poll()

    def receive(self) -> tuple[Message, ...] | None:
        """Return the next messages, or None where the worker is gone. Called when one of ``signs`` is readable."""
        try:
            if not self.connection.poll():
                return None  # it has ended, and something that it forked still holds the line
            messages: tuple[Message, ...] = self.connection.recv()
        except (EOFError, OSError):  # a worker that is killed in mid-word leaves half of it
            return None
        return messages

    def kill(self, grace_s: float = 0.0) -> Ended:
        """Kill the worker's whole group and tell how the worker ended, such as ``was ended by SIGKILL``.

        A worker that is ending by itself has ``grace_s`` seconds to leave its own exit code.
        """
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
        try:
            code = self._process.wait(DIE_S)
        except subprocess.TimeoutExpired:  # asleep in a driver or a file system, where no signal reaches
            code = None
        self._signal(signal.SIGKILL)  # what it started may outlive it
        self.connection.close()
        if self._sentinel is not None:
            os.close(self._sentinel)
        how = f"did not die within {DIE_S:g} s of SIGKILL" if code is None else describe_exit(code)
        return Ended(code, f"(process {self.pid}) {how}", lives=code is None)

    @property
    def pid(self) -> int:
        """The worker's process id, which is its group's too."""
        return self._process.pid

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def start_process(line: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker that leads a session of its own and serves the socket with the file descriptor ``line``."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOT, str(line), json.dumps(sys.path)],
        pass_fds=(line,),
        stdin=subprocess.DEVNULL,
        stdout=2,  # the scheduler's stdout may be a JSON document
        start_new_session=True,
        env=environment,
    )


def environment_of(threads: int, visible: str | None) -> dict[str, str]:
    """Return the environment of a worker with ``threads`` threads that sees the devices ``visible`` (None: all)."""
    environment = {_SPIN: "10000", **os.environ}
    if _TRITON not in environment:
        environment[_TRITON] = triton_cache()
    environment |= dict.fromkeys(_THREADS, str(threads))
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    return environment


def thread_variables(threads: int) -> dict[str, str]:
    """Return what keeps the libraries of a worker to ``threads`` threads, for one that inherits nothing from here."""
    return {_SPIN: os.environ.get(_SPIN, "10000"), **dict.fromkeys(_THREADS, str(threads))}


def triton_cache() -> str:
    """Return where compiled kernels are kept unless TRITON_CACHE_DIR says so: on a disk of this node, this user's own.

    A home on a network file system would have every node lock and fetch the same small files. What lies in the folder
    is loaded and run, so one that somebody else made, or may write to, gives way to a new one of this process.
    """
    scratch = next((os.environ[name] for name in _SCRATCH if os.environ.get(name)), tempfile.gettempdir())
    return _own_folder(os.path.join(scratch, f"dfmpc-triton-{os.getuid()}"))


@cache
def _own_folder(wanted: str) -> str:
    try:
        os.makedirs(wanted, mode=0o700, exist_ok=True)
        found = os.lstat(wanted)
    except OSError:
        found = None
    if found and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return wanted
    return tempfile.mkdtemp(prefix="dfmpc-triton-")


def describe_exit(code: int) -> str:
    """Return an exit status in words, with what it mostly means."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = {
        "SIGKILL": " (often the kernel for want of memory: lower resources.threads or the number of devices)",
        "SIGSEGV": " (a crash in native code)",
        "SIGBUS": " (a file shrank while it was mapped, or a bad disk)",
    }.get(name, "")
    return f"was ended by {name}{hint}"
