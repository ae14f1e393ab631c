"""The worker's end of its line to the scheduler: words from several threads out, tasks in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

from ...job.sources import ModelSource
from ..messages import Message, Recall, Recalled, RunTask


class Line:
    """A connection that several threads may send on."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._held: list[Message] = []

    def send(self, *messages: Message) -> None:
        """Send ``messages``, after what was held; where the scheduler is gone the reading side notices."""
        with self._lock:
            words, self._held = (*self._held, *messages), []
            try:
                self._connection.send(words)
            except (ConnectionError, OSError):
                return

    def hold(self, *messages: Message) -> None:
        """Send ``messages`` with the next ones: what nobody waits for need not wake the scheduler."""
        with self._lock:
            self._held += messages

    def flush(self) -> None:
        """Send what is held."""
        if self._held:
            self.send()

    def receive(self) -> tuple[RunTask | Recall, ...] | None:
        """Return the scheduler's next words; None where it is gone or has closed the line."""
        try:
            words: tuple[RunTask | Recall, ...] = self._connection.recv()
        except (EOFError, ConnectionError, OSError):
            return None
        return words


class Inbox:
    """The tasks that were sent and not begun, filled by a thread of its own; it calls ``arrived`` after each word.

    Where tasks are given back it calls ``left`` with the model of the one that was begun last.
    """

    def __init__(
        self, line: Line, arrived: Callable[[], None], left: Callable[[ModelSource | None], None] = lambda _: None
    ) -> None:
        self._line, self._arrived, self._left = line, arrived, left
        self._orders: deque[RunTask] = deque()
        self._begun: ModelSource | None = None
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def __len__(self) -> int:
        return len(self._orders)

    def next(self) -> RunTask | None:
        """Wait for a task and return it; None where the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._orders)
            if self._closed:
                return None
            order = self._orders.popleft()
            self._begun = order.task.model
            return order

    def model_after(self, read: ModelSource | None) -> ModelSource | None:
        """Return the model to read when ``read`` was read last; None where none waits or that at work is to be read."""
        with self._changed:
            if self._begun is not None and self._begun != read:
                return None
            return next((order.task.model for order in self._orders if order.task.model != read), None)

    def _listen(self) -> None:
        try:
            while (words := self._line.receive()) is not None:
                for word in words:
                    if isinstance(word, RunTask):
                        self._put(word)
                    else:
                        self._give_back()
                self._arrived()
        finally:  # whatever ends this thread: a worker that no longer hears must not wait for ever
            with self._changed:
                self._closed = True
                self._changed.notify()

    def _put(self, order: RunTask) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    def _give_back(self) -> None:
        with self._changed:
            tasks, begun = tuple(order.task.id for order in self._orders), self._begun
            self._orders.clear()
        self._line.send(Recalled(tasks))
        self._left(begun)
