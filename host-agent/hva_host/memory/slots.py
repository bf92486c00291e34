"""Which parts of the compressed store are in use: arithmetic on granules, no I/O.

A *granule* is 64 bytes, a *slot* a run of granules that holds one page's bytes, for one or more pages of equal content.
Use counts are derived from the ledger at attach (:meth:`Slots.derive`), never stored. Whoever wrote the ledger may be a
compromised QEMU, so slots may overlap or lie anywhere: then bytes get lost, which their checksum finds, no more.
"""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.runs import runs_of
from hvaqemu.pages import PAGE_SIZE, Run

GRANULE = 64
#: Granules to a page of the store.
PER_PAGE = PAGE_SIZE // GRANULE
#: The longest slot: a page that needs more is not worth its decompression.
GRANULES_MAX = PER_PAGE - 1

#: Values of a granule: free, the first of a slot with so many uses, or a later one of a slot.
_FREE, _LATER = 0, 255
#: A slot that reached this many uses is shared no more.
USES_MAX = 253
#: Found in a damaged ledger: more uses than can be counted, so it is never free.
_COUNTLESS = 254

_WINDOW = 1 << 16
_SLICE = 8192
_KEPT_HOLES = 4096


class StoreFull(Exception):
    """The store has no room: its limit, or the host's."""


class Slots:
    """The slots of one store.

    :param pages: of guest RAM; the store is never longer.
    """

    def __init__(self, pages: int) -> None:
        self.capacity = pages * PER_PAGE
        # Not numpy's own: it asks for huge pages, and a pager that uses a little must not have two megabytes for it.
        self._map = mmap.mmap(-1, self.capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._uses: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._words = memoryview(self._map)
        self.rewind(0)

    def rewind(self, limit: int) -> None:
        """Look for holes from the beginning again. A search goes forward only, so that filling a store is linear.

        :param limit: granules the store may have from now on.
        """
        self._limit = min(limit, self.capacity)
        self._position = 0
        self._holes: list[Run] = []
        #: Holes too short for what was asked for when they were found, by length; and which lengths there are.
        self._short: list[list[int]] = [[] for _ in range(GRANULES_MAX + 1)]
        self._lengths = 0

    def derive(self, places: NDArray[np.int64], granules: NDArray[np.int64]) -> None:
        """Count a use for each slot that the ledger names (shapes ``(n,)``); impossible ones are skipped."""
        for start in range(0, len(places), _SLICE):
            some = slice(start, start + _SLICE)
            possible = (granules[some] > 0) & (places[some] + granules[some] <= self.capacity)
            self._derive(places[some][possible], granules[some][possible])

    def _derive(self, places: NDArray[np.int64], granules: NDArray[np.int64]) -> None:
        places, first, counts = np.unique(places, return_index=True, return_counts=True)
        granules = granules[first]
        before = self._uses[places].astype(np.int64)
        after = np.where(before + counts > USES_MAX, _COUNTLESS, before + counts)
        later = granules - 1
        offsets = np.arange(int(later.sum())) - np.repeat(np.cumsum(later) - later, later)
        self._uses[np.repeat(places + 1, later) + offsets] = _LATER
        self._uses[places] = after

    def allocate(self, granules: int) -> int:
        """A slot with one use; its place.

        :raise StoreFull: there is no hole that long.
        """
        place = self._hole(granules)
        self._uses[place : place + granules] = _LATER
        self._words[place] = 1
        return place

    def share(self, place: int) -> bool:
        """Count a further use of a slot; False: it can not have more."""
        if place >= self.capacity or not 0 < self._words[place] < USES_MAX:
            return False
        self._words[place] += 1
        return True

    def pin(self, place: int) -> bool:
        """Count a further use of a slot, which :meth:`free` takes back, however many it has; False: there is none."""
        if place >= self.capacity or not 0 < self._words[place] <= _COUNTLESS:
            return False
        # One that can not be counted stays as it is, until the next pager counts anew.
        self._words[place] = min(self._words[place] + 1, _COUNTLESS)
        return True

    def free(self, place: int, granules: int) -> bool:
        """Count a use less; was it the last? A slot that nobody counted is left as it is."""
        if granules == 0 or place + granules > self.capacity:
            return False
        uses = self._words[place]
        if not 0 < uses <= USES_MAX:
            return False
        if uses > 1:
            self._words[place] = uses - 1
            return False
        self._uses[place : place + granules] = _FREE
        return True

    def empty_pages(self, start: int, stop: int) -> list[Run]:
        """The runs of pages of the store, from ``start`` to ``stop``, in which no granule is in use."""
        stop = min(stop, self.capacity // PER_PAGE)
        if start >= stop:
            return []
        granules = self._uses[start * PER_PAGE : stop * PER_PAGE].view(np.uint64).reshape(stop - start, PER_PAGE // 8)
        return runs_of(np.asarray(~granules.any(axis=1)), start)

    def _hole(self, granules: int) -> int:
        fitting = self._lengths >> granules << granules
        if fitting:
            length = (fitting & -fitting).bit_length() - 1
            place = self._short[length].pop()
            if not self._short[length]:
                self._lengths &= ~(1 << length)
            self._keep(place + granules, length - granules)
            return place
        while True:
            while self._holes:
                hole = self._holes.pop()
                if hole.pages >= granules:
                    if hole.pages > granules:
                        self._holes.append(Run(hole.start + granules, hole.pages - granules))
                    return hole.start
                self._keep(hole.start, hole.pages)
            if self._position >= self._limit:
                raise StoreFull("the store has reached its limit")
            stop = min(self._position + _WINDOW, self._limit)
            self._holes = runs_of(self._uses[self._position : stop] == _FREE, self._position)[::-1]
            self._position = stop

    def _keep(self, place: int, length: int) -> None:
        if length and len(self._short[length]) < _KEPT_HOLES:
            self._short[length].append(place)
            self._lengths |= 1 << length
