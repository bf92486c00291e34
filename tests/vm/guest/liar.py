"""Takes the guest agent's place on its port and lies: ``liar.py WAY``. Ends, and lets the agent back, once told to run
a command (any one).

``unused``  answers scans and confirmations: every page is free.
``flood``   writes as fast as the port takes it, once attached.
``spin``    answers nothing, and keeps the processor as busy as that would.
"""

import contextlib
import os
import select
import signal
import sys

sys.path.insert(0, "/usr/lib/hva/agent.pyz")

from board import go_on_alone

from hva_guest.memory import memory_ranges
from hva_guest.port import find_port
from hvaqemu import protocol
from hvaqemu.framing import FrameDecoder
from hvaqemu.protocol import decode, encode, pack_map

PIECE = 1 << 15


def take_port(agent):
    """Open the port as soon as the agent that is killed lets go of it; its successor finds it taken."""
    path = find_port(protocol.PORT_NAME)
    os.kill(agent, signal.SIGKILL)
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_NONBLOCK)
        except OSError:
            continue


def hello(nonce, ranges):
    return encode(protocol.Hello(nonce, 7, os.getpid(), bytes(16), 4096, ranges, "liar", "0", 1, 1, 1, 1, ()))


def pieces(ranges):
    number = 0
    for start, count in ranges:
        for at in range(start, start + count, PIECE):
            yield number, at, min(PIECE, start + count - at)
            number += 1


def everything_unused(message, ranges):
    said = list(pieces(ranges))
    if isinstance(message, protocol.Scan):
        for number, start, count in said:
            yield protocol.ScanPiece(message.request, number, start, count, pack_map(b"\1" * count))
        yield protocol.ScanEnd(message.request, len(said), *[0] * 8)
    elif isinstance(message, protocol.Confirm):
        key = (message.request, message.epoch, message.round)
        for number, start, count in said:
            bits = b"\xff" * (count // 8) + bytes([0xFF00 >> count % 8 & 0xFF] if count % 8 else [])
            yield protocol.ConfirmPiece(*key, number, start, count, pack_map(bits))
        yield protocol.ConfirmEnd(*key, len(said), 0)
    elif isinstance(message, protocol.Ping):
        yield protocol.Pong(message.request)
    elif isinstance(message, protocol.Stats):
        yield protocol.StatsReport(message.request, 0, 0, 0, 0, 0)


class Liar:
    def __init__(self, way, port):
        self.way = way
        self.port = port
        self.ranges = memory_ranges("/proc/iomem")
        self.decoder = FrameDecoder()
        self.queue = hello(0, self.ranges)
        self.attached = False
        kinds = (protocol.ExecOutput(1, 1, bytes(32768)), protocol.Pong(0), protocol.Error(3, 3, "x" * 99))
        self.noise = b"".join(encode(kind) for kind in kinds) * 8

    def serve(self):
        while True:
            flooding = self.attached and self.way == "flood"
            if flooding and not self.queue:
                self.queue = self.noise
            wait = 0.0 if flooding or (self.attached and self.way == "spin") else None
            readable, _, _ = select.select([self.port], [self.port] if self.queue else [], [], wait)
            if readable and self.told_to_end():
                return
            if self.queue:
                with contextlib.suppress(BlockingIOError):
                    self.queue = self.queue[os.write(self.port, self.queue) :]

    def told_to_end(self):
        try:
            data = os.read(self.port, 65536)
        except BlockingIOError:
            return False
        for frame in self.decoder.feed(data):
            message = decode(frame)
            if isinstance(message, protocol.Exec):
                return True
            if isinstance(message, protocol.Attach):
                self.queue += hello(message.nonce, self.ranges)
            elif isinstance(message, protocol.Ack):
                self.attached = True
            elif self.way == "unused":
                self.queue += b"".join(encode(said) for said in everything_unused(message, self.ranges))
        return False


def main(way):
    agent = os.getppid()
    go_on_alone()
    Liar(way, take_port(agent)).serve()


if __name__ == "__main__":
    main(sys.argv[1])
