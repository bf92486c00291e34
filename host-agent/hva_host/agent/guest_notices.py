"""Telling of a guest link's changes of state: a guest can cause them as fast as it writes, and each is logged and sent
to every client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hva_host.agent.guest_budget import TokenBucket
from hva_host.agent.guest_session import LinkState

#: Changes told a second, and at once after a pause. A guest that boots, or whose agent is restarted, causes three.
_RATE, _BURST = 1.0, 16.0


class Notices:
    """Tells of every change while they are few, of the newest state now and then while they are many."""

    def __init__(self, tell: Callable[[LinkState], None]) -> None:
        self._tell = tell
        self._bucket = TokenBucket(_RATE, _BURST)
        self._newest = self._told = LinkState.CLOSED
        self._timer: asyncio.TimerHandle | None = None

    def changed(self, state: LinkState) -> None:
        """The link's state is another now."""
        self._newest = state
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        if wait := self._bucket.take(1, loop.time()):
            self._timer = loop.call_later(wait, self.flush)
        else:
            self.flush()

    def flush(self) -> None:
        """Tell of the newest state, if it was not the last one told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._newest is not self._told:
            self._told = self._newest
            self._tell(self._newest)
