"""Keeps a guest's balloon at the size that :mod:`.balloon` says, each time the guest has said something new."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from hva_host.compare.balloon import RESERVE_SHARE, Bounds, Word, next_size
from hvaqemu.errors import DeadlineExceeded
from hvaqemu.qemu.guest_stats import GuestStats, Monitor
from hvaqemu.units import format_size

#: Seconds, by the clock of its words, and words in which a guest must give something of what it was asked for; one that
#: does not is left with what it has. One that stood still says but one word of a long time.
_STUCK_SECONDS, _STUCK_WORDS = 5, 3
#: Seconds in which a guest takes back all that the balloon had.
_DEFLATE_SECONDS = 30.0
#: After it had to grow, a guest is not shrunk for so long (as long as MOM takes for a decision), or it would swing.
_HOLD_SECONDS = 10.0
#: Seconds for all steps: at 5 % a second a guest is at a hundredth of its size after 90.
_SETTLE_SECONDS = 180.0
#: It has settled once so many words in a row, of which each might have, justified no step.
_QUIET = 3


class Balloon(Monitor, Protocol):
    """The balloon of a guest, by QMP."""

    async def balloon(self, size: int, timeout: float) -> int: ...

    async def balloon_actual(self) -> int: ...


@dataclass
class _Shrink:
    """A step down that the guest has not done yet."""

    wanted: int
    #: What it had when it gave something last, and when that was said.
    size: int
    at: int
    #: Words since then.
    words: int = 0


class BalloonKeeper:
    """One guest's.

    :param bounds: bytes the guest is left.
    :ivar bounds: may be changed at any time.
    :ivar shrinking: whether it also shrinks; it always grows on demand.
    :ivar share: what stays available to the guest, of what it has; may be changed at any time.
    :ivar remarks: what a reader of the outcome has to know, one line each.
    """

    def __init__(self, qmp: Balloon, bounds: Bounds) -> None:
        self.bounds = bounds
        self.shrinking = False
        self.share = RESERVE_SHARE
        self.remarks: list[str] = []
        self._qmp = qmp
        self._words = 0
        self._pressed = False
        self._word: Word | None = None
        #: Words up to that second are of before the last change.
        self._old = 0
        self._asked = self._size = self._least = bounds.most
        self._shrink: _Shrink | None = None
        #: What the guest could not go below, until it grows.
        self._floor = 0
        self._grown_at = -_HOLD_SECONDS
        self._quiet = 0
        self._settled = asyncio.Event()
        self._spoken = asyncio.Event()
        self._turn = asyncio.Lock()

    async def broken(self, patience: float) -> str:
        """Why this is no balloon that works, or "".

        :param patience: seconds that the guest has for its first word.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._spoken.wait()
        if not self._words:
            return "its driver says nothing of its memory"
        if self._pressed and self._least >= self.bounds.most:
            return "its guest was asked for memory and gave none"
        return ""

    async def heard(self, stats: GuestStats) -> None:
        """Take up what the guest said; changes the balloon where that justifies it. Does not wait for the guest.

        :raise HvaError: QEMU went, or did not answer.
        """
        if stats.available is None or stats.updated <= self._old:
            # Without a figure, or of before the last change: nothing follows from it.
            return
        async with self._turn:
            size = await self._qmp.balloon_actual()
            self._words += 1
            self._spoken.set()
            word = Word(
                stats.updated, min(stats.available, self.bounds.most), stats.major_faults or 0, stats.swapped_in or 0
            )
            before, self._word, self._old = self._word, word, word.at
            await self._follow(size, word.at)
            held = time.monotonic() - self._grown_at < _HOLD_SECONDS
            free = self.shrinking and not held and self._shrink is None
            bounds = Bounds(max(self.bounds.least, self._floor), self.bounds.most)
            wanted = next_size(size, bounds, word, before, may_shrink=free, share=self.share)
            if wanted > size:
                await self._grow(max(wanted, self._asked))
            elif wanted < size:
                await self._ask(wanted)
                self._pressed = True
                self._shrink = _Shrink(wanted, size, word.at)
            self._quiet = self._quiet + 1 if free and wanted == size else 0
            if self._quiet >= _QUIET:
                self._settled.set()

    async def settle(self) -> None:
        """Shrink until the guest's word justifies no more; then as before. A hold ends: this was asked for.

        One that comes to no rest is left where it is, with a remark.

        :raise DeadlineExceeded: the guest says nothing.
        """
        words, shrinking = self._words, self.shrinking
        self._quiet, self._floor, self._grown_at, self.shrinking = 0, 0, -_HOLD_SECONDS, True
        self._settled.clear()
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                await self._settled.wait()
        except TimeoutError as error:
            if self._words == words:
                raise DeadlineExceeded(f"the guest says nothing of its memory within {_SETTLE_SECONDS:g} s") from error
            self.remarks.append(f"the balloon came to no rest within {_SETTLE_SECONDS:g} s of a reclaim")
        finally:
            self.shrinking = shrinking

    async def deflate(self) -> None:
        """Let the guest have all of its memory.

        :raise HvaError: QEMU went, or did not answer, or the guest does not take it.
        """
        async with self._turn:
            self._shrink, self._floor, self._asked = None, 0, self.bounds.most
            self._size = await self._qmp.balloon(self.bounds.most, _DEFLATE_SECONDS)
            self._old = max(self._old, int(time.time()))

    async def _follow(self, size: int, at: int) -> None:
        """Judge how far the guest has come with what it was asked for."""
        taken = size > max(self._size, self._asked)
        self._size, self._least = size, min(self._least, size)
        shrink = self._shrink
        if shrink is not None:
            shrink.words += 1
        if taken:
            # deflate_on_oom: it was shorter of memory than its word had said.
            self._grown_at = time.monotonic()
        elif shrink is None:
            return
        elif size <= shrink.wanted:
            self._shrink = None
            return
        elif size < shrink.size:
            shrink.size, shrink.at, shrink.words = size, at, 0
            return
        elif at - shrink.at < _STUCK_SECONDS or shrink.words < _STUCK_WORDS:
            return
        else:
            if self._floor == 0:
                self.remarks.append(f"the balloon could not take the guest below {format_size(size)}")
            self._floor = size
        # Left alone it would go on trying.
        self._shrink = None
        await self._ask(size)

    async def _grow(self, wanted: int) -> None:
        self._shrink, self._floor = None, 0
        self._grown_at = time.monotonic()
        await self._ask(wanted)

    async def _ask(self, size: int) -> None:
        self._asked = size
        await self._qmp.execute("balloon", {"value": size})
