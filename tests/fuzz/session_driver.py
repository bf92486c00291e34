"""A guest session under test: fed frame by frame, and looked at after each for what must never happen."""

from __future__ import annotations

import asyncio
from typing import Any

from hva_host.agent.guest_exchange import (
    ConfirmExchange,
    Exchange,
    ExecExchange,
    PingExchange,
    ScanExchange,
    StatsExchange,
)
from hva_host.agent.guest_requests import REQUESTS_MAX
from hva_host.agent.guest_session import GuestSession, LinkState
from hvaqemu import protocol
from hvaqemu.errors import HvaError, ProtocolError, RefusedError
from hvaqemu.framing import HEADER_SIZE, PAYLOAD_MAX, Frame, FrameDecoder
from hvaqemu.pages import Run
from hvaqemu.protocol import Message, decode

PAGES = 96
#: What confirms ask for.
PART = Run(32, 48)
OUTPUT_LIMIT = 300
_LAST = {
    "scan": protocol.ScanEnd,
    "confirm": protocol.ConfirmEnd,
    "stats": protocol.StatsReport,
    "ping": protocol.Pong,
    "exec": protocol.ExecEnd,
}
KINDS = tuple(_LAST)
#: Exist to hold results; nothing runs in it.
_loop = asyncio.new_event_loop()


class Asked:
    """A request under way: what was asked, in which session."""

    def __init__(self, kind: str, epoch: bytes, round: int, agent: tuple[int, bytes]) -> None:
        self.kind = kind
        self.epoch = epoch
        self.round = round
        self.agent = agent
        self.answer: asyncio.Future[Any] = asyncio.Future(loop=_loop)
        self.number = 0

    def exchange(self) -> Exchange[Any]:
        if self.kind == "scan":
            return ScanExchange(PAGES)
        if self.kind == "confirm":
            return ConfirmExchange(PAGES, self.epoch, self.round, PART)
        if self.kind == "stats":
            return StatsExchange()
        return PingExchange() if self.kind == "ping" else ExecExchange("x", OUTPUT_LIMIT)

    def ended_by(self, message: Message | None) -> bool:
        """``message`` is one that may be the last of the answers to this."""
        if type(message) is not _LAST[self.kind] or getattr(message, "request", None) != self.number:
            return False
        return not isinstance(message, protocol.ConfirmEnd) or (message.epoch, message.round) == (
            self.epoch,
            self.round,
        )


class Driver:
    """A session, its decoder and a clock, in the hands of a test. Every method raises ``AssertionError`` on a never."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.told: list[Message] = []
        self.states: list[LinkState] = []
        self.session = GuestSession(PAGES, self.told.append, self.states.append)
        self.decoder = FrameDecoder()
        self.asked: list[Asked] = []
        self.nonce = 0
        self.session.connecting("begin")
        self.connect()

    def connect(self) -> None:
        """A new connection."""
        self.session.connecting("broken")
        self._all_failed()
        self.decoder = FrameDecoder()
        self.session.connected(self.now)
        self._consider()

    def ask(self, kind: str, epoch: bytes = bytes(16), round: int = 1) -> Asked | None:
        """Ask the guest something; None where that is not possible now."""
        hello = self.session.hello
        if self.session.state is not LinkState.ATTACHED or hello is None:
            return None
        asked = Asked(kind, epoch, round, (hello.instance, hello.boot_id))
        try:
            asked.number = self.session.requests.open(asked.exchange(), asked.answer)
        except RefusedError:
            assert len(self.asked) == REQUESTS_MAX
            return None
        self.asked.append(asked)
        return asked

    def close(self, which: int) -> None:
        """Whoever asked waits no more."""
        if self.asked:
            self.session.requests.close(self.asked.pop(which % len(self.asked)).number)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.session.tick(self.now)
        self._consider()

    def feed(self, data: bytes) -> None:
        """Bytes from the guest."""
        for frame in self.decoder.feed(data):
            self.take(frame)
        assert self.decoder.buffered <= PAYLOAD_MAX + HEADER_SIZE

    def give_up(self) -> None:
        """Nothing came for a while."""
        for frame in self.decoder.give_up():
            self.take(frame)

    def take(self, frame: Frame) -> None:
        """A frame from the guest."""
        before = {asked.number for asked in self.asked if not asked.answer.done()}
        told = len(self.told)
        self.session.take(frame, self.now)
        assert len(self.told) - told <= 1, "one frame makes us write one message at most"
        try:
            message = decode(frame)
        except ProtocolError:
            message = None
        for asked in self.asked:
            if asked.number in before and asked.answer.done():
                self._ended(asked, message)
        if isinstance(message, protocol.Hello):
            agent = (message.instance, message.boot_id)
            for asked in self.asked:
                assert asked.answer.done() or (message.nonce == self.nonce and asked.agent == agent)
        self._consider()

    def end(self) -> None:
        """Close the link."""
        self.session.closed()
        self._all_failed()
        while self.asked:
            self.close(0)
        assert len(self.session.requests) == 0

    def _ended(self, asked: Asked, message: Message | None) -> None:
        error = asked.answer.exception()
        if error is not None:
            assert isinstance(error, HvaError)
            assert str(error).isprintable(), "a guest's text is never raw"
            return
        assert asked.ended_by(message), f"{asked.kind} {asked.number} was ended by {message}"
        result = asked.answer.result()
        if asked.kind == "scan":
            assert sum(result.totals.values()) == PAGES == len(result.classes)
        elif asked.kind == "confirm":
            assert result.shape == (PART.pages,)
        elif asked.kind == "exec":
            assert len(result.stdout) + len(result.stderr) <= OUTPUT_LIMIT

    def _all_failed(self) -> None:
        assert all(asked.answer.done() for asked in self.asked)

    def _consider(self) -> None:
        session = self.session
        for message in self.told:
            assert isinstance(message, protocol.Attach | protocol.Ack | protocol.Ping)
            if isinstance(message, protocol.Attach):
                assert message.nonce
                self.nonce = message.nonce
        self.told.clear()
        self.states.clear()
        assert (session.hello is not None) == (session.state in (LinkState.ATTACHED, LinkState.SILENT))
        assert bool(session.refused) == (session.state is LinkState.REFUSED)
        assert len(session.requests) == len(self.asked) <= REQUESTS_MAX
        if session.hello is None:
            self._all_failed()
