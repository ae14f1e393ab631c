"""A worker's sign of life: not that the process exists, but that it does something."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

PERIOD_S = 1.0
_WORK_S = 0.001
"""CPU time of the main thread within a period that counts as work."""


class Heartbeat:
    """Calls ``beat`` every period in which the main thread used its CPU or ``counter`` (bytes read) has moved.

    So it does while ``writing`` says that a disk may still be taking what was written: nothing is seen of that from
    here, so it has a bound of its own (``Finisher.writes``). A thread that sleeps, waits for a dead file system or
    holds a lock for ever does neither; an endless loop does, and is what a task's time limit is for. Between tasks
    nobody asks.
    """

    def __init__(
        self,
        beat: Callable[[], None],
        counter: Callable[[], int],
        writing: Callable[[], bool] = lambda: False,
        always: Callable[[], None] = lambda: None,
    ) -> None:
        """``always`` is called every period, whatever is seen."""
        self._beat, self._counter, self._writing, self._always = beat, counter, writing, always
        self._clock = _main_thread_clock()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        last = self._signs()
        while True:
            time.sleep(PERIOD_S)
            now = self._signs()
            if now[0] - last[0] >= _WORK_S or now[1] != last[1] or self._writing():
                self._beat()
            self._always()
            last = now

    def _signs(self) -> tuple[float, int]:
        return self._clock(), self._counter()


def _main_thread_clock() -> Callable[[], float]:
    """Return what tells the CPU seconds of the main thread; the process's where the system has no such clock."""
    main = threading.main_thread().ident
    if sys.platform == "linux" and main is not None:
        clock = time.pthread_getcpuclockid(main)
        return lambda: time.clock_gettime(clock)
    return time.process_time
