"""Signals that stop a run: noted by a handler, seen by the scheduler's wait through a pipe."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_SAME_S = 1.0
"""Signals that come this close together are one: a cluster signals a whole job, and the job's script hands it on."""


class Interrupts:
    """While entered, SIGINT, SIGTERM, SIGHUP and SIGUSR1 set ``received`` and make ``fd`` readable.

    The process goes on; ``again`` tells of a second one, a second or more after the first. A signal that was ignored
    (nohup) stays ignored. Outside the main thread nothing is caught.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.again = False
        self._first = 0.0
        self.fd, self._write = -1, -1
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self.fd, self._write = os.pipe()
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._write)

    def clear(self) -> None:
        """Empty ``fd``, so that it becomes readable with the next signal only."""
        os.read(self.fd, 4096)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal module passes it
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, time.monotonic()
        self.again = time.monotonic() - self._first >= _SAME_S
        os.write(self._write, b"!")
