"""Frames on a byte stream that may carry garbage: a magic, a header with its own CRC, a payload with another.

Standard library only, Python >= 3.9, no I/O. The header is ``magic, version, type, flags, length, payload CRC, header
CRC``, big endian. A length is believed only when the header's CRC holds, so corrupt bytes never make a reader wait for,
or allocate, what nobody sends. After garbage a reader finds the next frame by its magic.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

MAGIC = b"\x89HVA"
VERSION = 1
#: Bytes; bounds what one frame makes a reader hold.
PAYLOAD_MAX = 256 * 1024

_HEADER = struct.Struct(">4sBBHIII")
_COVERED = struct.Struct(">4sBBHII")
HEADER_SIZE = _HEADER.size

#: Bytes looked at in one go, so that a huge ``feed`` does not grow the buffer.
_SLICE = 64 * 1024
#: Bytes of payload that may be checked for each byte fed. Frames hidden inside a corrupt frame's payload are looked
#: for, but a payload made of headers that all claim large payloads must not cost the square of its size.
_CHECKS_PER_BYTE = 4


class Frame(NamedTuple):
    """One intact frame of our version: the number of its type and its payload."""

    type: int
    payload: bytes


def encode_frame(kind: int, payload: bytes) -> bytes:
    """The bytes of a frame.

    :raise ValueError: ``payload`` is longer than ``PAYLOAD_MAX`` bytes.
    """
    if len(payload) > PAYLOAD_MAX:
        raise ValueError(f"a payload of {len(payload)} bytes is beyond the bound of {PAYLOAD_MAX}")
    covered = _COVERED.pack(MAGIC, VERSION, kind, 0, len(payload), zlib.crc32(payload))
    return covered + zlib.crc32(covered).to_bytes(4, "big") + payload


class FrameDecoder:
    """Finds frames in a stream. Never raises, holds at most one frame and 64 KiB, takes time linear in what is fed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._credit = _CHECKS_PER_BYTE * PAYLOAD_MAX
        #: Headers looked at, sound or not: what reading costs, beside its bytes.
        self.headers = 0
        #: Bytes that belonged to no intact frame.
        self.dropped_bytes = 0
        #: Frames whose header was intact and whose payload was not.
        self.corrupt_frames = 0
        #: Intact frames of another protocol version.
        self.foreign_frames = 0

    @property
    def buffered(self) -> int:
        """Bytes held of a frame that is not complete; 0 between frames."""
        return len(self._buffer)

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames completed by ``data``, in order."""
        frames: list[Frame] = []
        view = memoryview(data)
        for start in range(0, len(data), _SLICE):
            piece = view[start : start + _SLICE]
            self._buffer += piece
            self._credit = min(self._credit + _CHECKS_PER_BYTE * len(piece), _CHECKS_PER_BYTE * PAYLOAD_MAX)
            self._extract(frames, 0)
        return frames

    def give_up(self) -> list[Frame]:
        """Treat the incomplete frame's first byte as garbage and look again: frames that were taken for its payload.

        For a sender that died in the middle of a frame: what its successor sends would be swallowed as the rest of it.
        Call it when a frame has stayed incomplete without a byte arriving for a while.
        """
        frames: list[Frame] = []
        if self._buffer:
            self.dropped_bytes += 1
            self._extract(frames, 1)
        return frames

    def _extract(self, frames: list[Frame], position: int) -> None:
        """Append complete frames from ``position`` on to ``frames``; drop what was used."""
        buffer = self._buffer
        while True:
            found = buffer.find(MAGIC, position)
            if found < 0:
                found = len(buffer) - self._magic_begun(position)
            self.dropped_bytes += found - position
            position = found
            if len(buffer) - found < HEADER_SIZE:
                break
            self.headers += 1
            _, version, kind, _, length, payload_crc, header_crc = _HEADER.unpack_from(buffer, found)
            start = found + HEADER_SIZE
            if length > PAYLOAD_MAX or zlib.crc32(buffer[found : start - 4]) != header_crc:
                position = found + 1
                self.dropped_bytes += 1
                continue
            if len(buffer) - start < length:
                break
            payload = bytes(memoryview(buffer)[start : start + length])
            self._credit -= length
            position = start + length
            if zlib.crc32(payload) != payload_crc:
                self.corrupt_frames += 1
                if self._credit > 0:
                    position = found + 1
                self.dropped_bytes += position - found
            elif version != VERSION:
                self.foreign_frames += 1
            else:
                frames.append(Frame(kind, payload))
        del buffer[:position]

    def _magic_begun(self, position: int) -> int:
        """How many of the last bytes, from ``position`` on, may be the beginning of a magic."""
        for count in range(min(len(MAGIC) - 1, len(self._buffer) - position), 0, -1):
            if self._buffer.endswith(MAGIC[:count]):
                return count
        return 0
