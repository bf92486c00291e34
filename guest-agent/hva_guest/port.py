"""The virtio-serial port: find it, open it, and pass frames through it without ever blocking."""

from __future__ import annotations

import os
import select
import time
from collections import deque

from hvaqemu.framing import Frame, FrameDecoder
from hvaqemu.protocol import Message, encode

_CLASS = "/sys/class/virtio-ports"
_READ_BYTES = 64 * 1024
#: Seconds an incomplete frame may stand still before it is taken for the remains of a host agent that died.
_STALE_AFTER = 1.0


class HostGone(Exception):
    """Nobody holds the host's end of the port; it may come back without the port being reopened."""


def find_port(name: str) -> str | None:
    """The device of the port ``name``, made by devtmpfs (no udev is needed); None while there is none."""
    try:
        entries = list(os.scandir(_CLASS))
    except OSError:
        return None
    for entry in entries:
        try:
            descriptor = os.open(f"{entry.path}/name", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.read(descriptor, 256)
        except OSError:
            found = b""
        finally:
            os.close(descriptor)
        if found.strip() == name.encode():
            return f"/dev/{entry.name}"
    return None


class Port:
    """An open port. All methods return at once; ``OSError`` from any of them means the port itself has gone."""

    def __init__(self, path: str) -> None:
        """:raise OSError: no such device, or another process has it open."""
        self.descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        self._decoder = FrameDecoder()
        self._queue: deque[bytes] = deque()
        #: Bytes of the first queued frame that are already written.
        self._written = 0
        #: Bytes waiting to be written.
        self.queued = 0
        self._last_read = 0.0

    def close(self) -> None:
        os.close(self.descriptor)

    def host_present(self) -> bool:
        """Somebody holds the host's end."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return not any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    @property
    def incomplete(self) -> bool:
        """A frame has begun and not ended: call :meth:`stale` now and then."""
        return self._decoder.buffered > 0

    def read(self) -> list[Frame]:
        """The frames that have arrived.

        :raise HostGone: the host's end is closed.
        """
        try:
            data = os.read(self.descriptor, _READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise HostGone
        self._last_read = time.monotonic()
        return self._decoder.feed(data)

    def stale(self) -> list[Frame]:
        """The frames hidden behind an incomplete one that has stood still too long."""
        if self.incomplete and time.monotonic() - self._last_read > _STALE_AFTER:
            return self._decoder.give_up()
        return []

    def send(self, message: Message) -> None:
        """Queue ``message``. The caller keeps ``queued`` bounded by not asking for more work."""
        frame = encode(message)
        self._queue.append(frame)
        self.queued += len(frame)

    def flush(self) -> None:
        """Write what the port takes now."""
        while self._queue:
            try:
                count = os.write(self.descriptor, memoryview(self._queue[0])[self._written :])
            except BlockingIOError:
                return
            self._written += count
            self.queued -= count
            if self._written == len(self._queue[0]):
                self._queue.popleft()
                self._written = 0

    def forget(self) -> None:
        """Drop the queue, save the rest of a frame half written, without which the host loses the frame behind it."""
        while len(self._queue) > bool(self._written):
            self.queued -= len(self._queue.pop())

    def reset(self) -> None:
        """The host's end was closed: neither what it began to say nor what it began to read has a rest."""
        self._decoder = FrameDecoder()
        self._queue.clear()
        self._written = self.queued = 0
