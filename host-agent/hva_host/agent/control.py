"""The control socket: a server of QMP's own protocol, for any client of QMP that runs as our user or as root."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hva_host.agent import control_wire as wire
from hva_host.agent.control_commands import Command, CommandTable, to_wire
from hva_host.agent.events import what_is_wrong
from hvaqemu.errors import HvaError, ProtocolError
from hvaqemu.qemu import sockets

log = logging.getLogger(__name__)

CONTROL_SOCKET = "control.sock"

CLIENTS_MAX = 64
#: Commands of one client that wait for their turn; then nothing more is read from it.
_PENDING_MAX = 16
#: Messages that wait for a client to read them; then it is dropped.
_OUTGOING_MAX = 512
#: Seconds a client may leave what we write unread; then it is dropped.
_WRITE_SECONDS = 30.0
#: Seconds for clients to read their last replies when the server closes.
_FLUSH_SECONDS = 1.0

_UCRED = struct.Struct("3i")  # unix(7): pid, uid, gid


class ControlServer:
    """Listens at a path, from :meth:`start` to :meth:`close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sessions: set[_Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Commands that go on although who asked for them has gone.
        self._detached: set[asyncio.Task[dict[str, Any]]] = set()
        self._server: asyncio.AbstractServer | None = None
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """Take the path: from here on clients can connect, and wait to be greeted until :meth:`start`.

        :raise HostError: the socket can not be made.
        """
        self._listener = sockets.listen(self.path)

    async def start(self, commands: CommandTable) -> None:
        """Greet and serve clients. :meth:`listen` must have been called."""
        assert self._listener is not None

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(commands, reader, writer)

        self._server = await asyncio.start_unix_server(serve, sock=self._listener)

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Send an event to all clients that have negotiated."""
        if what := what_is_wrong(event, data):
            log.error("%s", what)
        now = time.time_ns()
        message = wire.encode(
            {
                "event": event,
                "data": data,
                "timestamp": {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6},
            }
        )
        for session in list(self._sessions):
            if session.negotiated:
                session.send(message)

    async def close(self) -> None:
        """Stop listening, let clients read their last replies, hang up. Commands in progress are cancelled."""
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                await asyncio.gather(*(session.flushed() for session in self._sessions))
        tasks = self._tasks | self._detached
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _serve(self, commands: CommandTable, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if (uid := _peer_uid(writer.get_extra_info("socket"))) not in (os.geteuid(), 0):
                log.warning("refused user %d on the control socket", uid)
                return
            if len(self._sessions) >= CLIENTS_MAX:
                log.warning("refused a client on the control socket: %d are connected", CLIENTS_MAX)
                return
            # So that drain() returns only once all is in the kernel's hands: what is left then is thrown away below.
            writer.transport.set_write_buffer_limits(0)
            session = _Session(commands, reader, writer, self._detached)
            self._sessions.add(session)
            try:
                await session.run()
            finally:
                self._sessions.discard(session)
        except asyncio.CancelledError:
            # Only close() cancels; the stream machinery would log this as an error.
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()


class _Session:
    """One client. Its commands run one after another, as QMP promises; other clients' run beside them."""

    def __init__(
        self,
        commands: CommandTable,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        detached: set[asyncio.Task[dict[str, Any]]],
    ) -> None:
        self.negotiated = False
        self._commands = commands
        self._reader = reader
        self._writer = writer
        self._detached = detached
        self._incoming: asyncio.Queue[bytes | ProtocolError] = asyncio.Queue(_PENDING_MAX)
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue(_OUTGOING_MAX)
        self._unread = asyncio.Event()

    def send(self, message: bytes) -> None:
        """Queue a message. A client that has left too many unread is dropped."""
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self._unread.set()

    async def flushed(self) -> None:
        """Wait until all that was queued has been handed to the kernel."""
        await self._outgoing.join()

    async def run(self) -> None:
        """Serve until the client hangs up, is dropped or breaks the protocol."""
        self.send(wire.encode(wire.greeting()))
        tasks = {asyncio.create_task(part) for part in (self._read(), self._work(), self._write(), self._drop())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            if (error := task.exception()) is not None and not isinstance(error, OSError | TimeoutError):
                log.error("while serving a client of the control socket", exc_info=error)

    async def _read(self) -> None:
        splitter = wire.Splitter()
        try:
            while data := await self._reader.read(1 << 16):
                for message in splitter.feed(data):
                    await self._incoming.put(message)
        except ProtocolError as error:
            await self._incoming.put(error)
            # The other tasks tell the client and end the session.
            await asyncio.Event().wait()

    async def _write(self) -> None:
        while True:
            message = await self._outgoing.get()
            self._writer.write(message)
            async with asyncio.timeout(_WRITE_SECONDS):
                await self._writer.drain()
            self._outgoing.task_done()

    async def _drop(self) -> None:
        await self._unread.wait()
        log.warning("dropped a client of the control socket: it does not read")

    async def _work(self) -> None:
        while True:
            message = await self._incoming.get()
            if isinstance(message, ProtocolError):
                self.send(wire.encode(_error(wire.GENERIC_ERROR, str(message))))
                await self.flushed()
                return
            self.send(wire.encode(await self._answer(message)))

    async def _answer(self, raw: bytes) -> dict[str, Any]:
        try:
            message = wire.decode(raw)
        except ProtocolError as error:
            return _error(wire.GENERIC_ERROR, str(error))
        reply = await self._execute(message)
        return {**reply, "id": message["id"]} if "id" in message else reply

    async def _execute(self, message: dict[str, Any]) -> dict[str, Any]:
        if unknown := message.keys() - {"execute", "arguments", "id"}:
            return _error(wire.GENERIC_ERROR, f"QMP input member {sorted(unknown)[0]!r} is unexpected")
        name = message.get("execute")
        if not isinstance(name, str):
            return _error(wire.GENERIC_ERROR, "QMP input needs a text member 'execute'")
        arguments = message.get("arguments", {})
        if not self.negotiated:
            if name != "qmp_capabilities":
                return _error(wire.COMMAND_NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'")
            if arguments not in ({}, {"enable": []}):
                return _error(wire.GENERIC_ERROR, "qmp_capabilities: there are no capabilities to enable")
            self.negotiated = True
            return {"return": {}}
        if name == "qmp_capabilities":
            return _error(
                wire.COMMAND_NOT_FOUND,
                "Capabilities negotiation is already complete, command 'qmp_capabilities' ignored",
            )
        command = self._commands.get(name)
        if command is None:
            return _error(wire.COMMAND_NOT_FOUND, f"The command {name} has not been found")
        if not command.detached:
            return await _run(command, arguments)
        task = asyncio.create_task(_run(command, arguments))
        self._detached.add(task)
        task.add_done_callback(self._detached.discard)
        return await asyncio.shield(task)


async def _run(command: Command, arguments: object) -> dict[str, Any]:
    try:
        return {"return": to_wire(await command.run(command.parse(arguments)))}
    except HvaError as error:
        return {"error": wire.error_to_wire(error)}
    except Exception as error:
        log.exception("command %s failed", command.name)
        return _error(wire.INTERNAL_ERROR, f"{command.name}: {type(error).__name__}: {error}")


def _error(name: str, text: str) -> dict[str, Any]:
    return {"error": {"class": name, "desc": text}}


def _peer_uid(connection: Any) -> int:
    """The user at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(raw)[1]
    return uid
