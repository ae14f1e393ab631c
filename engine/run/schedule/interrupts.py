"""Signals that stop a run: noted by a handler, seen by the scheduler's wait through a pipe."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupts:
    """While entered, SIGINT, SIGTERM, SIGHUP and SIGUSR1 set ``received`` and make ``fd`` readable.

    The process goes on; ``again`` tells of a second one. A signal that was ignored (nohup) stays ignored. Outside the
    main thread nothing is caught.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.again = False
        self.fd, self._write = -1, -1
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self.fd, self._write = os.pipe()
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
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
        self.again = self.received is not None
        self.received = self.received or signal.Signals(number).name
        os.write(self._write, b"!")
