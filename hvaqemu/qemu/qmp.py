"""The link to QEMU's monitor: typed replies and events on top of ``qemu.qmp``. No wait is without a deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, Runstate, StateError
from qemu.qmp.error import QMPError
from qemu.qmp.message import Message

from hvaqemu.errors import DeadlineExceeded, HvaError, PeerLost, ProtocolError
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.qemu.events import BalloonChange, QmpEvent, parse_event
from hvaqemu.qemu.process import QemuProcess
from hvaqemu.qemu.race import race
from hvaqemu.qemu.sockets import address_of
from hvaqemu.units import format_size

T = TypeVar("T")
log = logging.getLogger(__name__)
# qemu.qmp logs every lost connection as an error; without a handler that would reach the terminal.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

EXECUTE_SECONDS = 10.0
CLOSE_SECONDS = 5.0


class _Client(QMPClient):
    """Makes a text of a message only where somebody reads the log: that takes longer than all else about it."""

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg


class QmpError(HvaError):
    """QEMU understood a command and refused it; the message is QEMU's."""

    def __init__(self, command: str, error_class: str, said: str) -> None:
        super().__init__(f"QMP {command}: {said}")
        self.command = command
        self.error_class = error_class


class _Reply(BaseModel):
    # QEMU adds members with time; only what is read here must be there.
    model_config = ConfigDict(frozen=True, extra="ignore")


class RunStatus(_Reply):
    """``query-status``."""

    running: bool
    #: QEMU's word: running, paused, prelaunch, guest-panicked, shutdown, ...
    status: str


class _Balloon(_Reply):
    actual: int = Field(ge=0)


class MemoryDevice(_Reply):
    """``query-memory-devices``: RAM that was plugged in."""

    type: str


class Migration(_Reply):
    """``query-migrate``; None: there never was one."""

    status: str | None = None


class BlockCache(_Reply):
    """How a node's file is cached."""

    direct: bool


class BlockNode(_Reply):
    """``query-named-block-nodes``: an open image."""

    node_name: str = Field(alias="node-name")
    driver: str = Field(alias="drv")
    file: str
    read_only: bool = Field(alias="ro")
    cache: BlockCache
    backing_file: str | None = None


class _Sink(EventListener):
    """Hands events on at once. The library's own listeners keep every event for ever."""

    def __init__(self, deliver: Callable[[QmpEvent], None]) -> None:
        super().__init__()
        self._deliver = deliver

    async def put(self, event: Message) -> None:
        try:
            self._deliver(parse_event(event))
        except Exception:
            # An exception here would end the connection.
            log.exception("while handling QMP event %s", event.get("event"))


def _ignore(_event: QmpEvent) -> None:
    pass


class QmpLink:
    """The monitor of one QEMU. May be connected again after the connection was lost."""

    def __init__(self, process: QemuProcess, path: Path, on_event: Callable[[QmpEvent], None] = _ignore) -> None:
        """:param on_event: called in the event loop for each event, in order; must not block."""
        self._process = process
        self._path = path
        self._on_event = on_event
        self._client: QMPClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._ballooned = asyncio.Event()
        #: Of the current connection; its result says why it was lost.
        self._lost: asyncio.Future[str] | None = None
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._lost is not None and not self._lost.done()

    async def connect(self, timeout: float = 10.0) -> None:
        """Connect, after closing what was connected before.

        :raise PeerLost: QEMU ended, or hung up.
        :raise DeadlineExceeded: QEMU did not greet us in time; it serves one client at a time.
        """
        await self.close()
        client = _Client(f"qemu-{self._process.pid}")
        client.events.event_filter = lambda _event: False
        client.register_listener(_Sink(self._deliver))
        try:
            with address_of(self._path) as address:
                await self._process.race(client.connect(address), timeout, "QMP connection")
        except ConnectError as error:
            # A QEMU that ends closes its sockets a moment before the kernel tells us.
            with suppress(DeadlineExceeded):
                raise PeerLost(f"QMP connection: {await self._process.wait(1.0)}") from error
            raise PeerLost(f"QMP connection: {error.exc}") from error
        except OSError as error:
            raise PeerLost(f"QMP connection: {self._path.parent}: {error.strerror}") from error
        self._client = client
        self._lost = asyncio.get_running_loop().create_future()
        self._up.set()
        self._watcher = asyncio.create_task(_watch(client, self._lost))

    async def wait_connected(self, timeout: float) -> None:
        """Wait until somebody has connected this.

        :raise PeerLost: QEMU ended.
        :raise DeadlineExceeded: nobody could, in ``timeout`` seconds.
        """
        if not self.connected:
            self._up.clear()
            await self._process.race(self._up.wait(), timeout, "QMP connection")

    def _deliver(self, event: QmpEvent) -> None:
        if isinstance(event, BalloonChange):
            self._ballooned.set()
        self._on_event(event)

    async def lost(self) -> str:
        """Wait until the connection is lost; why. Has no deadline of its own: it is what others are raced against."""
        if self._lost is None:
            return "not connected"
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Hang up; QEMU goes on."""
        client, watcher, lost = self._client, self._watcher, self._lost
        self._client = self._watcher = None
        if client is None or watcher is None or lost is None:
            return
        # Once the client is disconnecting, the watcher collects it; before that, it only waits and can be cancelled.
        if client.runstate is Runstate.RUNNING:
            watcher.cancel()
            await asyncio.wait({watcher})
            watcher = asyncio.create_task(_collect(client, lost))
        # Bounded: a QEMU that does not read keeps the last command from being flushed.
        await asyncio.wait({watcher}, timeout=CLOSE_SECONDS)
        watcher.cancel()
        if not lost.done():
            lost.set_result("closed")

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = EXECUTE_SECONDS
    ) -> object:
        """What QEMU returns.

        :raise QmpError: QEMU refuses.
        :raise PeerLost: QEMU ended or the connection is lost; whether the command took effect is unknown.
        :raise DeadlineExceeded: no answer in time; the command may still take effect.
        """
        client, lost = self._client, self._lost
        what = f"QMP {command}"
        if client is None or lost is None or lost.done():
            raise PeerLost(f"{what}: not connected")
        try:
            return await race(client.execute(command, arguments), timeout, what, self._process.exited, lost)
        except ExecuteError as error:
            raise QmpError(command, error.error_class, str(error)) from error
        except (ExecInterruptedError, StateError) as error:
            # The library may know of it a moment before we do.
            raise PeerLost(f"{what}: the connection was lost") from error
        except QMPError as error:
            raise ProtocolError(f"{what}: {error}") from error

    async def _query(self, command: str, adapter: TypeAdapter[T], timeout: float, **arguments: object) -> T:
        reply = await self.execute(command, arguments or None, timeout=timeout)
        try:
            return adapter.validate_python(reply)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ProtocolError(f"QMP {command}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    async def status(self, timeout: float = EXECUTE_SECONDS) -> RunStatus:
        """Whether the guest runs. Raises as :meth:`execute`; so do all below."""
        return await self._query("query-status", TypeAdapter(RunStatus), timeout)

    async def cont(self, timeout: float = EXECUTE_SECONDS) -> None:
        """Let the guest run."""
        await self.execute("cont", timeout=timeout)

    async def pause(self, timeout: float = EXECUTE_SECONDS) -> None:
        """Stop the guest's vCPUs. No answer comes while one of them is inside an unanswered fault."""
        await self.execute("stop", timeout=timeout)

    async def migration(self, timeout: float = EXECUTE_SECONDS) -> Migration:
        return await self._query("query-migrate", TypeAdapter(Migration), timeout)

    async def memory_devices(self, timeout: float = EXECUTE_SECONDS) -> list[MemoryDevice]:
        return await self._query("query-memory-devices", TypeAdapter(list[MemoryDevice]), timeout)

    async def block_nodes(self, timeout: float = EXECUTE_SECONDS) -> list[BlockNode]:
        return await self._query("query-named-block-nodes", TypeAdapter(list[BlockNode]), timeout, flat=True)

    async def balloon_actual(self, timeout: float = EXECUTE_SECONDS) -> int:
        """Bytes the balloon leaves to the guest.

        :raise QmpError: the guest has no balloon driver running.
        """
        return (await self._query("query-balloon", TypeAdapter(_Balloon), timeout)).actual

    async def balloon(self, size: int, timeout: float) -> int:
        """Ask the guest to live with ``size`` bytes and wait until it does; bytes it has then.

        :raise DeadlineExceeded: the guest did not get there; it keeps trying.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        # A balloon takes whole pages (QEMU, hw/virtio/virtio-balloon.c, virtio_balloon_to_target).
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        await self.execute("balloon", {"value": size}, timeout=timeout)
        while True:
            self._ballooned.clear()
            actual = await self.balloon_actual(max(0.1, until - loop.time()))
            if actual == size:
                return actual
            left = until - loop.time()
            if left <= 0:
                raise DeadlineExceeded(
                    f"balloon: the guest has {format_size(actual)} after {timeout:g} s, not {format_size(size)}"
                )
            # QEMU sends at most one of these events a second.
            await self._changed(min(left, 0.2))

    async def balloon_as_it_is(self, timeout: float = EXECUTE_SECONDS) -> int:
        """Have the guest keep the bytes it has, whatever it was asked for; those bytes."""
        actual = await self.balloon_actual(timeout)
        await self.execute("balloon", {"value": actual}, timeout=timeout)
        return actual

    async def _changed(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ballooned.wait()


async def _watch(client: QMPClient, lost: asyncio.Future[str]) -> None:
    """Says once, through ``lost``, that the connection is gone, and collects what is left of it."""
    while client.runstate is Runstate.RUNNING:
        await client.runstate_changed()
    await _collect(client, lost)


async def _collect(client: QMPClient, lost: asyncio.Future[str]) -> None:
    why = await _disconnect(client)
    if not lost.done():
        lost.set_result(why)


async def _disconnect(client: QMPClient) -> str:
    """Why the connection ended."""
    try:
        await client.disconnect()
    except EOFError:
        return "QEMU hung up"
    except (OSError, QMPError) as error:
        return str(error)
    return "closed"
