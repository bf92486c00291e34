"""The link between host agent and pager: a unix socket, JSON lines, each perhaps with bytes behind it.

``{"id": 1, "execute": NAME, "arguments": {…}, "payload": N}`` and N bytes; answered by ``{"id": 1, "return": {…}}``
or ``{"id": 1, "error": TEXT}``. Events are ``{"event": NAME, "data": {…}}``. Both sides are ours, and each still
bounds what the other sends.

| command | arguments | payload | returns |
|---|---|---|---|
| ``hello`` | | | pages, pid, version |
| ``add-layer`` | path, index | | slot |
| ``begin-epoch`` | seconds, first: pfn, store: its limit in bytes, round: the same for all parts of an epoch,
drain: wait for ``drained``, sampled: copies go by samples, most: pages, or none for any number | a byte a page
(``Member``, ``SWAP_CACHE`` of :mod:`hva_host.pager.membership`) | number |
| ``confirm`` | epoch (hex), round | a bit a page of the epoch, first page in the highest bit | accepted |
| ``drained`` | epoch (hex) | | accepted |
| ``layers`` | | | layers: slot, path, withdrawn, pages that depend on each |
| ``withdraw-layer`` | path, move | | nothing new is matched with it; ``move``: its pages become resident: pages, left |
| ``drop-layer`` | path | | its slot is free again if it was withdrawn and no page depends on it: dropped, left |
| ``abandon`` | | | |
| ``restore`` | | | once every page with an entry is resident: pages |
| ``resume`` | | | held: pages; answered once the disk has brought what it takes to try, or after some seconds |
| ``residence`` | start, pages | | map: base64, zlib, a byte a page |
| ``status`` | | | what the pager knows |

Events: ``protected`` (epoch, number, wants, drain) once the pages are protected; ``epoch-done`` with what the epoch
did; ``held`` when a fault must not be answered.
"""

from __future__ import annotations

import json
from typing import Any

from hvaqemu.errors import ProtocolError

HEADER_MAX = 1 << 20
PAYLOAD_MAX = 256 << 20
#: Looked up and compressed between two faults, in less than a millisecond.
RESIDENCE_PAGES_MAX = 32 * 1024

Message = dict[str, Any]


def encode(message: Message, payload: bytes | memoryview = b"") -> bytes:
    """One message on the wire."""
    if len(payload):
        message = {**message, "payload": len(payload)}
    return json.dumps(message, separators=(",", ":")).encode() + b"\n" + bytes(payload)


class MessageDecoder:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header: Message | None = None
        self._missing = 0

    def feed(self, data: bytes) -> list[tuple[Message, bytes]]:
        """The messages completed by ``data``.

        :raise ProtocolError: not a message, or beyond the bounds; the link is then useless.
        """
        self._buffer += data
        found = []
        while (message := self._next()) is not None:
            found.append(message)
        return found

    def _next(self) -> tuple[Message, bytes] | None:
        if self._header is None:
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > HEADER_MAX:
                    raise ProtocolError("a pager message has no end")
                return None
            self._header = self._parse(bytes(self._buffer[:end]))
            del self._buffer[: end + 1]
        if len(self._buffer) < self._missing:
            return None
        payload = bytes(self._buffer[: self._missing])
        del self._buffer[: self._missing]
        header, self._header, self._missing = self._header, None, 0
        return header, payload

    def _parse(self, line: bytes) -> Message:
        try:
            header = json.loads(line)
        except ValueError as error:
            raise ProtocolError("a pager message is not JSON") from error
        if not isinstance(header, dict):
            raise ProtocolError("a pager message is not an object")
        missing = header.pop("payload", 0)
        if not isinstance(missing, int) or not 0 <= missing <= PAYLOAD_MAX:
            raise ProtocolError(f"a pager message with a payload of {missing} bytes")
        self._missing = missing
        return header
