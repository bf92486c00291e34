"""The session with a guest agent as a state machine: frames and the time in, messages and states out. No I/O, no clock.

Connected to QEMU is not connected to an agent: that takes our ATTACH, a HELLO that echoes its nonce, and our ACK. An
agent that restarts greets with another nonce: what was asked of its predecessor fails at once. An agent that falls
silent (or whose VM stands still) loses the session's "attached" and gets it back with the first sign of life; requests
then under way live or die by their own deadlines.

Nothing a guest sends makes a method here raise, and none makes it write more than a message or fail more than the
requests under way. ``docs/protocol.md`` has the table of states.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable

from hva_host.agent.guest_requests import LinkCounters, Requests
from hvaqemu.errors import HvaError, PeerLost, ProtocolError, RefusedError
from hvaqemu.framing import Frame
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.protocol import Ack, Attach, Error, ErrorCode, Feature, Hello, Message, Ping, Pong, decode

#: All we know how to use.
FEATURES = Feature.EXEC | Feature.SWAPCACHE | Feature.PRESSURE | Feature.POTENTIAL | Feature.DISCARDED

#: Seconds between ATTACHes: at least, at first, and at most (what a dead guest never reads piles up in the socket).
ATTACH_MIN, _ATTACH_FIRST, _ATTACH_MAX = 0.2, 0.5, 10.0
#: Seconds without a word after which we ask, and after which the agent counts as silent.
_PING_AFTER, _SILENT_AFTER = 10.0, 30.0
#: The request number of our own signs-of-life question.
_KEEPALIVE = 0


class LinkState(enum.Enum):
    """How far the link has come."""

    CLOSED = "closed"
    #: No connection to QEMU.
    CONNECTING = "connecting"
    #: Connected to QEMU; no agent has answered yet.
    ATTACHING = "attaching"
    #: An agent serves us.
    ATTACHED = "attached"
    #: An agent served us and has fallen silent; the session stands.
    SILENT = "silent"
    #: The agent at the other end is not one we can work with; see ``refused``.
    REFUSED = "refused"


class GuestSession:
    """The sessions of one link, one after the other.

    :param pages: of the VM.
    :param tell: writes a message if there is room for it; all that is told this way is told again, or may be lost.
    :param on_state: called after each change of state.
    :ivar hello: what the agent of the present session said of itself, else None. Its strings are the guest's.
    :ivar refused: why the agent at the other end is refused, or "".
    """

    def __init__(self, pages: int, tell: Callable[[Message], None], on_state: Callable[[LinkState], None]) -> None:
        self.state = LinkState.CLOSED
        self.counters = LinkCounters()
        self.requests = Requests(self.counters)
        self.hello: Hello | None = None
        self.refused = ""
        self._pages = pages
        self._tell = tell
        self._on_state = on_state
        self._nonce = 0
        self._attach_wait = 0.0
        self._attached_at = self._heard_at = self._asked_at = 0.0

    # What happens to the connection

    def connecting(self, why: str) -> None:
        """There is no connection, ``why``; one is tried for."""
        self._end(PeerLost(why), LinkState.CONNECTING)

    def connected(self, now: float) -> None:
        """A new connection to QEMU."""
        self._nonce = secrets.randbits(63) + 1
        self._heard_at = now
        self.refused = ""
        self._enter(LinkState.ATTACHING)
        self._attach(now)

    def closed(self) -> None:
        """The link is to be used no more."""
        self._end(PeerLost("the link to the guest agent was closed"), LinkState.CLOSED)

    def tick(self, now: float) -> None:
        """What the passing of time asks for; to be called a few times a second while connected, every two
        seconds while attached."""
        if self.state is LinkState.ATTACHED:
            quiet = now - self._heard_at
            if quiet > _SILENT_AFTER:
                self._enter(LinkState.SILENT)
                self._attach(now)
            elif quiet > _PING_AFTER and now - self._asked_at > _PING_AFTER:
                self._asked_at = now
                self._tell(Ping(_KEEPALIVE))
        elif self.state is not LinkState.REFUSED and now - self._attached_at > self._attach_wait:
            self._attach(now, min(self._attach_wait * 2, _ATTACH_MAX))

    # What the guest says

    def take(self, frame: Frame, now: float) -> None:
        """Account for an intact frame from the guest."""
        try:
            message = decode(frame)
        except ProtocolError:
            self.counters.malformed += 1
            return
        if message is None:
            self.counters.unknown += 1
        elif isinstance(message, Hello):
            self._greeted(message, now)
        elif isinstance(message, Error):
            self._heard(now)
            self._denied(message, now)
        elif (isinstance(message, Pong) and message.request == _KEEPALIVE) or self.requests.answered(message):
            self._heard(now)

    def _heard(self, now: float) -> None:
        self._heard_at = now
        if self.state is LinkState.SILENT:
            self._enter(LinkState.ATTACHED)

    def _denied(self, message: Error, now: float) -> None:
        if message.code == ErrorCode.NOT_ATTACHED and self.state is LinkState.ATTACHED:
            # Our ACK was lost, or the agent has dropped the session.
            self._lose("the guest agent has dropped the session", now)
        else:
            self.requests.denied(message)

    def _greeted(self, hello: Hello, now: float) -> None:
        self.counters.greetings += 1
        if hello.nonce != self._nonce:
            # An agent that has just opened its port, or one that answers somebody before us.
            self._lose("the guest agent was restarted", now)
            return
        self.refused = self._objection(hello)
        if self.refused:
            self._end(RefusedError(self.refused), LinkState.REFUSED)
            return
        if self.hello is not None and (hello.instance, hello.boot_id) != (self.hello.instance, self.hello.boot_id):
            self.requests.fail_all(PeerLost("the guest agent was restarted"))
        self.hello = hello
        self._tell(Ack(hello.features & FEATURES))
        self._heard_at = now
        self._enter(LinkState.ATTACHED)

    def _objection(self, hello: Hello) -> str:
        """Why the agent cannot be worked with, or ""."""
        if hello.page_size != PAGE_SIZE:
            return f"the guest has pages of {hello.page_size} bytes, not {PAGE_SIZE}"
        end = 0
        for start, count in hello.ranges:
            if start < end or not count:
                return "the guest agent's memory ranges overlap, do not ascend, or are empty"
            end = start + count
        if end > self._pages:
            return f"the guest agent claims memory up to page {end}; the VM has {self._pages} pages"
        return ""

    # Transitions

    def _attach(self, now: float, patience: float = _ATTACH_FIRST) -> None:
        self._attached_at = now
        self._attach_wait = patience
        self._tell(Attach(self._nonce, FEATURES))

    def _lose(self, why: str, now: float) -> None:
        """Fail what was asked, and attach again, but not as fast as a hostile guest might like."""
        self.refused = ""
        self._end(PeerLost(why), LinkState.ATTACHING)
        if now - self._attached_at > ATTACH_MIN:
            self._attach(now)
        else:
            self._attach_wait = ATTACH_MIN

    def _end(self, error: HvaError, state: LinkState) -> None:
        """Fail what was asked; there is no session now."""
        self.hello = None
        self.requests.fail_all(error)
        self._enter(state)

    def _enter(self, state: LinkState) -> None:
        if state is not self.state:
            self.state = state
            self._on_state(state)
