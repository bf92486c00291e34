"""One epoch from the host agent's side: ask the guest, have the pager do it, carry the confirmations between them.

The pager alone decides and discards. Whatever goes wrong here (a guest that dies, lies or sleeps) at most leaves the
pager without confirmation, and its own deadline ends the epoch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hva_host.agent.guest_exchange import ScanReport
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.members import members
from hva_host.agent.model import EpochStats, PhaseSeconds
from hva_host.agent.pager_link import PagerLink
from hva_host.pager.epoch import CONFIRM_ROUNDS
from hvaqemu.errors import HvaError, PeerLost
from hvaqemu.faultpoints import reach
from hvaqemu.qemu.race import race
from hvaqemu.scenario_config import ReclaimState

_SCAN_SECONDS = 5.0
_EPOCH_SECONDS = 3.0
#: More for every million pages: two scans of the guest and the comparison of all its page cache.
_EPOCH_SECONDS_PER_MILLION = 15.0
_GRACE_SECONDS = 10.0
_ABANDON_SECONDS = 2.0


class EpochDriver:
    """Runs one epoch at a time for one VM."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        #: The newest event of each name, and that one came.
        self._events: dict[str, dict[str, Any]] = {}
        self._came = asyncio.Event()
        #: The guest's newest report; the pager proves everything, so an old one only costs time.
        self.report: ScanReport | None = None

    def on_pager_event(self, name: str, data: dict[str, Any]) -> None:
        """To be called with every event of the VM's pager."""
        self._events[name] = data
        self._came.set()

    async def run(
        self, guest: GuestLink | None, pager: PagerLink, states: Collection[ReclaimState], *, sift: bool
    ) -> EpochStats:
        """One epoch.

        :param guest: who reports and confirms; None: nobody is asked, so the last report serves, and only for copies.
        :raise PeerLost: the pager went.
        :raise DeadlineExceeded: the pager did not end the epoch in time.
        :raise RefusedError: the pager refuses: a device pins RAM, or it is busy.
        """
        began = time.monotonic()
        if guest is not None:
            await self._scan(guest)
        reach("agent.epoch.scanned")
        scanned = time.monotonic()
        if guest is None or not _may_lose_free_pages(guest):
            states = [state for state in states if state is not ReclaimState.UNUSED]
        classes = self.report.classes if self.report is not None else None
        wanted = members(classes, self._pages, states, sift=sift)
        seconds = _EPOCH_SECONDS + _EPOCH_SECONDS_PER_MILLION * self._pages / 1e6
        done = await self.transact(pager, wanted, seconds, guest)
        return _stats(done, scan=scanned - began, total=time.monotonic() - began)

    async def transact(
        self, pager: PagerLink, wanted: NDArray[np.uint8], seconds: float, guest: GuestLink | None = None
    ) -> dict[str, Any]:
        """Have the pager do an epoch, carrying the guest's confirmations; what the pager said of it.

        :param wanted: uint8 ``Member`` values, shape ``(pages,)``.
        :param seconds: when protection ends at the latest.
        :param guest: who confirms UNUSED pages; None: nobody does.
        :raise HvaError: as :meth:`run`.
        """
        number = (await pager.call("begin-epoch", {"seconds": seconds}, wanted.tobytes()))["number"]
        reach("agent.epoch.begun")
        limit = seconds + _GRACE_SECONDS
        try:
            protected = await race(self._protected(number), limit, "pager: protection", pager.lost)
            reach("agent.epoch.protected")
            if protected is not None and protected["wants"] and guest is not None:
                await self._confirm(guest, pager, bytes.fromhex(protected["epoch"]), seconds)
            return await race(self._event("epoch-done", number), limit, "pager: end of epoch", pager.lost)
        except asyncio.CancelledError:
            # Nobody is left to confirm or to be told: the pages need not stay protected until the deadline.
            with suppress(HvaError):
                await asyncio.shield(pager.call("abandon", timeout=_ABANDON_SECONDS))
            raise

    async def _protected(self, number: int) -> dict[str, Any] | None:
        """The event of protection; None if the epoch ended without."""
        while self._events.get("epoch-done", {}).get("number") != number:
            if self._events.get("protected", {}).get("number") == number:
                return self._events.pop("protected")
            self._came.clear()
            await self._came.wait()
        return self._events.pop("protected", None)

    async def _event(self, name: str, number: int) -> dict[str, Any]:
        """The event of this epoch; one of an earlier epoch, whose driver was cancelled, is not it."""
        while self._events.get(name, {}).get("number") != number:
            self._came.clear()
            await self._came.wait()
        return self._events.pop(name)

    async def _scan(self, guest: GuestLink) -> None:
        try:
            self.report = await guest.scan(_SCAN_SECONDS + _EPOCH_SECONDS_PER_MILLION * self._pages / 1e6)
        except HvaError:
            # A silent guest agent does not keep copies from being reclaimed: they need nothing from it.
            return

    async def _confirm(self, guest: GuestLink, pager: PagerLink, epoch: bytes, seconds: float) -> None:
        try:
            for number in range(1, CONFIRM_ROUNDS + 1):
                # Asked each time: the agent that answers may be one that greeted us a moment ago.
                if not _may_lose_free_pages(guest):
                    return
                free: NDArray[np.bool_] = await guest.confirm(epoch, number, seconds)
                payload = np.packbits(free).tobytes()
                reach("agent.epoch.answered")
                await pager.call("confirm", {"epoch": epoch.hex(), "round": number}, payload)
        except PeerLost:
            if pager.lost.done():
                raise
        except HvaError:
            # The pager waits until its deadline and says so in the epoch's note.
            return


def _may_lose_free_pages(guest: GuestLink) -> bool:
    """Is it known of the guest that it never looks at the content of its free pages?"""
    return guest.hello is not None and not guest.hello.checks_free_pages


def _stats(done: dict[str, Any], *, scan: float, total: float) -> EpochStats:
    seconds = PhaseSeconds(scan=scan, total=total, **done.pop("seconds"))
    return EpochStats(**done, seconds=seconds)
