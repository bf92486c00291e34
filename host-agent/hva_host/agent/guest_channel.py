"""One connection to QEMU's chardev socket: bytes in within a budget, as frames; bytes out within a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from hva_host.agent.guest_budget import HELLO_STEPS, READ_STEPS, ReadBudget
from hvaqemu.errors import PeerLost
from hvaqemu.framing import Frame, FrameDecoder
from hvaqemu.protocol import MessageType

#: Bytes waiting in our process for QEMU to take them, from which on nothing more is written.
WRITE_BOUND = 128 * 1024
#: Seconds an incomplete frame may stand still before it is taken for the remains of an agent that died.
STALE_AFTER = 1.0
#: What is read at once; bounds how long the event loop is held by one guest (5 ms of it, for the worst there is).
_READ_BYTES = 64 * 1024


class GuestChannel(asyncio.BufferedProtocol):
    """Hands every intact frame to ``on_frame`` in the event loop, after it has called ``on_open``, which may write.

    :ivar decoder: what it counts is of this connection.
    :ivar closed: done once the connection is gone.
    """

    def __init__(
        self, budget: ReadBudget, on_open: Callable[[GuestChannel], None], on_frame: Callable[[Frame], None]
    ) -> None:
        self.decoder = FrameDecoder()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._budget = budget
        self._on_open = on_open
        self._on_frame = on_frame
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._transport: asyncio.Transport | None = None
        self._room = asyncio.Event()
        self._room.set()
        #: Runs while the guest is in debt.
        self._pause: asyncio.TimerHandle | None = None
        self._listening_since = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BOUND)
        self._on_open(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._room.set()
        if self._pause is not None:
            self._pause.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        before = self.decoder.headers
        frames = self.decoder.feed(self._buffer[:nbytes])
        hellos = sum(frame.type == MessageType.HELLO for frame in frames)
        steps = READ_STEPS + self.decoder.headers - before + HELLO_STEPS * hellos
        now = self._listening_since = self._loop.time()
        if (seconds := self._budget.charge(nbytes, steps, now)) > 0 and self._transport is not None:
            self._transport.pause_reading()
            self._pause = self._loop.call_later(seconds, self._go_on)
        self._hand_on(frames)

    def _go_on(self) -> None:
        self._pause = None
        self._listening_since = self._loop.time()
        if self._transport is not None:
            self._transport.resume_reading()

    def _hand_on(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._on_frame(frame)

    def look_for_stale(self) -> None:
        """To be called now and then: gives up a frame whose sender has died within it."""
        if self._pause is None and self.decoder.buffered and self._loop.time() - self._listening_since > STALE_AFTER:
            self._hand_on(self.decoder.give_up())

    @property
    def unwritten(self) -> int:
        """Bytes waiting in our process for QEMU to take them."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def tell(self, data: bytes) -> None:
        """Write ``data`` if there is room now, else drop it."""
        if self._transport is not None and self.unwritten <= WRITE_BOUND:
            self._transport.write(data)

    async def write(self, data: bytes) -> None:
        """Write ``data`` once there is room, and wait until what waits is within the bound again.

        :raise PeerLost: the connection is gone.
        """
        await self._room.wait()
        if self._transport is None:
            raise PeerLost("the link to the guest agent broke")
        self._transport.write(data)
        await self._room.wait()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def abort(self) -> None:
        """Break the connection off: no frame comes after this."""
        if self._transport is not None:
            self._transport.abort()
