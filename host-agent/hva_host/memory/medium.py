"""What the compressed store lies on: a memfd, or a file on a disk that nobody may have to wait for.

A read that would have to wait raises :class:`NotCached`, and whoever wants the bytes has a helper thread read them
(:meth:`hva_host.memory.store.Store.read_waiting`). Writes and punches of a file are carried out by a thread of their
own, in the order they were asked for: a write may be held up by the kernel (too much dirty page cache, a journal), a
punch by a page under write-back. The order is what makes it right: room that was punched and is used again is punched
before it is written.

What was asked for is numbered. A page may depend on what was written only once that was carried out.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections import deque
from contextlib import suppress
from typing import Protocol

from hva_host.memory.backing import Backing
from hva_host.memory.waiting import NotCached, can_refuse_to_wait
from hvaqemu.faultpoints import reach
from hvaqemu.pages import Run


class Medium(Protocol):
    """A store's file.

    :ivar asked: writes and punches asked for so far.
    """

    asked: int

    def read(self, offset: int, size: int) -> bytes:
        """:raise NotCached: it would have to wait. :raise OSError: it can not be read."""

    def write(self, offset: int, data: bytes) -> None:
        """Ask for a write. :raise OSError: it could not be carried out, which may also be told later."""

    def punch(self, run: Run) -> None:
        """Ask for pages of the file to be given back to the host. What can not be stays as it is."""

    def carried_out(self, number: int) -> bool:
        """Was everything up to ``number`` carried out? :raise OSError: a write up to there could not be."""

    def forgive(self) -> None:
        """Writes may fail anew: nothing depends on those that failed."""


class InMemory:
    """A memfd."""

    def __init__(self, fd: int) -> None:
        self.asked = 0
        self._fd = fd
        self._file = Backing(fd)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def write(self, offset: int, data: bytes) -> None:
        _write(self._fd, offset, data)

    def punch(self, run: Run) -> None:
        _punch(self._file, run)

    def carried_out(self, number: int) -> bool:
        return number <= self.asked

    def forgive(self) -> None:
        pass


class OnDisk:
    """A file on a disk."""

    def __init__(self, fd: int) -> None:
        self.asked = 0
        self._fd = fd
        self._file = Backing(fd)
        self._nowait = can_refuse_to_wait(fd)
        self._done = 0
        #: The first write that could not be carried out since :meth:`forgive`; none after it is tried.
        self._failed: tuple[int, OSError] | None = None
        self._tasks: queue.SimpleQueue[tuple[int, int, bytes] | Run] = queue.SimpleQueue()
        #: Writes under way, oldest first, and the newest at each offset.
        self._writing: deque[tuple[int, int, bytes]] = deque()
        self._unwritten: dict[int, bytes] = {}
        self._thread: threading.Thread | None = None

    def read(self, offset: int, size: int) -> bytes:
        self._forget_written()
        if (data := self._unwritten.get(offset)) is not None:
            return data
        if not self._nowait:
            raise NotCached
        found = bytearray(size)
        try:
            got = os.preadv(self._fd, [found], offset, os.RWF_NOWAIT)
        except BlockingIOError as error:
            raise NotCached from error
        if got != size:
            raise NotCached
        return bytes(found)

    def write(self, offset: int, data: bytes) -> None:
        self.asked += 1
        task = (self.asked, offset, data)
        self._writing.append(task)
        self._unwritten[offset] = data
        self._ask(task)

    def punch(self, run: Run) -> None:
        self.asked += 1
        self._ask(run)

    def carried_out(self, number: int) -> bool:
        if self._failed is not None and self._failed[0] <= number:
            raise self._failed[1]
        return self._done >= number

    def forgive(self) -> None:
        self._failed = None

    def _forget_written(self) -> None:
        while self._writing and self._writing[0][0] <= self._done:
            _, offset, data = self._writing.popleft()
            if self._unwritten.get(offset) is data:
                del self._unwritten[offset]

    def _ask(self, task: tuple[int, int, bytes] | Run) -> None:
        self._forget_written()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="store", daemon=True)
            self._thread.start()
        self._tasks.put(task)

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if isinstance(task, Run):
                _punch(self._file, task)
            elif self._failed is None:
                number, offset, data = task
                try:
                    _write(self._fd, offset, data)
                except OSError as error:
                    self._failed = (number, error)
            # Last: who sees it counted sees also that it failed.
            self._done += 1


def _write(fd: int, offset: int, data: bytes) -> None:
    reach("store.write")
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.ENOSPC, "no room")


def _punch(file: Backing, run: Run) -> None:
    # What stays is used again, or given back by the next pager.
    with suppress(OSError):
        reach("store.punch")
        file.punch(run)
