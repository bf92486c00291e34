"""Follows what a guest says of its memory by its balloon driver, for every method alike: it costs each the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from hva_host.agent.thinning import Thinned
from hva_host.compare.model import GuestPoint
from hvaqemu.errors import HvaError
from hvaqemu.qemu.guest_stats import GuestStats, Monitor, ask_every, guest_stats

#: Seconds between two questions of QEMU's to the guest, the least there is; and between two looks at the answer.
ASK_SECONDS = 1
_LOOK_SECONDS = 0.25
#: Points held.
_MOST = 2048


async def _nobody(_stats: GuestStats) -> None:
    pass


class GuestWatch:
    """One guest's.

    :param uptime: seconds that the VM has run by now.
    :param heard: awaited with each new word.
    """

    def __init__(
        self,
        qmp: Monitor,
        uptime: float,
        heard: Callable[[GuestStats], Awaitable[None]] = _nobody,
    ) -> None:
        self._qmp = qmp
        self._began = time.monotonic() - uptime
        self._heard = heard
        self._points: Thinned[GuestPoint] = Thinned(_MOST, ASK_SECONDS, GuestPoint.with_next)

    @property
    def points(self) -> list[GuestPoint]:
        """What the guest said, oldest first; nothing where its driver says nothing."""
        return self._points.points

    async def follow(self) -> None:
        """Go on until cancelled."""
        updated, asking = 0, False
        while True:
            # One that does not answer now may answer later: QMP comes back, a held page is released.
            with suppress(HvaError):
                if not asking:
                    await ask_every(self._qmp, ASK_SECONDS)
                    asking = True
                stats = await guest_stats(self._qmp)
                if stats.updated > updated:
                    updated = stats.updated
                    self._keep(stats)
                    await self._heard(stats)
            await asyncio.sleep(_LOOK_SECONDS)

    def _keep(self, stats: GuestStats) -> None:
        point = GuestPoint(
            at_s=time.monotonic() - self._began,
            free_bytes=stats.free,
            available_bytes=stats.available,
            least_free_bytes=stats.free,
            least_available_bytes=stats.available,
        )
        if self.points and point.at_s - self.points[-1].at_s < self._points.interval / 2:
            self.points[-1] = self.points[-1].with_next(point)
        else:
            self._points.add(point)
