"""Paging out what is no copy: the bytes of STABLE pages into the compressed store."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.runs import runs_of_pfns
from hva_host.memory.slots import StoreFull
from hva_host.pager.ram import PageBuffer, Ram
from hvaqemu.pages import PAGE_SHIFT

#: Pages written between two looks at faults: compressing one takes 10 to 20 µs.
SLICE_PAGES = 32


#: Pages compressed that the disk has not taken yet: some 2 MiB of memory.
BEHIND_MAX = 1024


class Preserved(NamedTuple):
    """Pages and their ledger entries, 0 where one stays (shapes ``(n,)``); why no more fit into the store, or ""."""

    pfns: NDArray[np.int64]
    entries: NDArray[np.uint64]
    full: str


class Preserver:
    """Preserves pages of one VM.

    A store that is a file takes its time (:mod:`hva_host.memory.medium`), so there are three steps: :meth:`compress`
    asks for bytes to be written, :meth:`written` tells of pages whose bytes were, and what is not wanted any more is
    forgotten by :meth:`drop`.

    :ivar limit: bytes the store may occupy.
    """

    def __init__(self, ram: Ram) -> None:
        self.limit = 0
        self._ram = ram
        self._buffer = PageBuffer(SLICE_PAGES)
        #: Oldest first, each with what the store had been asked for by then.
        self._under_way: deque[tuple[int, Preserved]] = deque()

    def begin(self) -> None:
        """An epoch comes to its STABLE pages."""
        self._ram.store.begin(self.limit)

    def compress(self, pfns: NDArray[np.int64]) -> None:
        """Begin to write the bytes of protected pages into the store.

        What is compressed is a copy that was read under write protection: a page that is still in the epoch has
        exactly these bytes.

        :param pfns: ascending, at most :data:`SLICE_PAGES`; shape ``(n,)``.
        :raise OSError: guest RAM could not be read.
        """
        self._ram.backing.read(runs_of_pfns(pfns), self._buffer.view)
        entries, full = np.zeros(len(pfns), dtype=np.uint64), ""
        for place in range(len(pfns)):
            try:
                entries[place] = self._ram.store.put(self._buffer.view[place << PAGE_SHIFT : (place + 1) << PAGE_SHIFT])
            except StoreFull as error:
                full = str(error)
                break
        self._under_way.append((self._ram.store.asked, Preserved(pfns, entries, full)))

    @property
    def under_way(self) -> int:
        """Pages compressed of which :meth:`written` has not told."""
        return sum(len(preserved.pfns) for _, preserved in self._under_way)

    def written(self) -> Iterator[Preserved]:
        """Pages whose bytes are in the store now: their ledger entries are to follow, then the punch."""
        while self._under_way:
            number, preserved = self._under_way[0]
            try:
                if not self._ram.store.written(number):
                    return
            except StoreFull as error:
                self._ram.store.free(preserved.entries)
                preserved = Preserved(preserved.pfns, np.zeros_like(preserved.entries), str(error))
            self._under_way.popleft()
            yield preserved

    def drop(self) -> None:
        """Page out nothing more of what is under way."""
        while self._under_way:
            self._ram.store.free(self._under_way.popleft()[1].entries)
