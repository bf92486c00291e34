"""The link to one VM's guest agent: a session over QEMU's chardev socket, and requests with deadlines on it.

QEMU listens; this side connects, again and again until closed. Connected to QEMU is not connected to an agent: that
takes our ATTACH, a HELLO that echoes its nonce, and our ACK. An agent that restarts greets with another nonce: what was
asked of its predecessor fails at once. An agent that falls silent (or whose VM stands still) loses the session's
"attached" and gets it back with the first sign of life; requests then under way live or die by their own deadlines.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hva_host.agent.guest_exchange import (
    ConfirmExchange,
    Exchange,
    ExecExchange,
    GuestStats,
    PingExchange,
    ScanExchange,
    ScanReport,
    StatsExchange,
    printable,
)
from hva_host.agent.model import ExecResult
from hvaqemu.errors import ConfigError, DeadlineExceeded, GuestError, HvaError, PeerLost, ProtocolError, RefusedError
from hvaqemu.framing import Frame, FrameDecoder
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.protocol import (
    Ack,
    Attach,
    Confirm,
    Error,
    ErrorCode,
    Exec,
    ExecCancel,
    Feature,
    Hello,
    Message,
    Ping,
    Pong,
    Scan,
    Stats,
    decode,
    encode,
)
from hvaqemu.qemu.sockets import address_of

T = TypeVar("T")
log = logging.getLogger(__name__)

#: All we know how to use.
FEATURES = Feature.EXEC | Feature.SWAPCACHE | Feature.PRESSURE
REQUESTS_MAX = 32
#: Bytes of output an :meth:`GuestLink.execute` keeps unless told otherwise.
OUTPUT_LIMIT = 4 << 20

_READ_BYTES = 64 * 1024
#: Bytes waiting in our process for QEMU to take them, from which on nothing more is written.
_WRITE_BOUND = 128 * 1024
_TICK = 0.25
_RECONNECT_MAX = 1.0
#: Seconds between ATTACHes: at least, at first, and at most (what a dead guest never reads piles up in the socket).
_ATTACH_MIN, _ATTACH_FIRST, _ATTACH_MAX = 0.2, 0.5, 10.0
#: Seconds an incomplete frame may stand still before it is taken for the remains of an agent that died.
_STALE_AFTER = 1.0
#: Seconds without a word after which we ask, and after which the agent counts as silent.
_PING_AFTER, _SILENT_AFTER = 10.0, 30.0
#: Seconds a command's end may take beyond the command's own timeout.
_EXEC_GRACE = 10.0
#: The request number of our own signs-of-life question.
_KEEPALIVE = 0


class LinkState(enum.Enum):
    """How far the link has come."""

    CLOSED = "closed"
    #: No connection to QEMU.
    CONNECTING = "connecting"
    #: Connected to QEMU; no agent has answered yet.
    ATTACHING = "attaching"
    #: An agent serves us.
    ATTACHED = "attached"
    #: An agent served us and has fallen silent; the session stands.
    SILENT = "silent"
    #: The agent at the other end is not one we can work with; see ``refused``.
    REFUSED = "refused"


@dataclass
class LinkCounters:
    """What came over the link and counted for nothing."""

    #: Answers nobody waits for.
    unsolicited: int = 0
    #: Intact frames whose payload is not what their type says.
    malformed: int = 0
    #: Frames of types we do not know.
    unknown: int = 0
    #: Requests an answer out of turn or bounds has failed.
    broken_answers: int = 0


@dataclass(eq=False)
class _Pending:
    """A request under way."""

    exchange: Exchange[Any]
    answer: asyncio.Future[Any]


class GuestLink:
    """The session with one guest agent. Use as ``async with``, or ``start()`` and ``close()``.

    ``on_change`` is called with the new state after each change of it. Requests raise ``PeerLost`` when no agent is
    attached or the one asked goes away, ``DeadlineExceeded`` when it does not answer in time, ``GuestError`` when it
    cannot do what is asked, ``RefusedError`` when it will not, ``ProtocolError`` when its answer makes no sense.
    """

    def __init__(
        self, socket_path: str | Path, *, pages: int, on_change: Callable[[LinkState], None] | None = None
    ) -> None:
        self._path = str(socket_path)
        self._pages = pages
        self._on_change = on_change
        self._state = LinkState.CLOSED
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._decoder = FrameDecoder()
        self._hello: Hello | None = None
        self._pending: dict[int, _Pending] = {}
        # Random, so that no answer to an earlier host agent's question can be taken for one to ours.
        self._next_request = secrets.randbits(62) + 1
        self._nonce = 0
        self._attach_wait = 0.0
        self._attached_at = self._heard_at = self._asked_at = 0.0
        self.counters = LinkCounters()
        #: Why the agent at the other end is refused, or "".
        self.refused = ""

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
            self._enter(LinkState.CONNECTING)
            self._task = asyncio.create_task(self._run(), name=f"guest link {self._path}")

    async def close(self) -> None:
        """End the link; requests under way fail with ``PeerLost``."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the link to the guest agent at %s had ended", self._path, exc_info=error)
        self._fail_all(PeerLost("the link to the guest agent was closed"))
        self._enter(LinkState.CLOSED)

    @property
    def state(self) -> LinkState:
        return self._state

    @property
    def connected(self) -> bool:
        """A guest agent serves us now."""
        return self._state is LinkState.ATTACHED

    @property
    def hello(self) -> Hello | None:
        """What the agent of the present session said of itself. Its strings are the guest's: escape them to print."""
        return self._hello

    @property
    def dropped_bytes(self) -> int:
        """Bytes on the present connection that belonged to no intact frame."""
        return self._decoder.dropped_bytes

    async def wait_connected(self, timeout: float) -> Hello:
        """Wait until a guest agent serves us.

        :raise DeadlineExceeded: none did within ``timeout`` seconds.
        :raise RefusedError: the one that answered cannot be worked with.
        :raise PeerLost: the link is closed.
        """
        try:
            async with asyncio.timeout(timeout):
                while self._state is not LinkState.ATTACHED or self._hello is None:
                    if self._state is LinkState.REFUSED:
                        raise RefusedError(self.refused)
                    if self._state is LinkState.CLOSED:
                        raise PeerLost("the link to the guest agent is closed")
                    await self._changed.wait()
                return self._hello
        except TimeoutError as error:
            what = "QEMU's socket could not be reached" if self._state is LinkState.CONNECTING else "it did not answer"
            raise DeadlineExceeded(f"no guest agent within {timeout:g} s: {what}", "see the console log") from error

    # Requests

    async def scan(self, timeout: float) -> ScanReport:
        """The state of every page, by a scan begun after this call."""
        return await self._ask(Scan, ScanExchange(self._pages), timeout)

    async def confirm(self, epoch: bytes, round: int, timeout: float) -> NDArray[np.bool_]:
        """Which pages are free, in a scan begun after this call; shape (pages,).

        :param epoch: 16 bytes that no other epoch has.
        """
        exchange = ConfirmExchange(self._pages, epoch, round)
        return await self._ask(lambda request: Confirm(request, epoch, round), exchange, timeout)

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
        if self._hello is not None and not self._hello.exec_allowed:
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
        if self._state is not LinkState.ATTACHED:
            silent = self._state is LinkState.SILENT
            raise PeerLost(self.refused or f"the guest agent {'has fallen silent' if silent else 'is not connected'}")
        if len(self._pending) >= REQUESTS_MAX:
            raise RefusedError(f"{REQUESTS_MAX} requests to the guest agent are under way already")
        number = self._next_request
        self._next_request += 1
        frame = encode(make(number))
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending[number] = _Pending(exchange, answer)
        try:
            async with asyncio.timeout(timeout):
                await self._write(frame)
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"the guest agent did not answer within {timeout:g} s") from error
        finally:
            del self._pending[number]
            if not answer.cancel() and not answer.cancelled():
                answer.exception()

    async def _write(self, frame: bytes) -> None:
        """Write ``frame`` once there is room for it.

        :raise PeerLost: the connection is gone.
        """
        try:
            while self._writer is not None and self._writer.transport.get_write_buffer_size() > _WRITE_BOUND:
                await self._writer.drain()
            if self._writer is None:
                raise PeerLost("the link to the guest agent broke")
            self._writer.write(frame)
            await self._writer.drain()
        except OSError as error:
            raise PeerLost("the link to the guest agent broke") from error

    def _tell(self, message: Message) -> None:
        """Write ``message`` if there is room now; all that is told this way is told again, or may be lost."""
        if self._writer is not None and self._writer.transport.get_write_buffer_size() <= _WRITE_BOUND:
            self._writer.write(encode(message))

    # The connection

    async def _run(self) -> None:
        """Connect, converse, and again."""
        wait = 0.05
        while True:
            try:
                async with asyncio.timeout(_RECONNECT_MAX):
                    with address_of(Path(self._path)) as address:
                        reader, writer = await asyncio.open_unix_connection(address, limit=_READ_BYTES)
            except (OSError, TimeoutError):
                await asyncio.sleep(wait)
                wait = min(wait * 2, _RECONNECT_MAX)
                continue
            wait = 0.05
            try:
                await self._converse(reader, writer)
            except OSError:
                pass
            finally:
                self._writer = None
                writer.transport.abort()
                self._hello = None
                self._fail_all(PeerLost("QEMU closed the link to the guest agent"))
                self._enter(LinkState.CONNECTING)
            await asyncio.sleep(wait)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until QEMU closes the connection.

        :raise OSError: it broke.
        """
        writer.transport.set_write_buffer_limits(high=_WRITE_BOUND)
        self._writer = writer
        self._decoder = FrameDecoder()
        self._nonce = secrets.randbits(63) + 1
        self._heard_at = last_read = time.monotonic()
        self._enter(LinkState.ATTACHING)
        self._attach()
        while True:
            frames: list[Frame] = []
            try:
                async with asyncio.timeout(_TICK):
                    data = await reader.read(_READ_BYTES)
                if not data:
                    return
                last_read = time.monotonic()
                frames = self._decoder.feed(data)
            except TimeoutError:
                if self._decoder.buffered and time.monotonic() - last_read > _STALE_AFTER:
                    frames = self._decoder.give_up()
            for frame in frames:
                self._take(frame)
            self._tick()

    def _enter(self, state: LinkState) -> None:
        if state is self._state:
            return
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()
        if self._on_change is not None:
            self._on_change(state)

    def _fail_all(self, error: HvaError) -> None:
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(type(error)(error.message, error.hint))

    def _attach(self, patience: float = _ATTACH_FIRST) -> None:
        self._attached_at = time.monotonic()
        self._attach_wait = patience
        self._tell(Attach(self._nonce, FEATURES))

    def _tick(self) -> None:
        """What the passing of time asks for."""
        now = time.monotonic()
        if self._state is LinkState.ATTACHED:
            quiet = now - self._heard_at
            if quiet > _SILENT_AFTER:
                self._enter(LinkState.SILENT)
                self._attach()
            elif quiet > _PING_AFTER and now - self._asked_at > _PING_AFTER:
                self._asked_at = now
                self._tell(Ping(_KEEPALIVE))
        elif self._state is not LinkState.REFUSED and now - self._attached_at > self._attach_wait:
            self._attach(min(self._attach_wait * 2, _ATTACH_MAX))

    # What the guest says

    def _take(self, frame: Frame) -> None:
        try:
            message = decode(frame)
        except ProtocolError:
            self.counters.malformed += 1
            return
        if message is None:
            self.counters.unknown += 1
        elif isinstance(message, Hello):
            self._greeted(message)
        elif isinstance(message, Error):
            self._heard()
            self._denied(message)
        elif isinstance(message, Pong) and message.request == _KEEPALIVE:
            self._heard()
        else:
            self._answered(message)

    def _heard(self) -> None:
        self._heard_at = time.monotonic()
        if self._state is LinkState.SILENT:
            self._enter(LinkState.ATTACHED)

    def _answered(self, message: Message) -> None:
        """An answer, if anybody waits for it: late, repeated, foreign and invented ones count for nothing."""
        pending = self._pending.get(getattr(message, "request", -1))
        if pending is None or pending.answer.done() or not pending.exchange.expects(message):
            self.counters.unsolicited += 1
            return
        self._heard()
        try:
            result = pending.exchange.take(message)
        except HvaError as error:
            self.counters.broken_answers += isinstance(error, ProtocolError)
            pending.answer.set_exception(error)
        else:
            if result is not None:
                pending.answer.set_result(result)

    def _denied(self, message: Error) -> None:
        if message.code == ErrorCode.NOT_ATTACHED and self._state is LinkState.ATTACHED:
            # Our ACK was lost, or the agent has dropped the session.
            self._lose_session("the guest agent has dropped the session")
            return
        pending = self._pending.get(message.request)
        if pending is None or pending.answer.done():
            self.counters.unsolicited += 1
            return
        kind = RefusedError if message.code == ErrorCode.NOT_ALLOWED else GuestError
        pending.answer.set_exception(kind(f"the guest agent: {printable(message.text)}"))

    def _lose_session(self, why: str) -> None:
        """Fail what was asked, and attach again, but not as fast as a hostile guest might like."""
        self._hello = None
        self._fail_all(PeerLost(why))
        self._enter(LinkState.ATTACHING)
        if time.monotonic() - self._attached_at > _ATTACH_MIN:
            self._attach()
        else:
            self._attach_wait = _ATTACH_MIN

    def _greeted(self, hello: Hello) -> None:
        if hello.nonce != self._nonce:
            # An agent that has just opened its port, or one that answers somebody before us.
            self._lose_session("the guest agent was restarted")
            return
        self.refused = self._objection(hello)
        if self.refused:
            self._hello = None
            self._fail_all(RefusedError(self.refused))
            self._enter(LinkState.REFUSED)
            return
        if self._hello is not None and (hello.instance, hello.boot_id) != (self._hello.instance, self._hello.boot_id):
            self._fail_all(PeerLost("the guest agent was restarted"))
        self._hello = hello
        self._tell(Ack(hello.features & FEATURES))
        self._heard_at = time.monotonic()
        self._enter(LinkState.ATTACHED)

    def _objection(self, hello: Hello) -> str:
        """Why the agent cannot be worked with, or ""."""
        if hello.page_size != PAGE_SIZE:
            return f"the guest has pages of {hello.page_size} bytes, not {PAGE_SIZE}"
        end = 0
        for start, count in hello.ranges:
            if start < end or not count:
                return "the guest agent's memory ranges overlap, do not ascend, or are empty"
            end = start + count
        if end > self._pages:
            return f"the guest agent claims memory up to page {end}; the VM has {self._pages} pages"
        return ""
