"""What the answers to one request add up to. No I/O; everything from the guest is taken for hostile and bounded.

An exchange says of each message whether it expects it, takes those it expects, and has its result after the last. A
piece out of turn or out of bounds raises ``ProtocolError``, which fails the request and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hva_host.agent.model import ExecResult
from hvaqemu.errors import GuestError, ProtocolError
from hvaqemu.pages import STATE_MASK, PageState, Run
from hvaqemu.protocol import (
    UNKNOWN_U32,
    UNKNOWN_U64,
    ConfirmEnd,
    ConfirmPiece,
    DiscardedKept,
    Ending,
    ExecEnd,
    ExecOutput,
    Message,
    Pong,
    ScanEnd,
    ScanPiece,
    StatsReport,
    Stream,
    unpack_map,
)

T = TypeVar("T")

_CLASSES = np.arange(256, dtype=np.uint8)
#: States of a later version: pages we do not understand are precious.
_CLASSES[max(PageState) < (_CLASSES & STATE_MASK)] = PageState.STABLE


def printable(text: str) -> str:
    """``text`` of a guest without what a terminal would obey: control characters and the like are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclass(frozen=True, eq=False)
class ScanReport:
    """The guest's view of its pages."""

    #: A class-map byte a page (:class:`~hvaqemu.pages.PageState` low, attributes high); pages not reported are STABLE.
    classes: NDArray[np.uint8]
    #: Pages by state, counted here.
    totals: dict[PageState, int]
    memory_total_bytes: int
    memory_free_bytes: int
    memory_available_bytes: int
    #: Seconds the guest spent on it.
    guest_seconds: float
    #: Bytes of page maps as they came over the wire.
    wire_bytes: int


@dataclass(frozen=True)
class GuestStats:
    """The guest's memory as its kernel counts it."""

    memory_total_bytes: int
    memory_free_bytes: int
    memory_available_bytes: int
    uptime_seconds: float
    #: Memory pressure (PSI) "some avg10" and "full avg10", percent; None where the guest does not have it.
    pressure_percent: float | None
    full_pressure_percent: float | None
    #: Pages its kernel read again soon after it had evicted them, since boot; None where it does not say.
    workingset_refaults: int | None


class Exchange(ABC, Generic[T]):
    """One request's answers."""

    @abstractmethod
    def expects(self, message: Message) -> bool:
        """``message``, which carries our request's number, is one that may answer it."""

    @abstractmethod
    def take(self, message: Message) -> T | None:
        """Account for an expected message; the result once complete.

        :raise ProtocolError: it does not fit what came before, or the VM.
        :raise GuestError: it says that the request failed.
        """


class _Pieces:
    """Pieces must come in order, ascend, and lie within the VM; so none counts twice and their number is bounded."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._number = 0
        self._stop = 0
        self.wire_bytes = 0

    def place(self, piece: ScanPiece | ConfirmPiece) -> slice:
        stop = piece.start + piece.pages
        if piece.number != self._number:
            raise ProtocolError(f"the guest sent piece {piece.number} where {self._number} was due")
        if piece.start < self._stop or stop > self._pages:
            raise ProtocolError(
                f"the guest sent pages {piece.start} to {stop} where {self._stop} to {self._pages} are left"
            )
        self._number += 1
        self._stop = stop
        self.wire_bytes += len(piece.data)
        return slice(piece.start, stop)

    def finish(self, pieces: int) -> None:
        if pieces != self._number:
            raise ProtocolError(f"of {pieces} pieces the guest announced {self._number} arrived")


class ScanExchange(Exchange[ScanReport]):
    """SCAN: pieces of a class map for a VM of ``pages`` pages."""

    def __init__(self, pages: int) -> None:
        self._classes = np.full(pages, PageState.STABLE, dtype=np.uint8)
        self._pieces = _Pieces(pages)

    def expects(self, message: Message) -> bool:
        return isinstance(message, (ScanPiece, ScanEnd))

    def take(self, message: Message) -> ScanReport | None:
        if isinstance(message, ScanPiece):
            where = self._pieces.place(message)
            raw = unpack_map(message.data, message.pages)
            self._classes[where] = _CLASSES[np.frombuffer(raw, dtype=np.uint8)]
            return None
        assert isinstance(message, ScanEnd)
        self._pieces.finish(message.pieces)
        counts = np.bincount(self._classes & STATE_MASK, minlength=len(PageState))
        return ScanReport(
            classes=self._classes,
            totals={state: int(counts[state]) for state in PageState},
            memory_total_bytes=message.memory_total,
            memory_free_bytes=message.memory_free,
            memory_available_bytes=message.memory_available,
            guest_seconds=message.microseconds / 1e6,
            wire_bytes=self._pieces.wire_bytes,
        )


class ConfirmExchange(Exchange[NDArray[np.bool_]]):
    """CONFIRM: which of the pages asked for are free in a scan for this epoch and round; answers to any other count for
    nothing.

    :param pages: of the VM.
    :param part: the pages asked for; an agent of an earlier version answers for all.
    """

    def __init__(self, pages: int, epoch: bytes, round: int, part: Run) -> None:
        self._part = part
        self._free = np.zeros(part.pages, dtype=np.bool_)
        self._pieces = _Pieces(pages)
        self._epoch = epoch
        self._round = round

    def expects(self, message: Message) -> bool:
        return (
            isinstance(message, (ConfirmPiece, ConfirmEnd))
            and message.epoch == self._epoch
            and message.round == self._round
        )

    def take(self, message: Message) -> NDArray[np.bool_] | None:
        if isinstance(message, ConfirmPiece):
            where = self._pieces.place(message)
            raw = unpack_map(message.data, -(-message.pages // 8))
            first, stop = max(where.start, self._part.start), min(where.stop, self._part.stop)
            if first < stop:
                free = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=message.pages)
                into = slice(first - self._part.start, stop - self._part.start)
                self._free[into] = free[first - where.start : stop - where.start]
            return None
        assert isinstance(message, ConfirmEnd)
        self._pieces.finish(message.pieces)
        return self._free


def _percent(hundredths: int) -> float | None:
    return None if hundredths == UNKNOWN_U32 else hundredths / 100


class StatsExchange(Exchange[GuestStats]):
    """STATS: one report."""

    def expects(self, message: Message) -> bool:
        return isinstance(message, StatsReport)

    def take(self, message: Message) -> GuestStats:
        assert isinstance(message, StatsReport)
        return GuestStats(
            memory_total_bytes=message.memory_total,
            memory_free_bytes=message.memory_free,
            memory_available_bytes=message.memory_available,
            uptime_seconds=message.uptime_ms / 1000,
            pressure_percent=_percent(message.pressure),
            full_pressure_percent=_percent(message.pressure_full),
            workingset_refaults=None if message.workingset_refaults == UNKNOWN_U64 else message.workingset_refaults,
        )


class ListExchange(Exchange[DiscardedKept]):
    """A part of the list of discarded pages: that it was taken."""

    def expects(self, message: Message) -> bool:
        return isinstance(message, DiscardedKept)

    def take(self, message: Message) -> DiscardedKept:
        assert isinstance(message, DiscardedKept)
        return message


class PingExchange(Exchange[bool]):
    """PING: a sign of life."""

    def expects(self, message: Message) -> bool:
        return isinstance(message, Pong)

    def take(self, message: Message) -> bool:
        return True


class ExecExchange(Exchange[ExecResult]):
    """EXEC: output, of which at most ``limit`` bytes of both streams together are kept, and the command's end."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._room = limit
        self._output: dict[int, bytearray] = {Stream.STDOUT: bytearray(), Stream.STDERR: bytearray()}
        self._truncated = False

    def expects(self, message: Message) -> bool:
        return isinstance(message, ExecEnd) or (isinstance(message, ExecOutput) and message.stream in self._output)

    def take(self, message: Message) -> ExecResult | None:
        if isinstance(message, ExecOutput):
            kept = message.data[: self._room]
            self._room -= len(kept)
            self._truncated |= len(kept) < len(message.data)
            self._output[message.stream] += kept
            return None
        assert isinstance(message, ExecEnd)
        if message.ending == Ending.NOT_STARTED:
            raise GuestError(f"{self._name}: could not be started in the guest: {printable(message.reason)}")
        return ExecResult(
            exit_status=message.value if message.ending == Ending.EXITED else None,
            signal=message.value if message.ending == Ending.SIGNALED else None,
            timed_out=bool(message.timed_out),
            stdout=bytes(self._output[Stream.STDOUT]),
            stderr=bytes(self._output[Stream.STDERR]),
            truncated=self._truncated,
        )
