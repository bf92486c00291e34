"""What host and guest agent say to each other: the messages, their layout and their bounds.

Standard library only, Python >= 3.9, no I/O. A message is a named tuple; ``_LAYOUT`` holds the field codecs of each.
All integers are big endian. Fields a later minor change adds go behind the known ones: what follows them is ignored.
``docs/protocol.md`` describes the wire for people.
"""

from __future__ import annotations

import enum
import zlib
from typing import Any, NamedTuple, Union

from hvaqemu.errors import ProtocolError
from hvaqemu.framing import Frame, encode_frame
from hvaqemu.wire import U8, U16, U32, U64, Bytes, Later, List, Pair, Sixteen, Text

PORT_NAME = "org.hvaqemu.agent.0"

#: Pages one piece of a map may cover.
PIECE_PAGES_MAX = 128 * 1024
#: Bytes of a compressed map; zlib adds a few bytes to what it cannot compress.
MAP_BYTES_MAX = PIECE_PAGES_MAX + 1024
RANGES_MAX = 64
TEXT_MAX = 256
CONFIG_NAMES_MAX = 32
ARGUMENTS_MAX = 256
#: Linux takes no single argument beyond 128 KiB (MAX_ARG_STRLEN).
ARGUMENT_BYTES_MAX = 128 * 1024 - 1
STDIN_BYTES_MAX = 64 * 1024
OUTPUT_BYTES_MAX = 32 * 1024
#: "Not known" in fields of hundredths and the like.
UNKNOWN_U32 = 0xFFFFFFFF
UNKNOWN_U64 = 0xFFFFFFFFFFFFFFFF


class MessageType(enum.IntEnum):
    """Numbers on the wire."""

    ATTACH = 0x01
    HELLO = 0x02
    ACK = 0x03
    PING = 0x04
    PONG = 0x05
    ERROR = 0x06
    SCAN = 0x10
    SCAN_PIECE = 0x11
    SCAN_END = 0x12
    CONFIRM = 0x18
    CONFIRM_PIECE = 0x19
    CONFIRM_END = 0x1A
    DISCARDED_PIECE = 0x20
    DISCARDED_END = 0x21
    DISCARDED_KEPT = 0x22
    STATS = 0x30
    STATS_REPORT = 0x31
    EXEC = 0x40
    EXEC_OUTPUT = 0x41
    EXEC_END = 0x42
    EXEC_CANCEL = 0x43


class Feature(enum.IntFlag):
    """The guest offers, the host acknowledges a subset; only what was acknowledged is used."""

    NONE = 0
    #: The guest runs commands.
    EXEC = 1 << 0
    #: Clean swap-cache pages are reported VOLATILE with the SWAPCACHE attribute; else they are STABLE.
    SWAPCACHE = 1 << 1
    #: STATS_REPORT carries memory pressure (PSI).
    PRESSURE = 1 << 2
    #: Clean file pages that a process has mapped shared and writable are reported POTENTIAL; else they are VOLATILE.
    POTENTIAL = 1 << 3
    #: The guest keeps the list of pages the host has taken.
    DISCARDED = 1 << 4


class ErrorCode(enum.IntEnum):
    """Why a request was not carried out."""

    NOT_ATTACHED = 1
    NOT_ALLOWED = 2
    BUSY = 3
    UNAVAILABLE = 4
    BAD_REQUEST = 5


class Fact(enum.IntEnum):
    """What the guest knows of one of its kernel's options."""

    UNKNOWN = 0
    OFF = 1
    ON = 2


class Stream(enum.IntEnum):
    """Where a command's output came from."""

    STDOUT = 1
    STDERR = 2


class Ending(enum.IntEnum):
    """How a command ended; says what ``ExecEnd.value`` is."""

    EXITED = 0
    SIGNALED = 1
    NOT_STARTED = 2


class Attach(NamedTuple):
    """Host: a session begins. The guest forgets the session before, ends its commands and answers HELLO."""

    nonce: int
    features: int


class Hello(NamedTuple):
    """Guest: who I am; with nonce 0 when sent unasked, because the agent has just opened its port."""

    nonce: int
    features: int
    #: Random for each start of the agent.
    instance: int
    boot_id: bytes
    #: Bytes.
    page_size: int
    #: (start pfn, pages), ascending, disjoint.
    ranges: tuple[tuple[int, int], ...]
    kernel: str
    agent_version: str
    page_poison: int
    debug_pagealloc: int
    init_on_alloc: int
    init_on_free: int
    #: Kernel configuration names that are set, of those that bear on free pages.
    config: tuple[str, ...]

    @property
    def exec_allowed(self) -> bool:
        return bool(self.features & Feature.EXEC)

    @property
    def checks_free_pages(self) -> bool:
        """The guest's kernel may look at the content of free pages: its UNUSED pages must not be discarded.

        page_poison is off unless the command line says otherwise, so not knowing means an unreadable command line.
        debug_pagealloc is unknown wherever the kernel's configuration is not at hand, and no distribution sets it.
        """
        return self.page_poison != Fact.OFF or self.debug_pagealloc == Fact.ON


class Ack(NamedTuple):
    """Host: of what you offered I use this. Requests may follow."""

    features: int


class Ping(NamedTuple):
    request: int


class Pong(NamedTuple):
    request: int


class Error(NamedTuple):
    """Guest: request ``request`` (0: none in particular) will not be answered."""

    request: int
    code: int
    text: str


class Scan(NamedTuple):
    """Host: report the state of every page."""

    request: int


class ScanPiece(NamedTuple):
    """Guest: one byte a page (``PageState`` low, ``PageAttribute`` high) for ``pages`` pages from pfn ``start``."""

    request: int
    #: 0, 1, 2, … within the answer.
    number: int
    start: int
    pages: int
    #: Compressed, see :func:`unpack_map`.
    data: bytes


class ScanEnd(NamedTuple):
    """Guest: the answer is complete. Pages by state; microseconds the scan took; memory in bytes."""

    request: int
    pieces: int
    stable: int
    unused: int
    volatile: int
    potential: int
    microseconds: int
    memory_total: int
    memory_free: int
    memory_available: int


class Confirm(NamedTuple):
    """Host: which pages are free in a scan begun after this request was read?"""

    request: int
    epoch: bytes
    round: int
    #: The pages asked for: ``pages`` of them from pfn ``start`` on; 0 means all there are.
    start: int = 0
    pages: int = 0


class ConfirmPiece(NamedTuple):
    """Guest: a bitmap, first page in the highest bit of the first byte; 1 is free."""

    request: int
    epoch: bytes
    round: int
    number: int
    start: int
    pages: int
    #: Compressed, see :func:`unpack_map`.
    data: bytes


class ConfirmEnd(NamedTuple):
    """Guest: the answer is complete."""

    request: int
    epoch: bytes
    round: int
    pieces: int
    microseconds: int


class DiscardedPiece(NamedTuple):
    """Host: where ``pages`` pages from pfn ``start`` are, a byte a page (:class:`hvaqemu.pages.Residence`).

    Piece 0 begins a list. Each piece is a request, answered before the next is sent.
    """

    request: int
    #: Random; the same in all pieces of a list.
    list: int
    number: int
    start: int
    pages: int
    #: Compressed, see :func:`unpack_map`.
    data: bytes


class DiscardedEnd(NamedTuple):
    """Host: that was all. Pages by residence; pages discarded, and brought back by refaults, since the VM started."""

    request: int
    list: int
    pieces: int
    zero: int
    layer: int
    preserved: int
    discarded: int
    refaulted: int


class DiscardedKept(NamedTuple):
    """Guest: taken; ``runs`` are listed so far."""

    request: int
    runs: int


class Stats(NamedTuple):
    """Host: how is your memory?"""

    request: int


class StatsReport(NamedTuple):
    """Guest: bytes, milliseconds since boot, memory pressure "some avg10" and "full avg10" in hundredths of a percent,
    and pages its kernel read again soon after it had evicted them, since boot."""

    request: int
    memory_total: int
    memory_free: int
    memory_available: int
    uptime_ms: int
    pressure: int
    pressure_full: int = UNKNOWN_U32
    workingset_refaults: int = UNKNOWN_U64


class Exec(NamedTuple):
    """Host: run a command, at most ``timeout_ms`` (0: for ever)."""

    request: int
    argv: tuple[bytes, ...]
    timeout_ms: int
    stdin: bytes


class ExecOutput(NamedTuple):
    request: int
    stream: int
    data: bytes


class ExecEnd(NamedTuple):
    """Guest: the command's exit status or signal in ``value``; ``reason`` where it could not be started."""

    request: int
    ending: int
    value: int
    timed_out: int
    reason: str


class ExecCancel(NamedTuple):
    """Host: kill the command; its EXEC_END still comes."""

    request: int


Message = Union[
    Attach, Hello, Ack, Ping, Pong, Error, Scan, ScanPiece, ScanEnd, Confirm, ConfirmPiece, ConfirmEnd,
    DiscardedPiece, DiscardedEnd, DiscardedKept, Stats, StatsReport, Exec, ExecOutput, ExecEnd, ExecCancel,
]  # fmt: skip


_TEXT, _ID, _MAP = Text(TEXT_MAX), Sixteen(), Bytes(MAP_BYTES_MAX)
_RANGES = List(Pair(), RANGES_MAX)

_LAYOUT: dict[Any, tuple[MessageType, tuple[Any, ...]]] = {
    Attach: (MessageType.ATTACH, (U64, U32)),
    Hello: (
        MessageType.HELLO,
        (U64, U32, U64, _ID, U32, _RANGES, _TEXT, _TEXT, U8, U8, U8, U8, List(_TEXT, CONFIG_NAMES_MAX)),
    ),
    Ack: (MessageType.ACK, (U32,)),
    Ping: (MessageType.PING, (U64,)),
    Pong: (MessageType.PONG, (U64,)),
    Error: (MessageType.ERROR, (U64, U16, _TEXT)),
    Scan: (MessageType.SCAN, (U64,)),
    ScanPiece: (MessageType.SCAN_PIECE, (U64, U32, U64, U32, _MAP)),
    ScanEnd: (MessageType.SCAN_END, (U64, U32, U64, U64, U64, U64, U64, U64, U64, U64)),
    Confirm: (MessageType.CONFIRM, (U64, _ID, U8, Later(U64, 0), Later(U64, 0))),
    ConfirmPiece: (MessageType.CONFIRM_PIECE, (U64, _ID, U8, U32, U64, U32, _MAP)),
    ConfirmEnd: (MessageType.CONFIRM_END, (U64, _ID, U8, U32, U64)),
    DiscardedPiece: (MessageType.DISCARDED_PIECE, (U64, U64, U32, U64, U32, _MAP)),
    DiscardedEnd: (MessageType.DISCARDED_END, (U64, U64, U32, U64, U64, U64, U64, U64)),
    DiscardedKept: (MessageType.DISCARDED_KEPT, (U64, U32)),
    Stats: (MessageType.STATS, (U64,)),
    StatsReport: (
        MessageType.STATS_REPORT,
        (U64, U64, U64, U64, U64, U32, Later(U32, UNKNOWN_U32), Later(U64, UNKNOWN_U64)),
    ),
    Exec: (MessageType.EXEC, (U64, List(Bytes(ARGUMENT_BYTES_MAX), ARGUMENTS_MAX), U32, Bytes(STDIN_BYTES_MAX))),
    ExecOutput: (MessageType.EXEC_OUTPUT, (U64, U8, Bytes(OUTPUT_BYTES_MAX))),
    ExecEnd: (MessageType.EXEC_END, (U64, U8, U32, U8, _TEXT)),
    ExecCancel: (MessageType.EXEC_CANCEL, (U64,)),
}
_BY_TYPE = {int(kind): (cls, codecs) for cls, (kind, codecs) in _LAYOUT.items()}


def encode(message: Message) -> bytes:
    """The frame that carries ``message``.

    :raise ValueError: a field is beyond its bound, or all together beyond ``PAYLOAD_MAX``.
    """
    kind, codecs = _LAYOUT[type(message)]
    return encode_frame(kind, b"".join([codec.pack(value) for codec, value in zip(codecs, message)]))


def decode(frame: Frame) -> Message | None:
    """The message in ``frame``; None for a type this version does not know, which is to be ignored.

    :raise ProtocolError: the payload is not what its type says.
    """
    if frame.type not in _BY_TYPE:
        return None
    cls, codecs = _BY_TYPE[frame.type]
    values, offset = [], 0
    for codec in codecs:
        value, offset = codec.unpack(frame.payload, offset)
        values.append(value)
    message: Message = cls(*values)
    if isinstance(message, (ScanPiece, ConfirmPiece, DiscardedPiece)) and not 0 < message.pages <= PIECE_PAGES_MAX:
        raise ProtocolError(f"a piece claims {message.pages} pages")
    return message


def pack_map(raw: bytes) -> bytes:
    """A piece's map, compressed for the wire. Level 1: nearly as small as 9 here, at a fraction of the time."""
    return zlib.compress(raw, 1)


def unpack_map(data: bytes, size: int) -> bytes:
    """The ``size`` bytes a piece's ``data`` stands for; never inflates to more.

    :raise ProtocolError: not a zlib stream of exactly ``size`` bytes.
    """
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ProtocolError(f"a page map does not inflate: {error}") from error
    if len(raw) != size or not inflater.eof or inflater.unused_data:
        raise ProtocolError(f"a page map is not {size} bytes long")
    return raw
