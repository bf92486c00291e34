"""Tells a guest which of its pages the host has taken: a list for who administers the guest.

Nothing waits for it. A list is made of the pager's answers, each about a part of RAM and made in less than a
millisecond, and told to the guest part by part, one after the other, so that neither a refault nor an epoch ever has
more than one part before it. It is told after an epoch and from time to time, never more often than every
:data:`EVERY_SECONDS`, and only if it is another than the one this guest agent has. What goes wrong is left to the
next time: the list is of no consequence to the host.
"""

from __future__ import annotations

import asyncio
import secrets
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from hva_host.agent import residences
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.pager_process import PagerHandle, call
from hvaqemu.errors import HvaError
from hvaqemu.pages import Residence
from hvaqemu.protocol import DiscardedEnd, DiscardedPiece, unpack_map

#: At least between two lists, and at most until it is looked whether refaults have changed the last one.
EVERY_SECONDS = 5.0
_LOOK_SECONDS = 30.0
_PART_SECONDS = 20.0


class DiscardedList:
    """The list of one VM.

    :param guest: who can be told now; nobody, where the guest does not run.
    """

    def __init__(self, pages: int, guest: Callable[[], GuestLink | None], pager: Callable[[], PagerHandle]) -> None:
        self._pages = pages
        self._guest = guest
        self._pager = pager
        self._due = asyncio.Event()
        #: The agent told last, and a checksum of what it was told.
        self._told: tuple[int, int] | None = None

    def epoch_ended(self) -> None:
        """The list has changed."""
        self._due.set()

    async def run(self) -> None:
        """Tell for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._due.wait()
            self._due.clear()
            with suppress(HvaError):
                await self.tell()
            # However often epochs end.
            await asyncio.sleep(EVERY_SECONDS)

    async def tell(self) -> None:
        """Tell the guest, if its agent keeps lists and has another than this.

        :raise HvaError: a peer went or was silent.
        """
        guest = self._guest()
        if guest is None or not guest.keeps_lists or guest.hello is None:
            return
        agent = guest.hello.instance
        parts = list(residences.parts(self._pages))
        maps = [await residences.compressed_part(self._pager(), part) for part in parts]
        checksum = 0
        for data in maps:
            checksum = zlib.crc32(data, checksum)
        if self._told == (agent, checksum):
            return
        number = secrets.randbits(63) + 1
        totals = np.zeros(len(Residence), dtype=np.int64)
        for piece, (part, data) in enumerate(zip(parts, maps, strict=True)):
            kinds = np.frombuffer(unpack_map(data, part.pages), dtype=np.uint8)
            totals += np.bincount(kinds, minlength=len(Residence))[: len(Residence)]
            await guest.keep(DiscardedPiece(0, number, piece, part.start, part.pages, data), _PART_SECONDS)
        status = await call(self._pager(), "status")
        _, zero, layer, preserved = totals.tolist()
        ever = (status["discarded_pages"], status["refault_pages"])
        await guest.keep(DiscardedEnd(0, number, len(maps), zero, layer, preserved, *ever), _PART_SECONDS)
        self._told = (agent, checksum)
