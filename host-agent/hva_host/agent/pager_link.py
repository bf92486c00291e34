"""The host agent's end of its link to one pager."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hva_host.pager.messages import Message, MessageDecoder, encode
from hvaqemu.errors import PeerLost, ProtocolError, RefusedError
from hvaqemu.qemu.race import race
from hvaqemu.qemu.sockets import address_of

CALL_SECONDS = 10.0


class PagerLink:
    """Commands to a pager, one at a time or several at once, and its events.

    :param on_event: called in the event loop with an event's name and data, in order.
    :ivar lost: done once the link is gone; says why.
    """

    def __init__(self, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def connect(self, path: Path, timeout: float = CALL_SECONDS) -> None:
        """Connect to the pager listening at ``path``.

        :raise PeerLost: nobody listens.
        :raise DeadlineExceeded: nobody accepted in time.
        """
        try:
            with address_of(path) as address:
                reader, self._writer = await race(asyncio.open_unix_connection(address), timeout, "pager connection")
        except OSError as error:
            raise PeerLost(f"pager connection: {error.strerror}") from error
        self._task = asyncio.create_task(self._read(reader))

    async def call(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        payload: bytes | memoryview = b"",
        timeout: float = CALL_SECONDS,
    ) -> Any:
        """What the pager returns.

        :raise RefusedError: the pager's own refusal.
        :raise PeerLost: the pager went; whether the command took effect is unknown.
        :raise DeadlineExceeded: no answer in time.
        """
        if self._writer is None or self.lost.done():
            raise PeerLost(f"pager {command}: not connected")
        self._next += 1
        number = self._next
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write(encode({"id": number, "execute": command, "arguments": arguments or {}}, payload))
            message = await race(self._answer(answer), timeout, f"pager {command}", self.lost)
        finally:
            self._waiting.pop(number, None)
        if "error" in message:
            raise RefusedError(str(message["error"]))
        return message.get("return")

    async def close(self) -> None:
        """Hang up; the pager goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        self._end("closed")

    async def _answer(self, answer: asyncio.Future[Any]) -> Any:
        assert self._writer is not None
        # A pager that went while it was written to says so through ``lost``.
        with suppress(ConnectionError):
            await self._writer.drain()
        return await answer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = MessageDecoder()
        why = "the pager hung up"
        try:
            while data := await reader.read(1 << 16):
                for message, _ in decoder.feed(data):
                    self._deliver(message)
        except OSError:
            # Killed with our bytes unread: the same to us.
            why = "the pager hung up"
        except ProtocolError as error:
            why = str(error)
        finally:
            self._end(why)

    def _deliver(self, message: Message) -> None:
        if "event" in message:
            self._on_event(str(message["event"]), message.get("data") or {})
            return
        answer = self._waiting.get(message.get("id", -1))
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _end(self, why: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if not self.lost.done():
            self.lost.set_result(why)
