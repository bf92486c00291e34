"""The link to one VM's guest agent: a connection to QEMU's chardev socket, made again and again until closed, and
requests with deadlines on the session over it.

What is read of a guest is paid for (:mod:`~hva_host.agent.guest_budget`), so that a flood costs this process a stated
share of a core and other VMs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hva_host.agent.guest_budget import ReadBudget
from hva_host.agent.guest_channel import GuestChannel
from hva_host.agent.guest_exchange import (
    ConfirmExchange,
    Exchange,
    ExecExchange,
    GuestStats,
    ListExchange,
    PingExchange,
    ScanExchange,
    ScanReport,
    StatsExchange,
    printable,
)
from hva_host.agent.guest_notices import Notices
from hva_host.agent.guest_requests import LinkCounters
from hva_host.agent.guest_session import GuestSession, LinkState
from hva_host.agent.model import ExecResult
from hvaqemu.errors import ConfigError, DeadlineExceeded, PeerLost, RefusedError
from hvaqemu.framing import Frame
from hvaqemu.pages import Run
from hvaqemu.protocol import (
    Confirm,
    DiscardedEnd,
    DiscardedKept,
    DiscardedPiece,
    Exec,
    ExecCancel,
    Feature,
    Hello,
    Message,
    Ping,
    Scan,
    Stats,
    encode,
)
from hvaqemu.qemu.sockets import address_of

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Bytes of output an :meth:`GuestLink.execute` keeps unless told otherwise.
OUTPUT_LIMIT = 4 << 20

#: How often the session looks at the time, in seconds; an agent that is attached is only asked now and then for a word.
_TICK, _TICK_ATTACHED = 0.25, 2.0
_RECONNECT_MIN, _RECONNECT_MAX = 0.05, 1.0
#: Seconds a command's end may take beyond the command's own timeout.
_EXEC_GRACE = 10.0


class GuestLink:
    """The session with one guest agent. Use as ``async with``, or ``start()`` and ``close()``.

    ``on_change`` is called with the new state after changes of it; of many in short order, with the newest now and
    then. Requests raise ``PeerLost`` when no agent is attached or the one asked goes away, ``DeadlineExceeded`` when it
    does not answer in time, ``GuestError`` when it cannot do what is asked, ``RefusedError`` when it will not,
    ``ProtocolError`` when its answer makes no sense.
    """

    def __init__(
        self, socket_path: str | Path, *, pages: int, on_change: Callable[[LinkState], None] | None = None
    ) -> None:
        self._path = Path(socket_path)
        self._pages = pages
        self._session = GuestSession(pages, self._tell, self._entered)
        self._notices = Notices(on_change) if on_change is not None else None
        self._budget = ReadBudget()
        self._channel: GuestChannel | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> GuestLink:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def start(self) -> None:
        """Begin to connect, in the background, until :meth:`close`."""
        if self._task is None:
            self._session.connecting("")
            self._task = asyncio.create_task(self._run(), name=f"guest link {self._path}")

    async def close(self) -> None:
        """End the link; requests under way fail with ``PeerLost``."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the link to the guest agent at %s had ended", self._path, exc_info=error)
        self._session.closed()
        if self._notices is not None:
            self._notices.flush()

    @property
    def state(self) -> LinkState:
        return self._session.state

    @property
    def connected(self) -> bool:
        """A guest agent serves us now."""
        return self._session.state is LinkState.ATTACHED

    @property
    def hello(self) -> Hello | None:
        """What the agent of the present session said of itself. Its strings are the guest's: escape them to print."""
        return self._session.hello

    @property
    def refused(self) -> str:
        """Why the agent at the other end is refused, or ""."""
        return self._session.refused

    @property
    def counters(self) -> LinkCounters:
        """What came over the link."""
        return self._session.counters

    @property
    def dropped_bytes(self) -> int:
        """Bytes on the present connection that belonged to no intact frame."""
        return self._channel.decoder.dropped_bytes if self._channel is not None else 0

    async def wait_connected(self, timeout: float) -> Hello:
        """Wait until a guest agent serves us.

        :raise DeadlineExceeded: none did within ``timeout`` seconds.
        :raise RefusedError: the one that answered cannot be worked with.
        :raise PeerLost: the link is closed.
        """
        try:
            async with asyncio.timeout(timeout):
                while self.state is not LinkState.ATTACHED or self.hello is None:
                    if self.state is LinkState.REFUSED:
                        raise RefusedError(self.refused)
                    if self.state is LinkState.CLOSED:
                        raise PeerLost("the link to the guest agent is closed")
                    await self._changed.wait()
                return self.hello
        except TimeoutError as error:
            what = "QEMU's socket could not be reached" if self.state is LinkState.CONNECTING else "it did not answer"
            raise DeadlineExceeded(f"no guest agent within {timeout:g} s: {what}", "see the console log") from error

    # Requests

    async def scan(self, timeout: float) -> ScanReport:
        """The state of every page, by a scan begun after this call."""
        return await self._ask(Scan, ScanExchange(self._pages), timeout)

    async def confirm(self, epoch: bytes, round: int, part: Run, timeout: float) -> NDArray[np.bool_]:
        """Which of some pages are free, in a scan begun after this call; shape ``(part.pages,)``.

        :param epoch: 16 bytes that no other epoch has.
        """
        exchange = ConfirmExchange(self._pages, epoch, round, part)
        return await self._ask(
            lambda request: Confirm(request, epoch, round, part.start, part.pages), exchange, timeout
        )

    @property
    def keeps_lists(self) -> bool:
        """The guest agent that serves us now keeps lists of discarded pages."""
        return self.connected and self.hello is not None and bool(self.hello.features & Feature.DISCARDED)

    async def keep(self, part: DiscardedPiece | DiscardedEnd, timeout: float) -> DiscardedKept:
        """Have the guest take a part of the list of discarded pages; its request number is ours to give."""
        return await self._ask(lambda request: part._replace(request=request), ListExchange(), timeout)

    async def stats(self, timeout: float) -> GuestStats:
        """The guest's memory figures."""
        return await self._ask(Stats, StatsExchange(), timeout)

    async def ping(self, timeout: float) -> float:
        """Seconds until the agent's sign of life."""
        begun = time.monotonic()
        await self._ask(Ping, PingExchange(), timeout)
        return time.monotonic() - begun

    async def execute(
        self, argv: Sequence[str], timeout: float, stdin: bytes = b"", limit: int = OUTPUT_LIMIT
    ) -> ExecResult:
        """Run ``argv`` in the guest, at most ``timeout`` seconds, then it is killed with its process group.

        :param limit: bytes of stdout and stderr together that are kept.
        :raise GuestError: it could not be started.
        :raise RefusedError: this guest's agent runs no commands.
        :raise ConfigError: arguments or input are too long, or there are none.
        """
        if not argv:
            raise ConfigError("no command to run in the guest was given")
        if self.hello is not None and not self.hello.exec_allowed:
            raise RefusedError(
                "the guest agent runs no commands", "set 'allow_exec: true' for the VM and start it again"
            )
        milliseconds = min(max(1, round(timeout * 1000)), 0xFFFFFFFF)
        numbers: list[int] = []

        def request(number: int) -> Message:
            numbers.append(number)
            return Exec(number, tuple(os.fsencode(argument) for argument in argv), milliseconds, stdin)

        try:
            return await self._ask(request, ExecExchange(printable(argv[0])[:64], limit), timeout + _EXEC_GRACE)
        except (asyncio.CancelledError, DeadlineExceeded):
            for number in numbers:
                self._tell(ExecCancel(number))
            raise
        except ValueError as error:
            raise ConfigError(f"{printable(argv[0])[:64]}: not for the guest agent: {error}") from error

    async def _ask(self, make: Callable[[int], Message], exchange: Exchange[T], timeout: float) -> T:
        """Send a request and see its answers through."""
        if self.state is not LinkState.ATTACHED or self._channel is None:
            silent = self.state is LinkState.SILENT
            raise PeerLost(self.refused or f"the guest agent {'has fallen silent' if silent else 'is not connected'}")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        number = self._session.requests.open(exchange, answer)
        try:
            frame = encode(make(number))
            async with asyncio.timeout(timeout):
                await self._channel.write(frame)
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"the guest agent did not answer within {timeout:g} s") from error
        finally:
            self._session.requests.close(number)
            # An error's traceback holds this frame, and the answer the error: without this circle the exchange, which
            # may be megabytes, goes with its request, and not when the garbage collector finds the time.
            del answer, exchange

    # The connection

    async def _run(self) -> None:
        """Connect, converse, and again."""
        wait = _RECONNECT_MIN
        while True:
            channel = GuestChannel(self._budget, self._opened, self._take)
            try:
                await self._connect(channel)
                await self._converse(channel)
                wait = _RECONNECT_MIN
            except (OSError, TimeoutError):
                wait = min(wait * 2, _RECONNECT_MAX)
            finally:
                self._channel = None
                channel.abort()
                self._session.connecting("QEMU closed the link to the guest agent")
            # Nothing tells when QEMU, which serves one client at a time, would accept again.
            await asyncio.sleep(wait)

    async def _connect(self, channel: GuestChannel) -> None:
        """:raise OSError, TimeoutError: nobody accepts there."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_RECONNECT_MAX):
            with address_of(self._path) as address:
                await loop.create_unix_connection(lambda: channel, address)

    async def _converse(self, channel: GuestChannel) -> None:
        """Until the connection is gone."""
        while not channel.closed.done():
            quiet = self.state is LinkState.ATTACHED and not channel.decoder.buffered
            await asyncio.wait({channel.closed}, timeout=_TICK_ATTACHED if quiet else _TICK)
            channel.look_for_stale()
            self._session.tick(time.monotonic())

    def _opened(self, channel: GuestChannel) -> None:
        self._channel = channel
        self._session.connected(time.monotonic())

    def _take(self, frame: Frame) -> None:
        self._session.take(frame, time.monotonic())

    def _tell(self, message: Message) -> None:
        if self._channel is not None:
            self._channel.tell(encode(message))

    def _entered(self, state: LinkState) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self._notices is not None:
            self._notices.changed(state)
