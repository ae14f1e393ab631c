"""The worker's end of its line to the scheduler: words from several threads out, tasks in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

from ..messages import Message, Recall, Recalled, RunTask


class Line:
    """A connection that several threads may send on."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: Message) -> None:
        """Send ``message``; where the scheduler is gone nothing happens, the reading side notices."""
        with self._lock:
            try:
                self._connection.send(message)
            except (ConnectionError, OSError):
                return

    def receive(self) -> RunTask | Recall | None:
        """Return the scheduler's next word; None where it is gone or has closed the line."""
        try:
            message: RunTask | Recall = self._connection.recv()
        except (EOFError, ConnectionError, OSError):
            return None
        return message


class Inbox:
    """The tasks that were sent and not begun, filled by a thread of its own; ``arrived`` hears of each at once."""

    def __init__(self, line: Line, arrived: Callable[[RunTask], None]) -> None:
        self._line, self._arrived = line, arrived
        self._orders: deque[RunTask] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def next(self) -> RunTask | None:
        """Wait for a task and return it; None where the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._orders)
            return None if self._closed else self._orders.popleft()

    def _listen(self) -> None:
        try:
            while (message := self._line.receive()) is not None:
                if isinstance(message, RunTask):
                    self._put(message)
                else:
                    self._give_back()
        finally:  # whatever ends this thread: a worker that no longer hears must not wait for ever
            with self._changed:
                self._closed = True
                self._changed.notify()

    def _put(self, order: RunTask) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify()
        self._arrived(order)

    def _give_back(self) -> None:
        with self._changed:
            tasks = tuple(order.task.id for order in self._orders)
            self._orders.clear()
        self._line.send(Recalled(tasks))
