"""Just enough of HTTP/1.1 (RFC 9112) to send GET again and again over connections that stay open."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from contextlib import suppress
from dataclasses import dataclass

from hvaqemu.errors import PeerLost, ProtocolError

_BODY_MAX = 64 << 20
_HEADERS_MAX = 100


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    #: SHA-256 of the body as its sender knows it (RFC 9530); None: it does not say.
    digest: bytes | None
    body: bytes


class Connections:
    """Connections to one server, made when they are needed."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, path: str) -> Answer:
        """Ask for a path.

        :raise PeerLost: there is no such server, or it closed the connection.
        :raise ProtocolError: it answered with something else.
        """
        while self._idle:
            reader, writer = self._idle.pop()
            if reader.at_eof():
                writer.close()
                continue
            return await self._ask(reader, writer, path)
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            # asyncio's own words name address and port once more.
            why = os.strerror(error.errno) if error.errno else str(error)
            raise PeerLost(f"can not connect: {why}") from error
        return await self._ask(reader, writer, path)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> Answer:
        keep = False
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode("ascii"))
            answer, keep = await _read(reader)
            return answer
        except (OSError, EOFError) as error:
            raise PeerLost("the connection was closed before the answer was whole") from error
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise ProtocolError("not an answer by HTTP/1.1 with a length") from error
        finally:
            if keep:
                self._idle.append((reader, writer))
            else:
                # Also when the time is over: what comes late must not be taken for the next answer.
                writer.close()

    async def close(self) -> None:
        """Close all that are idle."""
        for _reader, writer in self._idle:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()


async def _read(reader: asyncio.StreamReader) -> tuple[Answer, bool]:
    """An answer, and whether another may follow it."""
    version, status, *_reason = (await reader.readuntil(b"\r\n")).split(maxsplit=2)
    headers: dict[bytes, bytes] = {}
    while line := (await reader.readuntil(b"\r\n")).strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
        if len(headers) > _HEADERS_MAX:
            raise ValueError("too many headers")
    length = int(headers[b"content-length"]) if b"content-length" in headers else -1
    if not 0 <= length <= _BODY_MAX:
        raise ValueError("no length, or too much")
    body = await reader.readexactly(length)
    keep = version == b"HTTP/1.1" and headers.get(b"connection", b"").lower() != b"close"
    return Answer(int(status), _digest(headers.get(b"repr-digest", b"")), body), keep


def _digest(header: bytes) -> bytes | None:
    algorithm, _, value = header.partition(b"=")
    if algorithm != b"sha-256":
        return None
    try:
        return base64.b64decode(value.strip(b":"), validate=True)
    except binascii.Error as error:
        raise ValueError("a digest that is none") from error
