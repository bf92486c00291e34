"""The agent's loop: one thread, one selector; the port, running commands and one scan step at a time."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Callable, NamedTuple

from hva_guest.discarded import DiscardedList
from hva_guest.kernel import read_boot_id, read_poisoning
from hva_guest.mappings import SharedMappings
from hva_guest.memory import memory_ranges, read_memory, read_pressure, read_uptime_ms, read_workingset_refaults
from hva_guest.port import HostGone, Port, find_port
from hva_guest.scan import PageFlags, confirm_answer, scan_answer
from hvaqemu import __version__
from hvaqemu.errors import ProtocolError
from hvaqemu.faultpoints import reach
from hvaqemu.framing import Frame
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.protocol import (
    UNKNOWN_U32,
    Ack,
    Attach,
    Confirm,
    DiscardedEnd,
    DiscardedPiece,
    Error,
    ErrorCode,
    Exec,
    ExecCancel,
    Feature,
    Hello,
    Message,
    Ping,
    Pong,
    Scan,
    Stats,
    StatsReport,
    decode,
)

if TYPE_CHECKING:
    from hva_guest.commands import Commands

#: Bytes queued for the host from which on nothing more is read, scanned or taken from commands.
QUEUE_BOUND = 512 * 1024
SCANS_MAX = 8
#: Seconds between looks for a port that is not there, and for a host that has let go of its end.
_REOPEN = 0.5
_HOST_POLL = 0.5
#: Seconds between looks at an incomplete frame.
_STALE_POLL = 0.5


class Settings(NamedTuple):
    """What the command line says."""

    port: str
    #: A device to open instead of looking for ``port``; "" to look.
    device: str
    allow_exec: bool
    kpageflags: str
    iomem: str


class Agent:
    """Serves whoever holds the host's end of the port, for ever."""

    def __init__(self, settings: Settings, log: Callable[[str], None]) -> None:
        self._settings = settings
        self._log = log
        self._instance = int.from_bytes(os.urandom(8), "big")
        self._boot_id = read_boot_id()
        self._poisoning = read_poisoning()
        self._offered = Feature.SWAPCACHE
        if read_pressure()[0] != UNKNOWN_U32:
            self._offered |= Feature.PRESSURE
        self._shared = SharedMappings()
        if os.access("/proc/self/pagemap", os.R_OK):
            self._offered |= Feature.POTENTIAL
        self._discarded = DiscardedList()
        if os.access("/run", os.W_OK):
            self._offered |= Feature.DISCARDED
        self._selector = selectors.DefaultSelector()
        self._commands: Commands | None = None
        if settings.allow_exec:
            # Imported where it is wanted: the subprocess module costs memory.
            from hva_guest.commands import Commands

            self._offered |= Feature.EXEC
            self._commands = Commands(self._selector, self._send)
        self._flags: PageFlags | None = None
        self._port: Port | None = None
        self._stopping = False
        self._wake, self._signals = socket.socketpair()
        #: Of the session: 0 before the first ATTACH.
        self._nonce = 0
        #: Of the session: what the host acknowledged; None before ACK.
        self._features: Feature | None = None
        self._scans: deque[tuple[int, Iterator[Message | None]]] = deque()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        self._catch_signals()
        announced = False
        while not self._stopping:
            path = self._settings.device or find_port(self._settings.port)
            try:
                if path is None:
                    raise FileNotFoundError(f"no virtio port is named {self._settings.port}")
                self._port = Port(path)
            except OSError as error:
                if not announced:
                    self._log(f"waiting for the port: {error}")
                    announced = True
                self._rest(_REOPEN)
                continue
            announced = False
            self._log(f"port {path} is open")
            try:
                self._serve(self._port)
            except OSError as error:
                self._log(f"port {path}: {error}")
            self._end_session()
            if self._port.descriptor in self._selector.get_map():
                self._selector.unregister(self._port.descriptor)
            self._port.close()
            self._port = None
            self._rest(_REOPEN)

    def _catch_signals(self) -> None:
        for end in (self._wake, self._signals):
            end.setblocking(False)
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _woken(self) -> None:
        """A signal came: it only had to end the wait."""
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)

    def _rest(self, seconds: float) -> None:
        """Wait without a port; commands that were killed are still reaped."""
        end = time.monotonic() + seconds
        while not self._stopping and (left := end - time.monotonic()) > 0:
            self._dispatch(left)

    def _dispatch(self, timeout: float | None) -> None:
        """Call what is ready, then let commands advance."""
        for key, _ in self._selector.select(timeout):
            # An earlier call of this round may have closed this one's file, or another may have its number by now.
            if self._selector.get_map().get(key.fd) is key:
                key.data()

    # The port and its session

    def _serve(self, port: Port) -> None:
        """Until stopped.

        :raise OSError: the port has gone.
        """
        watched = 0
        present = True
        self._greet(0)
        while not self._stopping:
            try:
                port.flush()
                wanted = self._wanted(port) if present else 0
                if wanted != watched:
                    self._watch(port, watched, wanted)
                    watched = wanted
                self._dispatch(self._patience(port, present))
                if present:
                    self._take(port.stale())
                elif port.host_present():
                    present = True
                    self._greet(0)
                self._advance(port)
            except HostGone:
                # Closed at the host's end, the port polls as ready for ever: look at it by the clock instead.
                present = False
                self._end_session()
                port.reset()

    def _wanted(self, port: Port) -> int:
        wanted = selectors.EVENT_READ if port.queued < QUEUE_BOUND else 0
        return wanted | selectors.EVENT_WRITE if port.queued else wanted

    def _watch(self, port: Port, before: int, wanted: int) -> None:
        if before:
            self._selector.unregister(port.descriptor)
        if wanted:
            self._selector.register(port.descriptor, wanted, lambda: self._take(port.read()))

    def _patience(self, port: Port, present: bool) -> float | None:
        """Seconds the selector may wait."""
        if self._scans and port.queued < QUEUE_BOUND:
            return 0.0
        waits = [
            self._commands.tick() if self._commands else None,
            _STALE_POLL if port.incomplete else None,
            None if present else _HOST_POLL,
        ]
        due = [wait for wait in waits if wait is not None]
        return max(0.0, min(due)) if due else None

    def _send(self, message: Message) -> None:
        if self._port is not None:
            self._port.send(message)

    def _greet(self, nonce: int) -> None:
        self._send(
            Hello(
                nonce,
                self._offered,
                self._instance,
                self._boot_id,
                PAGE_SIZE,
                memory_ranges(self._settings.iomem),
                os.uname().release,
                __version__,
                *self._poisoning,
            )
        )

    def _end_session(self) -> None:
        """Whoever asked is gone: end what was done for it."""
        self._nonce = 0
        self._features = None
        self._scans.clear()
        self._discarded.forget()
        if self._commands is not None:
            self._commands.end_all()

    def _advance(self, port: Port) -> None:
        """A step of the scan at hand, and what commands have to say, as long as the host keeps up."""
        full = port.queued >= QUEUE_BOUND
        if self._commands is not None:
            self._commands.tick()
            self._commands.pause(full)
        if not self._scans or full:
            return
        request, answer = self._scans[0]
        try:
            message = next(answer)
            if message is not None:
                self._send(message)
        except StopIteration:
            self._scans.popleft()
        except OSError as error:
            self._scans.popleft()
            self._send(Error(request, ErrorCode.UNAVAILABLE, f"{self._settings.kpageflags}: {error.strerror}"))

    # What the host says

    def _take(self, frames: list[Frame]) -> None:
        for frame in frames:
            try:
                message = decode(frame)
            except ProtocolError as error:
                self._send(Error(0, ErrorCode.BAD_REQUEST, error.message))
                continue
            if isinstance(message, Attach):
                self._attach(message)
            elif isinstance(message, Ack):
                self._acknowledged(message)
            elif isinstance(message, (DiscardedPiece, DiscardedEnd)):
                self._keep(message)
            elif isinstance(message, (Ping, Scan, Confirm, Stats, Exec, ExecCancel)):
                self._answer(message)

    def _attach(self, message: Attach) -> None:
        reach("guest.detached")
        if message.nonce != self._nonce:
            self._end_session()
            if self._port is not None:
                self._port.forget()
            self._nonce = message.nonce
        self._greet(message.nonce)

    def _acknowledged(self, message: Ack) -> None:
        reach("guest.greeted")
        if not self._nonce or message.features & ~self._offered:
            self._send(Error(0, ErrorCode.BAD_REQUEST, "features acknowledged that were not offered"))
        else:
            self._features = Feature(message.features)

    def _answer(self, message: Ping | Scan | Confirm | Stats | Exec | ExecCancel) -> None:
        """Begin to answer a request."""
        if self._features is None:
            self._send(Error(message.request, ErrorCode.NOT_ATTACHED, "no session: ATTACH and ACK come first"))
        elif isinstance(message, Ping):
            reach("guest.serving")
            self._send(Pong(message.request))
        elif isinstance(message, Stats):
            self._send(self._stats(message.request))
        elif isinstance(message, (Scan, Confirm)):
            self._begin_scan(message, self._features)
        elif self._commands is None or not self._features & Feature.EXEC:
            self._send(Error(message.request, ErrorCode.NOT_ALLOWED, "this guest runs no commands for the host"))
        elif isinstance(message, Exec):
            self._commands.start(message)
        else:
            self._commands.cancel(message.request)

    def _keep(self, message: DiscardedPiece | DiscardedEnd) -> None:
        """Take a part of the list of discarded pages."""
        if self._features is None or not self._features & Feature.DISCARDED:
            return self._send(Error(message.request, ErrorCode.NOT_ATTACHED, "lists were not agreed on"))
        try:
            if isinstance(message, DiscardedPiece):
                self._send(self._discarded.piece(message))
            else:
                self._send(self._discarded.end(message))
        except ProtocolError as error:
            self._send(Error(message.request, ErrorCode.BAD_REQUEST, error.message))
        except OSError as error:
            self._send(Error(message.request, ErrorCode.UNAVAILABLE, f"{error.filename}: {error.strerror}"))
        return None

    def _stats(self, request: int) -> StatsReport:
        pressure = UNKNOWN_U32, UNKNOWN_U32
        if self._features is not None and self._features & Feature.PRESSURE:
            pressure = read_pressure()
        return StatsReport(request, *read_memory(), read_uptime_ms(), *pressure, read_workingset_refaults())

    def _begin_scan(self, message: Scan | Confirm, features: Feature) -> None:
        """Queue a scan of its own for each request, so that every scan begins after its request was read."""
        if len(self._scans) >= SCANS_MAX:
            return self._send(Error(message.request, ErrorCode.BUSY, f"{SCANS_MAX} scans are waiting already"))
        try:
            if self._flags is None:
                self._flags = PageFlags(self._settings.kpageflags)
        except OSError as error:
            reason = f"{self._settings.kpageflags}: {error.strerror}"
            return self._send(Error(message.request, ErrorCode.UNAVAILABLE, reason))
        ranges = memory_ranges(self._settings.iomem)
        answer: Iterator[Message | None]
        if isinstance(message, Confirm):
            answer = confirm_answer(message, self._flags, ranges)
        else:
            shared = self._shared if features & Feature.POTENTIAL else None
            answer = scan_answer(message, self._flags, ranges, bool(features & Feature.SWAPCACHE), shared)
        self._scans.append((message.request, answer))
        return None
