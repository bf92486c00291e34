"""What a guest agent was asked and has not answered: numbered, bounded, each with what its answers add up to."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any, TypeVar

from hva_host.agent.guest_exchange import Exchange, printable
from hvaqemu.errors import GuestError, HvaError, ProtocolError, RefusedError
from hvaqemu.protocol import Error, ErrorCode, Message

T = TypeVar("T")

REQUESTS_MAX = 32


@dataclass
class LinkCounters:
    """What came over the link: how often an agent greeted, and what counted for nothing."""

    greetings: int = 0
    #: Answers nobody waits for.
    unsolicited: int = 0
    #: Intact frames whose payload is not what their type says.
    malformed: int = 0
    #: Frames of types we do not know.
    unknown: int = 0
    #: Requests an answer out of turn or bounds has failed.
    broken_answers: int = 0


@dataclass(eq=False)
class _Pending:
    """A request under way."""

    exchange: Exchange[Any]
    answer: asyncio.Future[Any]


class Requests:
    """The requests under way on one link. Whoever opens one waits for its future and closes it in any case."""

    def __init__(self, counters: LinkCounters) -> None:
        self._counters = counters
        self._pending: dict[int, _Pending] = {}
        # Random, so that no answer to an earlier host agent's question can be taken for one to ours.
        self._next = secrets.randbits(62) + 1

    def __len__(self) -> int:
        return len(self._pending)

    def open(self, exchange: Exchange[T], answer: asyncio.Future[T]) -> int:
        """The number of a new request whose result, or error, ``answer`` will get.

        :raise RefusedError: too many are under way.
        """
        if len(self._pending) >= REQUESTS_MAX:
            raise RefusedError(f"{REQUESTS_MAX} requests to the guest agent are under way already")
        number = self._next
        self._next += 1
        self._pending[number] = _Pending(exchange, answer)
        return number

    def close(self, number: int) -> None:
        """Whoever opened it waits no more: what comes now is unsolicited."""
        pending = self._pending.pop(number)
        if not pending.answer.cancel() and not pending.answer.cancelled():
            # Seen, so that asyncio does not complain that nobody asked.
            pending.answer.exception()

    def fail_all(self, error: HvaError) -> None:
        """End all requests under way with ``error``, an object of its own for each."""
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(type(error)(error.message, error.hint))

    def answered(self, message: Message) -> bool:
        """Account for an answer, if anybody waits for it: late, repeated, foreign and invented ones count for nothing.

        :return: somebody did.
        """
        pending = self._waiting(getattr(message, "request", -1))
        if pending is None or not pending.exchange.expects(message):
            self._counters.unsolicited += 1
            return False
        try:
            result = pending.exchange.take(message)
        except HvaError as error:
            self._counters.broken_answers += isinstance(error, ProtocolError)
            pending.answer.set_exception(error)
        else:
            if result is not None:
                pending.answer.set_result(result)
        return True

    def denied(self, message: Error) -> None:
        """Account for a refusal."""
        pending = self._waiting(message.request)
        if pending is None:
            self._counters.unsolicited += 1
            return
        kind = RefusedError if message.code == ErrorCode.NOT_ALLOWED else GuestError
        pending.answer.set_exception(kind(f"the guest agent: {printable(message.text)}"))

    def _waiting(self, number: int) -> _Pending | None:
        pending = self._pending.get(number)
        return None if pending is None or pending.answer.done() else pending
