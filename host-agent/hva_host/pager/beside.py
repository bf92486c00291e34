"""What takes long and changes nothing, like loading an index, is done in a thread; the pager's own applies the outcome.

Short-lived: there is no thread while there is nothing to do.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Beside:
    """Work of one pager's in threads.

    :ivar fd: readable when :meth:`finish` has something to do.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def begin(self, work: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        """Have ``work`` done in a thread; :meth:`finish` gives ``done`` what it returned or raised."""

        def run() -> None:
            outcome: T | Exception
            try:
                outcome = work()
            except Exception as error:
                outcome = error
            self._done.put(lambda: done(outcome))
            os.eventfd_write(self.fd, 1)

        threading.Thread(target=run, name="beside", daemon=True).start()

    def finish(self) -> None:
        """Hand out what has come since the last call, in this thread."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return
        while not self._done.empty():
            self._done.get_nowait()()
