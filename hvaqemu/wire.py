"""The kinds of fields messages are made of: each packs a value and unpacks it again, within its bound.

Standard library only, Python >= 3.9. Packing beyond a bound is a mistake of ours: ``ValueError``. Unpacking what does
not fit is a mistake, or malice, of the peer: ``ProtocolError``; nothing is allocated on a peer's word.
"""

from __future__ import annotations

import struct
from typing import Any

from hvaqemu.errors import ProtocolError


class Number:
    """A big-endian integer, by the letter the struct module gives it."""

    def __init__(self, code: str) -> None:
        self._struct = struct.Struct(">" + code)

    def pack(self, value: int) -> bytes:
        try:
            return self._struct.pack(value)
        except struct.error as error:
            raise ValueError(f"{value} does not fit its field: {error}") from error

    def unpack(self, data: bytes, offset: int) -> tuple[int, int]:
        end = offset + self._struct.size
        if end > len(data):
            raise ProtocolError("a message ends within a number")
        return self._struct.unpack_from(data, offset)[0], end


U8, U16, U32, U64 = Number("B"), Number("H"), Number("I"), Number("Q")


class Later:
    """A number that a later version put behind the others; where an earlier one does not send it, ``missing``."""

    def __init__(self, number: Number, missing: int) -> None:
        self._number = number
        self._missing = missing

    def pack(self, value: int) -> bytes:
        return self._number.pack(value)

    def unpack(self, data: bytes, offset: int) -> tuple[int, int]:
        return (self._missing, offset) if offset == len(data) else self._number.unpack(data, offset)


class Bytes:
    """A length (u32) and as many bytes, at most ``bound``."""

    def __init__(self, bound: int) -> None:
        self._bound = bound

    def pack(self, value: bytes) -> bytes:
        if len(value) > self._bound:
            raise ValueError(f"{len(value)} bytes are beyond the bound of {self._bound}")
        return U32.pack(len(value)) + value

    def unpack(self, data: bytes, offset: int) -> tuple[bytes, int]:
        length, offset = U32.unpack(data, offset)
        if length > self._bound or offset + length > len(data):
            raise ProtocolError(f"a field claims {length} bytes")
        return data[offset : offset + length], offset + length


class Text:
    """UTF-8, at most ``bound`` bytes; the sender shortens what is longer, the receiver replaces what is not UTF-8."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._bytes = Bytes(bound)

    def pack(self, value: str) -> bytes:
        encoded = value.encode("utf-8", "replace")
        if len(encoded) > self._bound:
            encoded = encoded[: self._bound].decode("utf-8", "ignore").encode()
        return self._bytes.pack(encoded)

    def unpack(self, data: bytes, offset: int) -> tuple[str, int]:
        raw, offset = self._bytes.unpack(data, offset)
        return raw.decode("utf-8", "replace"), offset


class Sixteen:
    """Exactly sixteen bytes."""

    def pack(self, value: bytes) -> bytes:
        if len(value) != 16:
            raise ValueError(f"an identifier has 16 bytes, not {len(value)}")
        return value

    def unpack(self, data: bytes, offset: int) -> tuple[bytes, int]:
        if offset + 16 > len(data):
            raise ProtocolError("a message ends within an identifier")
        return data[offset : offset + 16], offset + 16


class Pair:
    """Two u64."""

    def pack(self, value: tuple[int, int]) -> bytes:
        return U64.pack(value[0]) + U64.pack(value[1])

    def unpack(self, data: bytes, offset: int) -> tuple[tuple[int, int], int]:
        first, offset = U64.unpack(data, offset)
        second, offset = U64.unpack(data, offset)
        return (first, second), offset


class List:
    """A count (u16) and as many items, at most ``bound``."""

    def __init__(self, item: Any, bound: int) -> None:
        self._item = item
        self._bound = bound

    def pack(self, value: tuple[Any, ...]) -> bytes:
        if len(value) > self._bound:
            raise ValueError(f"{len(value)} items are beyond the bound of {self._bound}")
        return U16.pack(len(value)) + b"".join(self._item.pack(item) for item in value)

    def unpack(self, data: bytes, offset: int) -> tuple[tuple[Any, ...], int]:
        count, offset = U16.unpack(data, offset)
        if count > self._bound:
            raise ProtocolError(f"a list claims {count} items")
        items = []
        for _ in range(count):
            item, offset = self._item.unpack(data, offset)
            items.append(item)
        return tuple(items), offset
