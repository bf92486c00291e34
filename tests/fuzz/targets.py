"""What is fuzzed: each target takes arbitrary bytes and raises only if something is broken. No atheris in here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hva_guest.agent import QUEUE_BOUND, SCANS_MAX, Agent, Settings
from hva_guest.discarded import DiscardedList
from hva_guest.port import Port
from hvaqemu import protocol
from hvaqemu.errors import ProtocolError
from hvaqemu.framing import HEADER_SIZE, PAYLOAD_MAX, FrameDecoder, encode_frame
from hvaqemu.protocol import Message, MessageType, decode, encode, pack_map, unpack_map
from tests.fuzz.session_driver import KINDS, PAGES, Driver

#: Inputs beyond this show nothing that shorter ones do not.
INPUT_MAX = 4096


class Source:
    """Reads values off an input; zeros once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self) -> bytes:
        """Bytes behind their count, of which a byte stands for up to 4 KiB."""
        count = self.number()
        return self.take(count) if count < 240 else self.take(8) * (1 << (count - 240) >> 3)


def host_messages(data: bytes) -> None:
    """Decoder, messages and maps, as the host reads them."""
    source = Source(data)
    stream = bytearray()
    while source:
        kind = source.number()
        if kind & 1:
            stream += encode_frame(kind >> 1, source.block())
        else:
            stream += source.block()
    decoder = FrameDecoder()
    frames = decoder.feed(bytes(stream))
    assert decoder.buffered <= PAYLOAD_MAX + HEADER_SIZE
    frames += decoder.give_up()
    for frame in frames:
        try:
            message = decode(frame)
        except ProtocolError:
            continue
        if message is None:
            assert frame.type not in set(MessageType)
            continue
        # What was read may be written, and reads the same again.
        (again,) = FrameDecoder().feed(encode(message))
        read = decode(again)
        # Text is shortened where a replacement made it longer.
        assert read == message or any(isinstance(field, str | tuple) for field in message)
        if isinstance(message, protocol.ScanPiece | protocol.ConfirmPiece):
            with suppress(ProtocolError):
                assert len(unpack_map(message.data, message.pages)) == message.pages


def guest_session(data: bytes) -> None:
    """A whole session of the host's, with a guest that says anything, at any time."""
    source = Source(data)
    driver = Driver()
    while source:
        _SESSION_STEPS[source.number() % len(_SESSION_STEPS)](driver, source)
    driver.end()


def _noise(driver: Driver, source: Source) -> None:
    driver.feed(source.block())


def _frame(driver: Driver, source: Source) -> None:
    driver.feed(encode_frame(source.number(), source.block()))


def _hello(driver: Driver, source: Source) -> None:
    """The agent greets: as it should, or another one, or with something we can not take."""
    ranges = tuple((source.number(), source.number()) for _ in range(source.number() % 3))
    size = 4096 if source.number() else 65536
    nonce = (driver.nonce, 0, 77)[source.number() % 3]
    instance = source.number() % 4
    text = source.take(source.number() % 9).decode(errors="replace")
    poison, debug, alloc, free = (source.number() % 4 for _ in range(4))
    features = source.number()
    names, checks = (text, text), (poison, debug, alloc, free)
    driver.feed(encode(protocol.Hello(nonce, features, instance, bytes(16), size, ranges, *names, *checks, (text,))))


def _good_hello(driver: Driver, _source: Source) -> None:
    ranges = ((0, PAGES),)
    driver.feed(encode(protocol.Hello(driver.nonce, 7, 1, bytes(16), 4096, ranges, "", "", 1, 1, 1, 1, ())))


def _ask(driver: Driver, source: Source) -> None:
    kind = KINDS[source.number() % len(KINDS)]
    driver.ask(kind, bytes([source.number() % 4] * 16), source.number() % 4)


def _stop_waiting(driver: Driver, source: Source) -> None:
    driver.close(source.number())


def _time(driver: Driver, source: Source) -> None:
    driver.pass_time(source.number() / 4)


def _reconnect(driver: Driver, _source: Source) -> None:
    driver.connect()


def _give_up(driver: Driver, _source: Source) -> None:
    driver.give_up()


def _nearly(driver: Driver, source: Source) -> None:
    """An answer to a question that was asked, or nearly: each field may be another's."""
    asked = driver.asked[source.number() % len(driver.asked)] if driver.asked else None
    number = (asked.number if asked else 0) + (0, 1, -1, 0)[source.number() % 4]
    key = (
        max(0, number),
        bytes([source.number() % 4] * 16) if source.number() & 1 or asked is None else asked.epoch,
        source.number() if source.number() & 1 or asked is None else asked.round,
    )
    piece, start, pages = source.number(), source.number(), source.number() + 1
    raw = source.take(source.number() % 16)
    fit = source.number()
    text = source.take(8).decode(errors="replace")
    made: tuple[Callable[[], Message], ...] = (
        lambda: protocol.ScanPiece(key[0], piece, start, pages, pack_map(_fitted(raw, pages, fit))),
        lambda: protocol.ScanEnd(key[0], piece, *[fit << 56] * 8),
        lambda: protocol.ConfirmPiece(*key, piece, start, pages, pack_map(_fitted(raw, -(-pages // 8), fit))),
        lambda: protocol.ConfirmEnd(*key, piece, fit),
        lambda: protocol.StatsReport(key[0], fit, fit, fit, fit, 0xFFFFFFFF),
        lambda: protocol.Pong(key[0]),
        lambda: protocol.Error(key[0], piece % 8, text),
        lambda: protocol.ExecOutput(key[0], piece % 4, raw * 40),
        lambda: protocol.ExecEnd(key[0], piece % 4, fit << 24, fit & 1, text),
    )
    driver.feed(encode(made[source.number() % len(made)]()))


def _fitted(raw: bytes, size: int, fit: int) -> bytes:
    """``size`` bytes made of ``raw``, or one more or less."""
    return ((raw or b"\1") * size)[: max(0, size + (fit % 8 == 1) - (fit % 8 == 2))]


_SESSION_STEPS: tuple[Callable[[Driver, Source], None], ...] = (
    *(_good_hello, _ask, _ask, _nearly, _nearly, _nearly, _hello, _noise, _frame),
    *(_stop_waiting, _time, _reconnect, _give_up),
)


class _NoCommands:
    """In the place of what would run commands of an input's choosing on this machine."""

    def start(self, request: protocol.Exec) -> None:
        assert all(isinstance(argument, bytes) for argument in request.argv)

    def cancel(self, request: int) -> None:
        pass

    def end_all(self) -> None:
        pass

    def tick(self) -> None:
        pass

    def pause(self, paused: bool) -> None:
        pass


class _Guest:
    """A guest agent whose port leads to a pipe."""

    def __init__(self, folder: Path) -> None:
        (folder / "kpageflags").write_bytes(bytes(range(256)) * 64)
        (folder / "iomem").write_text("00000000-001fffff : System RAM\n")
        os.mkfifo(folder / "port")
        settings = Settings("", "", False, str(folder / "kpageflags"), str(folder / "iomem"))
        self.agent = Agent(settings, lambda _text: None)
        self.agent._offered |= protocol.Feature.EXEC
        self.agent._discarded = DiscardedList(str(folder / "hva"))
        self.agent._commands = _NoCommands()  # type: ignore[assignment]
        self.port = Port(str(folder / "port"))
        self.agent._port = self.port
        self._host_end = os.open(folder / "port", os.O_RDWR | os.O_NONBLOCK)
        self._heard = FrameDecoder()

    def read(self) -> list[Message]:
        """What the agent has said; every byte of it belongs to an intact frame with a message in it."""
        found: list[Message] = []
        self.port.flush()
        with suppress(BlockingIOError):
            while data := os.read(self._host_end, 1 << 16):
                for frame in self._heard.feed(data):
                    message = decode(frame)
                    assert message is not None
                    found.append(message)
                self.port.flush()
        assert self._heard.dropped_bytes == self._heard.corrupt_frames == 0
        return found

    def begin(self) -> None:
        """As after the port was opened."""
        self.agent._end_session()
        self.read()
        self.port.reset()
        self.port.flush()
        assert self._heard.buffered == 0


_folder = tempfile.TemporaryDirectory(prefix="hva-fuzz")
_guests: list[_Guest] = []


def guest_agent(data: bytes) -> None:
    """The guest agent's reading of what a host says."""
    if not _guests:
        _guests.append(_Guest(Path(_folder.name)))
    guest = _guests[0]
    guest.begin()
    agent, port = guest.agent, guest.port
    source, decoder = Source(data), FrameDecoder()
    while source:
        step = source.number()
        if step < 32:
            agent._advance(port)
        elif step < 48:
            port.flush()
        elif step < 64:
            guest.read()
        elif step < 80:
            agent._take(decoder.feed(encode(protocol.Attach(1 + step % 3, 31)) + encode(protocol.Ack(step % 32))))
        elif step < 96:
            agent._take(decoder.feed(source.block()))
        else:
            agent._take(decoder.feed(encode_frame(_FROM_HOST[step % len(_FROM_HOST)], source.block())))
        assert len(agent._scans) <= SCANS_MAX
        # Only what a host asks for is queued, and asking costs it more than a fixed part of that.
        assert port.queued <= QUEUE_BOUND + (1 << 18) * (1 + len(data))
    agent._end_session()
    guest.read()


_FROM_HOST = tuple(
    getattr(MessageType, name)
    for name in (
        *("ATTACH", "ACK", "PING", "SCAN", "CONFIRM", "STATS", "EXEC", "EXEC_CANCEL", "HELLO", "SCAN_PIECE"),
        *("DISCARDED_PIECE", "DISCARDED_END"),
    )
)

TARGETS: dict[str, Callable[[bytes], None]] = {
    "host_messages": host_messages,
    "guest_session": guest_session,
    "guest_agent": guest_agent,
}
