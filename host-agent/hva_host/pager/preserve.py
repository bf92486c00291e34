"""Paging out what is no copy: which STABLE pages an epoch tries, and their bytes into the compressed store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.runs import runs_of_pfns
from hva_host.memory.slots import StoreFull
from hva_host.pager.coldness import REGION, Choice, Coldness
from hva_host.pager.ram import PageBuffer, Ram
from hvaqemu.pages import PAGE_SHIFT

#: Pages written between two looks at faults: compressing one takes 10 to 20 µs.
SLICE_PAGES = 32
#: Pages chosen from at a time.
_CHOICE_PAGES = 64 * REGION


class Preserved(NamedTuple):
    """Ledger entries of pages, 0 where one is to stay (shape ``(n,)``), and why no more fit into the store, or ""."""

    entries: NDArray[np.uint64]
    full: str


class Preserver:
    """Preserves pages of one VM.

    :ivar coldness: to be told of every page that somebody wanted back.
    :ivar limit: bytes the store may occupy.
    :ivar round: the number of the epoch; its parts have the same.
    """

    def __init__(self, ram: Ram) -> None:
        self.coldness = Coldness(ram.pages)
        self.limit = 0
        self.round = 0
        self._ram = ram
        self._buffer = PageBuffer(SLICE_PAGES)

    def choose(self, pfns: NDArray[np.int64]) -> Iterator[Choice]:
        """Which of ``pfns`` (ascending, shape ``(n,)``) are worth trying now; some after the other."""
        self.coldness.begin(time.monotonic(), self.round)
        # Whole regions, or they would be judged by a part.
        parts = np.searchsorted(pfns, np.arange(0, self._ram.pages + _CHOICE_PAGES, _CHOICE_PAGES))
        for start, stop in itertools.pairwise(parts.tolist()):
            if stop > start:
                yield self.coldness.choose(pfns[start:stop])

    def begin(self) -> None:
        """An epoch comes to its STABLE pages."""
        self._ram.store.begin(self.limit)

    def preserve(self, pfns: NDArray[np.int64]) -> Preserved:
        """Write the bytes of protected pages into the store; their ledger entries are to follow, then the punch.

        What is compressed is a copy that was read under write protection: a page that is still in the epoch has
        exactly these bytes.

        :param pfns: ascending, at most :data:`SLICE_PAGES`; shape ``(n,)``.
        :raise OSError: guest RAM could not be read.
        """
        self._ram.backing.read(runs_of_pfns(pfns), self._buffer.view)
        entries = np.zeros(len(pfns), dtype=np.uint64)
        for place in range(len(pfns)):
            try:
                entries[place] = self._ram.store.put(self._buffer.view[place << PAGE_SHIFT : (place + 1) << PAGE_SHIFT])
            except StoreFull as error:
                return Preserved(entries, str(error))
        return Preserved(entries, "")
