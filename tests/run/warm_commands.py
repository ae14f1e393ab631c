"""A process that has imported everything and runs dfmpc's commands as forks of itself, for tests that start hundreds.

Each line on stdin is a JSON object with ``argv``, ``environment`` (added to this process's), and the files ``out`` and
``err``; each line on stdout is the exit status of that command, negative for a signal. Workers are forks of the
command that starts them. What a fork shares with a process that was started by its command line: a process number, a
session and a parent of its own, the real signals, sockets, files and exit codes. What it does not: it finds its
modules imported, so nothing is said about imports, about threads that stand in the environment, or about a boot that
fails. Some cells of the matrix and all of test_run_kills.py use processes that are started cold.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class ForkedProcess:
    """A child by fork, with as much of Popen as a worker's owner uses."""

    def __init__(self, work: Callable[[], object]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _end_with(work)
        self._pidfd, self._code = os.pidfd_open(self.pid), 0

    def kill(self) -> None:
        """End it; nothing happens where it has been waited for."""
        if self._pidfd >= 0:
            os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """Return the exit code, None while it lives."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal; TimeoutExpired where it is not there within ``timeout``."""
        if self._pidfd >= 0:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
            self._pidfd = -1
        return self._code


def _end_with(work: Callable[[], object]) -> NoReturn:
    """Do ``work`` and end this process as an interpreter would, without unwinding what belongs to its parent."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - told, and the process ends
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def start_worker(line: int, environment: dict[str, str]) -> ForkedProcess:
    """Stand in for ``dfmpc.run.schedule.process.start_process``."""
    return ForkedProcess(lambda: _be_worker(line, environment))


def _be_worker(line: int, environment: dict[str, str]) -> None:
    from dfmpc.run.worker.main import main  # noqa: PLC0415 - imported long ago

    os.setsid()
    for number in _CAUGHT:
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) > 2 and int(entry) != line:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(entry))
    sys.argv = ["-c", str(line)]
    main()


def _be_command(order: dict[str, Any]) -> None:
    from dfmpc.cli import main  # noqa: PLC0415 - imported long ago
    from dfmpc.run.schedule import process  # noqa: PLC0415 - imported long ago

    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.environ.update(order["environment"])
    process.start_process = start_worker  # type: ignore[assignment]
    sys.argv = ["dfmpc", *order["argv"]]
    main()


def serve() -> None:
    """Run one command after the other until stdin ends."""
    import dfmpc.cli  # noqa: PLC0415 - here, so that whoever imports this module for its types does not wait
    import dfmpc.run.scheduler  # noqa: PLC0415
    import dfmpc.run.worker.main  # noqa: PLC0415
    import dfmpc.run.worker.make  # noqa: PLC0415
    import dfmpc.show  # noqa: PLC0415, F401
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)  # a fork must find no thread
    torch.export.export(torch.nn.Conv2d(1, 1, 1), (torch.zeros(1, 1, 1, 1),))  # imports as much again as torch itself
    for text in sys.stdin:
        order = json.loads(text)
        print(ForkedProcess(lambda order=order: _be_command(order)).wait(), flush=True)


if __name__ == "__main__":
    serve()
