"""What an epoch tries: STABLE pages as far as samples show them cold, copies all or by samples, and how many in all."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.ledger import entry_kinds
from hva_host.pager.coldness import Choice, Coldness
from hvaqemu.pages import Residence, Run

#: Copies are taken by samples where the guest is to notice nothing, so a region is hot as soon as one of a first sample
#: of 8 has come back, or two of the next one of 32; and one that always is, is asked once an hour. What the samples of
#: a guest's used regions cost is most of what the refault budget goes for: larger first ones are that much slower.
COPIES_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)
COPIES_HOT = 1 / 24
COPIES_REST_SECONDS = 3600.0


class Samples:
    """What samples have told of one VM's pages: of STABLE ones, and of copies.

    They are kept apart: copies that an operator has had discarded at once come back for reasons of their own.
    """

    def __init__(self, pages: int) -> None:
        self.stable = Coldness(pages)
        self.copies = Coldness(pages, hot=COPIES_HOT, rest_most=COPIES_REST_SECONDS, shares=COPIES_SHARES)

    def came_back(self, pfn: int, kind: int) -> None:
        """Somebody touched a discarded page; its neighbours, which come with it, do not count.

        :param kind: the :class:`Residence` it had.
        """
        if kind == Residence.PRESERVED:
            self.stable.came_back(pfn)
        elif kind == Residence.LAYER:
            self.copies.came_back(pfn)


class Sampling:
    """What one epoch may take.

    :param number: of the epoch; its parts have the same.
    :param copies: copies too go by samples; else each copy is tried.
    :param most: pages that may be chosen, and what else the region holds that the last one is of; None: any number.
    """

    def __init__(self, samples: Samples, number: int, *, copies: bool = False, most: int | None = None) -> None:
        self._samples = samples
        self._number = number
        self._copies = copies
        self._left = most

    def stable(self, pfns: NDArray[np.int64]) -> Iterator[Choice]:
        """Which of these STABLE pages (ascending, shape ``(n,)``) to try; some after the other."""
        return self._choose(self._samples.stable, pfns)

    def copies(self, pfns: NDArray[np.int64]) -> Iterator[Choice] | None:
        """The same of copies; None: all of them."""
        if self._copies:
            return self._choose(self._samples.copies, pfns)
        return None if self._left is None else self._some_copies(pfns)

    def _some_copies(self, pfns: NDArray[np.int64]) -> Iterator[Choice]:
        assert self._left is not None
        # Rests end by the clock.
        self._samples.copies.begin(time.monotonic(), self._number)
        chosen = self._samples.copies.some(pfns, self._left)
        self._left -= len(chosen)
        yield Choice(chosen, len(pfns) - len(chosen), 0)

    @property
    def by_samples(self) -> bool:
        """Do copies go by samples?"""
        return self._copies

    @property
    def bounded(self) -> bool:
        """Is there a limit to what may be chosen?"""
        return self._left is not None

    def first(self, pfns: NDArray[np.int64]) -> NDArray[np.int64]:
        """As many of these as may still be chosen: free pages, before what has content; zeros, after that."""
        if self._left is None:
            return pfns
        chosen = pfns[: self._left]
        self._left -= len(chosen)
        return chosen

    @property
    def full(self) -> bool:
        """May no more be chosen?"""
        return self._left == 0

    def there(self, copies: NDArray[np.int64], stable: NDArray[np.int64], part: Run) -> None:
        """Of all pages present in a part of RAM, those that may be copies, and what else is STABLE."""
        self._samples.copies.there(copies, part)
        self._samples.stable.there(stable, part)

    def stayed(self, pfns: NDArray[np.int64]) -> None:
        """These were tried, and are no copies, or can not be stored; shape ``(n,)``."""
        if self._left is not None:
            self._samples.copies.stayed(pfns)
            self._samples.stable.stayed(pfns)

    def went(self, pfns: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        """These were discarded, with these ledger entries; both of shape ``(n,)``."""
        kinds = entry_kinds(entries)
        self._samples.stable.went(pfns[kinds == Residence.PRESERVED])
        self._samples.copies.went(pfns[kinds == Residence.LAYER], chosen=self._copies)

    def _choose(self, coldness: Coldness, pfns: NDArray[np.int64]) -> Iterator[Choice]:
        coldness.begin(time.monotonic(), self._number)
        for part in coldness.parts(pfns):
            choice = coldness.choose(part, self._left)
            if self._left is not None:
                self._left = max(0, self._left - len(choice.pfns))
            yield choice
