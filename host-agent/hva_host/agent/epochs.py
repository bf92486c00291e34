"""One epoch from the host agent's side: ask the guest, have the pager do it, carry the confirmations between them.

The pager alone decides and discards. Whatever goes wrong here (a guest that dies, lies or sleeps) at most leaves the
pager without confirmation, and its own deadline ends the epoch.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hva_host.agent.guest_exchange import ScanReport
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.members import members
from hva_host.agent.model import EpochStats, PhaseSeconds
from hva_host.agent.pager_link import PagerLink
from hva_host.agent.slices import Slices
from hva_host.agent.steps import FreePages, Step
from hva_host.pager.epoch import CONFIRM_ROUNDS
from hva_host.pager.membership import Member
from hva_host.policy.pacing import report_serves
from hvaqemu.errors import HvaError, PeerLost
from hvaqemu.faultpoints import reach
from hvaqemu.pages import Run
from hvaqemu.qemu.race import race
from hvaqemu.reclaim_config import ReclaimState

_SCAN_SECONDS = 5.0
#: More for every million pages.
_SCAN_SECONDS_PER_MILLION = 15.0
_GRACE_SECONDS = 10.0
_ABANDON_SECONDS = 2.0
#: Of a slice that is tried again, what is counted then.
_LEFT = {"unmatched": 0, "unconfirmed": 0, "unpreserved": 0, "later": 0, "resting": 0, "note": ""}
_COUNTS = (
    *("candidates", "proven", "touched", "unmatched", "unconfirmed", "unpreserved", "later", "resting"),
    *("discarded", "discarded_zero", "discarded_layer", "discarded_store", "discarded_swap_cache", "freed"),
)

#: Has the guest stand still until QEMU's I/O has ended; seconds it did.
Drain = Callable[[], Awaitable[float]]


class EpochDriver:
    """Runs one epoch at a time for one VM.

    :param protection: how long a page may stay protected, in seconds.
    :param store: bytes the VM's compressed store may occupy.
    """

    def __init__(self, pages: int, protection: float, store: int = 0) -> None:
        self._pages = pages
        self._store = store
        #: The slices of one epoch have one number; a pager that served another host agent knows it by another.
        self._round = secrets.randbits(32)
        self._protection = protection
        self._slices = Slices(protection)
        self._free_pages = FreePages(pages)
        #: The newest event of each name, and that one came.
        self._events: dict[str, dict[str, Any]] = {}
        self._came = asyncio.Event()
        #: The guest's newest report; the pager proves everything, so an old one only costs time.
        self.report: ScanReport | None = None
        #: When it came, on the monotonic clock.
        self.reported_at = 0.0

    def on_pager_event(self, name: str, data: dict[str, Any]) -> None:
        """To be called with every event of the VM's pager."""
        self._events[name] = data
        self._came.set()

    async def run(
        self,
        guest: GuestLink | None,
        pager: PagerLink,
        states: Collection[ReclaimState],
        *,
        sift: bool,
        drain: Drain | None = None,
        step: Step | None = None,
    ) -> EpochStats:
        """One epoch.

        :param guest: who reports and confirms; None: nobody is asked, so the last report serves, and only for copies.
        :param drain: has I/O end that began before pages were protected; None: none does direct I/O.
        :param step: keeps it small; None: all that is found goes at once.
        :raise PeerLost: the pager went.
        :raise DeadlineExceeded: the pager did not end the epoch in time.
        :raise RefusedError: the pager refuses: a device pins RAM, or it is busy.
        """
        began = time.monotonic()
        if guest is not None and not self._may_be_old(states, step):
            await self.scan(guest)
            scanned = time.monotonic()
        else:
            scanned = began
        reach("agent.epoch.scanned")
        if guest is None or not _may_lose_free_pages(guest):
            states = [state for state in states if state is not ReclaimState.UNUSED]
        classes = self.report.classes if self.report is not None else None
        wanted = members(classes, self._pages, states, sift=sift)
        if step is not None and step.sampled:
            wanted[(wanted == Member.UNUSED) & ~self._free_pages.long_free(scanned)] = Member.OUT
        done: list[dict[str, Any]] = []
        for part in self._slices.over(wanted):
            members_of = wanted[part.start : part.stop]
            said = self.transact(
                pager, members_of, self._protection, guest, part.start, goes_on=bool(done), drain=drain, step=step
            )
            done.append(await said)
            if step is not None and (step := step.after(done[-1]["proven"])) is None:
                break
            self._slices.took(done[-1]["protected_s"])
            if self._slices.again:
                done[-1] |= {"candidates": done[-1]["discarded"] + done[-1]["touched"], **_LEFT}
        if not done:
            done.append(await self.transact(pager, wanted[:1], self._protection))
        return _stats(done, scan=scanned - began, total=time.monotonic() - began)

    def _may_be_old(self, states: Collection[ReclaimState], step: Step | None) -> bool:
        """Does the last report serve? What is proven byte by byte needs none; it only says what to look at."""
        # Where whatever is there goes, a guest that fills its memory would have hardly anything of the last report.
        if step is None or not step.sampled or ReclaimState.UNUSED in states or self.report is None:
            return False
        return time.monotonic() - self.reported_at < report_serves(self.report.guest_seconds)

    async def transact(
        self,
        pager: PagerLink,
        wanted: NDArray[np.uint8],
        seconds: float,
        guest: GuestLink | None = None,
        first: int = 0,
        *,
        goes_on: bool = False,
        drain: Drain | None = None,
        step: Step | None = None,
    ) -> dict[str, Any]:
        """Have the pager do one slice of an epoch, carrying the guest's confirmations; what the pager said of it.

        :param wanted: uint8 ``Member`` values of pfns from ``first`` on, shape ``(n,)``.
        :param seconds: when protection ends at the latest.
        :param guest: who confirms UNUSED pages; None: nobody does.
        :param goes_on: it is a further slice of the epoch of the call before.
        :param step: as for :meth:`run`.
        :raise HvaError: as :meth:`run`.
        """
        self._round += not goes_on
        arguments: dict[str, object] = {"seconds": seconds, "first": first, "store": self._store, "round": self._round}
        arguments["drain"] = drain is not None
        if step is not None:
            arguments |= {"sampled": step.sampled, "most": step.pages}
        number = (await pager.call("begin-epoch", arguments, wanted.tobytes()))["number"]
        reach("agent.epoch.begun")
        limit = seconds + _GRACE_SECONDS
        try:
            protected = await race(self._protected(number), limit, "pager: protection", pager.lost)
            reach("agent.epoch.protected")
            paused = 0.0
            if protected is not None and protected["drain"] and drain is not None:
                paused = await self._drained(drain, pager, protected["epoch"])
            if protected is not None and protected["wants"] and guest is not None:
                part = Run(first, len(wanted))
                await self._confirm(guest, pager, bytes.fromhex(protected["epoch"]), part, seconds)
            done = await race(self._event("epoch-done", number), limit, "pager: end of epoch", pager.lost)
            done["seconds"]["paused"] = paused
            return done
        except asyncio.CancelledError:
            # Nobody is left to confirm or to be told: the pages need not stay protected until the deadline.
            with suppress(HvaError):
                await asyncio.shield(pager.call("abandon", timeout=_ABANDON_SECONDS))
            raise

    async def _drained(self, drain: Drain, pager: PagerLink, epoch: str) -> float:
        """Have I/O end, and tell the pager; seconds the guest stood still."""
        try:
            paused = await drain()
        except HvaError:
            # Nothing may be compared; that is what the epoch's note will say.
            await pager.call("abandon", timeout=_ABANDON_SECONDS)
            return 0.0
        reach("agent.epoch.drained")
        await pager.call("drained", {"epoch": epoch})
        return paused

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

    async def scan(self, guest: GuestLink) -> None:
        """Have the guest report. One that is silent does not keep copies from being reclaimed: they need nothing of
        it."""
        try:
            self.report = await guest.scan(_SCAN_SECONDS + _SCAN_SECONDS_PER_MILLION * self._pages / 1e6)
        except HvaError:
            return
        self.reported_at = time.monotonic()
        self._free_pages.reported(self.report.classes, self.reported_at)

    async def _confirm(self, guest: GuestLink, pager: PagerLink, epoch: bytes, part: Run, seconds: float) -> None:
        try:
            for number in range(1, CONFIRM_ROUNDS + 1):
                # Asked each time: the agent that answers may be one that greeted us a moment ago.
                if not _may_lose_free_pages(guest):
                    return
                free: NDArray[np.bool_] = await guest.confirm(epoch, number, part, seconds)
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


def _stats(slices: Sequence[dict[str, Any]], *, scan: float, total: float) -> EpochStats:
    """What all slices of an epoch did."""
    seconds = {phase: sum(done["seconds"][phase] for done in slices) for phase in slices[0]["seconds"]}
    counts = {name: sum(done[name] for done in slices) for name in _COUNTS}
    return EpochStats(
        **counts,
        number=slices[-1]["number"],
        resident_before=slices[0]["resident_before"],
        seconds=PhaseSeconds(scan=scan, total=total, **seconds),
        slices=len(slices),
        protected_s=max(done["protected_s"] for done in slices),
        note=next((done["note"] for done in slices if done["note"]), ""),
    )
