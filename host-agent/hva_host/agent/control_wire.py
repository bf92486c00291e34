"""The control socket's language, which is QMP's: JSON values one after another, with or without line ends.

QMP: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hvaqemu import __version__, errors
from hvaqemu.errors import HvaError, ProtocolError

#: Bytes of one message to the host agent; what the library of a client takes back is 10 MiB.
MESSAGE_MAX = 1 << 20

#: QMP's own classes of errors; all others are names of our error tree.
COMMAND_NOT_FOUND = "CommandNotFound"
GENERIC_ERROR = "GenericError"
#: The host agent failed at something that is not the user's to mend.
INTERNAL_ERROR = "InternalError"

_MARK = re.compile(rb'["{}\[\]\n]')
_END_OF_STRING = re.compile(rb'\\.|["\n]', re.DOTALL)
_BLANK = b" \t\r\n"


class Splitter:
    """Cuts a stream of bytes into JSON objects. Clients of QMP need not end them with a line end, and some do not.

    What can not be an object comes out up to its line end, for the parser to complain about.
    """

    def __init__(self, limit: int = MESSAGE_MAX) -> None:
        """:param limit: bytes an object may have."""
        self._limit = limit
        self._buffer = bytearray()
        #: Where in the buffer to go on.
        self._at = 0
        self._depth = 0
        self._in_string = False
        self._garbage = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The objects that ``data`` completes, in order.

        :raise ProtocolError: an object is longer than the limit; what follows can not be trusted.
        """
        self._buffer += data
        while (end := self._find_end()) is not None:
            piece = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._at = self._depth = 0
            self._in_string = self._garbage = False
            if piece.strip(_BLANK):
                self._check(len(piece))
                yield piece
        self._check(len(self._buffer))

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise ProtocolError(f"a message of more than {self._limit} bytes")

    def _find_end(self) -> int | None:
        """The end of the first object in the buffer; None: it has not come yet."""
        buffer = self._buffer
        if self._depth == 0 and not self._garbage:
            blank = len(buffer) - len(buffer.lstrip(_BLANK))
            del buffer[:blank]
            self._at = 0
            if not buffer:
                return None
            self._garbage = not buffer.startswith(b"{")
        if self._garbage:
            end = buffer.find(b"\n", self._at)
            self._at = len(buffer)
            return None if end < 0 else end + 1
        while True:
            match = (_END_OF_STRING if self._in_string else _MARK).search(buffer, self._at)
            if match is None:
                # A backslash at the very end escapes what has not come yet, if it is not escaped itself.
                self._at = max(self._at, len(buffer) - (self._in_string and buffer.endswith(b"\\")))
                return None
            self._at = match.end()
            mark = match[0]
            if self._in_string:
                if mark == b"\n":
                    # No string of JSON spans lines: this is where a broken message ends.
                    return self._at
                self._in_string = mark != b'"'
            elif mark == b'"':
                self._in_string = True
            elif mark in b"{[":
                self._depth += 1
            elif mark in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    return self._at


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as QEMU writes them: ASCII, one line."""
    return json.dumps(message, separators=(",", ":"), default=str).encode() + b"\r\n"


def decode(raw: bytes) -> dict[str, Any]:
    """The object ``raw`` is.

    :raise ProtocolError: it is none.
    """
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"JSON parse error: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError("QMP input must be a JSON object")
    return message


def greeting() -> dict[str, Any]:
    """What the server says first."""
    return {"QMP": {"version": version(), "capabilities": []}}


def version() -> dict[str, Any]:
    """Our version in the shape that clients of QMP expect QEMU's in."""
    major, minor, micro = (int(part) for part in __version__.split("."))
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"hvaqemu {__version__}"}


def error_to_wire(error: HvaError) -> dict[str, str]:
    """The ``error`` member for ``error``: the nearest class of the common tree, so that a client can raise it again."""
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    wire = {"class": known.__name__, "desc": error.message}
    return {**wire, "hint": error.hint} if error.hint else wire


def error_from_wire(name: str, message: str, hint: str) -> HvaError:
    """The error a server meant; one that is not of our tree becomes a :class:`ProtocolError`."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, HvaError):
        return kind(message, hint)
    return ProtocolError(f"{message} [{name}]", hint)
