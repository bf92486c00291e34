"""A guest that lies, in QEMU's place: ``python -m tests.liars.guest WAY SOCKET`` listens there and speaks that way.

It writes as fast as the host agent reads, from a process of its own. ``honest`` answers what it is asked.
"""

from __future__ import annotations

import itertools
import random
import select
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

from hvaqemu import protocol
from hvaqemu.framing import MAGIC, PAYLOAD_MAX, FrameDecoder, encode_frame
from hvaqemu.protocol import Message, MessageType, decode, encode, pack_map

PAGES = 1 << 17
_CHUNK = 1 << 20
_PIECE = 1 << 15
_OPTIONS = (1, 1, 1, 1, ())
#: One byte a page, all UNUSED; one bit a page, all set; and a random map, made once.
_UNUSED, _FREE = pack_map(b"\1" * _PIECE), pack_map(b"\xff" * (_PIECE // 8))
_RANDOM = pack_map(random.Random(1).randbytes(_PIECE))


def hello(nonce: int, instance: int = 1) -> bytes:
    ranges = ((0, PAGES),)
    return encode(protocol.Hello(nonce, 7, instance, bytes(16), 4096, ranges, "6.1", "0.1", *_OPTIONS))


def largest_hello(nonce: int, instance: int) -> bytes:
    """Every field as long as it may be."""
    ranges = tuple((number, 1) for number in range(protocol.RANGES_MAX))
    text = "x" * protocol.TEXT_MAX
    names = (text,) * protocol.CONFIG_NAMES_MAX
    return encode(protocol.Hello(nonce, 7, instance, bytes(16), 4096, ranges, text, text, 1, 1, 1, 1, names))


def header(length: int) -> bytes:
    """A sound header whose payload never comes."""
    covered = MAGIC + bytes([1, 1, 0, 0]) + length.to_bytes(4, "big") + bytes(4)
    return covered + zlib.crc32(covered).to_bytes(4, "big")


class Line:
    """The connection to the host agent."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._decoder = FrameDecoder()
        #: The nonce of the newest ATTACH.
        self.nonce = 0

    def write(self, data: bytes) -> None:
        self._socket.sendall(data)

    def heard(self, wait: float | None = 0.0) -> list[Message]:
        """Requests that have come within ``wait`` seconds; an ATTACH is answered at once.

        :raise ConnectionError: the host agent has hung up.
        """
        found: list[Message] = []
        while select.select([self._socket], [], [], 0.0 if found else wait)[0]:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            for frame in self._decoder.feed(data):
                message = decode(frame)
                if isinstance(message, protocol.Attach):
                    self.nonce = message.nonce
                    self.write(hello(message.nonce))
                elif message is not None and not isinstance(message, protocol.Ack):
                    found.append(message)
            if not found:
                break
        return found


def answers(message: Message, classes: bytes = _UNUSED, free: bytes = _FREE) -> Iterator[bytes]:
    """What an agent says to a request."""
    pieces = PAGES // _PIECE
    if isinstance(message, protocol.Ping):
        yield encode(protocol.Pong(message.request))
    elif isinstance(message, protocol.Stats):
        yield encode(protocol.StatsReport(message.request, 1, 1, 1, 1, 1))
    elif isinstance(message, protocol.Scan):
        for number in range(pieces):
            yield encode(protocol.ScanPiece(message.request, number, number * _PIECE, _PIECE, classes))
        yield encode(protocol.ScanEnd(message.request, pieces, *[1] * 8))
    elif isinstance(message, protocol.Confirm):
        key = (message.request, message.epoch, message.round)
        for number in range(pieces):
            yield encode(protocol.ConfirmPiece(*key, number, number * _PIECE, _PIECE, free))
        yield encode(protocol.ConfirmEnd(*key, pieces, 1))


def honest(line: Line) -> None:
    while True:
        for message in line.heard(None):
            line.write(b"".join(answers(message)))


def random_maps(line: Line) -> None:
    """Maps of any bytes, for scans and confirmations alike."""
    while True:
        for message in line.heard(None):
            line.write(b"".join(answers(message, _RANDOM, pack_map(random.randbytes(_PIECE // 8)))))


def tiny_pieces(line: Line) -> None:
    """Scans in pieces of one page, each a request's worth of work for a byte."""
    one = pack_map(b"\1")
    while True:
        for message in line.heard(None):
            if isinstance(message, protocol.Scan):
                for number in range(PAGES):
                    line.write(encode(protocol.ScanPiece(message.request, number, number, 1, one)))
                    if not number % 1024:
                        line.heard()
            else:
                line.write(b"".join(answers(message)))


def _flood(line: Line, data: bytes) -> None:
    """The same bytes for ever; who attaches is greeted."""
    data *= max(1, _CHUNK // len(data))
    line.heard(1.0)
    while True:
        line.write(data)
        line.heard()


def never_asked(line: Line) -> None:
    """Answers to questions nobody asked: other requests, epochs and rounds."""
    made = [
        *answers(protocol.Scan(1)),
        *answers(protocol.Confirm(2, bytes(16), 1)),
        *answers(protocol.Stats(3)),
        encode(protocol.ExecEnd(4, 0, 0, 0, "")),
    ]
    _flood(line, b"".join(made))


def restarts(line: Line) -> None:
    """Agents that come and go as fast as they can be greeted, each another one, with all it can say of itself."""
    for instance in itertools.count():
        line.write(largest_hello(line.nonce, instance) + largest_hello(instance + 1, instance))
        line.heard()


def trickle(line: Line) -> None:
    """A byte at a time, without a pause."""
    frame = encode_frame(MessageType.SCAN_PIECE, bytes(100_000))
    line.heard(1.0)
    while True:
        for at in range(len(frame)):
            line.write(frame[at : at + 1])
        line.heard()


def half_frames(line: Line) -> None:
    """A frame begun, then a byte a second."""
    line.heard(1.0)
    line.write(header(PAYLOAD_MAX))
    while True:
        line.write(b"x")
        line.heard()
        time.sleep(1.0)


def deaf(line: Line) -> None:
    """Reads nothing any more."""
    line.heard(1.0)
    while True:
        line.write(encode(protocol.Pong(0)))
        time.sleep(0.1)


def hangs_up(line: Line) -> None:
    """Ends each connection at once."""
    line.heard(1.0)


_NOISE = random.Random(2).randbytes(_CHUNK)
WAYS: dict[str, Callable[[Line], None]] = {
    "honest": honest,
    "random maps": random_maps,
    "tiny pieces": tiny_pieces,
    "never asked": never_asked,
    "signs of life": lambda line: _flood(line, encode(protocol.Pong(0))),
    "errors": lambda line: _flood(line, encode(protocol.Error(5, 5, "x" * 256))),
    "drops sessions": lambda line: _flood(line, encode(protocol.Error(0, 1, ""))),
    "restarts": restarts,
    "output": lambda line: _flood(line, encode(protocol.ExecOutput(7, 1, bytes(32768)))),
    "largest frames": lambda line: _flood(line, encode_frame(0x77, bytes(PAYLOAD_MAX))),
    "malformed": lambda line: _flood(line, encode_frame(MessageType.HELLO, b"\xff" * 40)),
    "noise": lambda line: _flood(line, _NOISE),
    "magics": lambda line: _flood(line, MAGIC),
    "nested headers": lambda line: _flood(line, header(PAYLOAD_MAX)),
    "trickle": trickle,
    "half frames": half_frames,
    "deaf": deaf,
    "hangs up": hangs_up,
}


def main(way: str, path: str) -> None:
    """Serve one host agent after another."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("listening", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):
                WAYS[way](Line(connection))


if __name__ == "__main__":
    main(*sys.argv[1:])
