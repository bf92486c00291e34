"""How much of a VM's RAM one transaction takes, so that pages stay protected for a bounded time. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hva_host.pager.membership import Member
from hvaqemu.pages import Run

#: What a page costs, in the time the guest takes to scan one twice: comparing a member takes about three times as long.
_MEMBER = 3
#: Of the time pages may stay protected, what a slice is meant to take: a guest that begins to work is three times as
#: slow, and that is to be less than half of it.
_AIM = 0.15
#: Cost of the first slice (512 MiB full of members), and of the smallest and largest: a scan takes some milliseconds
#: however short it is, and a slice's members are sent to the pager in one message.
_FIRST = 1 << 19
_LEAST = 1 << 14
_MOST = 1 << 23
#: How much one slice's time changes the size of the next. Slowly up, because the next part of RAM may hold more that
#: takes long: where free pages end and page cache begins, for one.
_SHRINK, _GROW = 0.25, 1.25


class Slices:
    """The slices of one VM's epochs; their size is learned from how long pages stayed protected.

    :param limit: how long pages may stay protected, in seconds.
    :ivar again: the slice at hand took too long, and comes again in parts.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._size = _FIRST
        self._cost = 0
        self.again = False

    def over(self, wanted: NDArray[np.uint8]) -> Iterator[Run]:
        """The slices of an epoch; :meth:`took` is to be called for each before the next is asked for.

        Parts without members are left out. A slice that took too long is cut smaller and comes again: what it got done
        is passed over by the pager.

        :param wanted: uint8 ``Member`` values, shape ``(pages,)``.
        """
        members = np.flatnonzero(wanted != Member.OUT)
        costs = members + _MEMBER * np.arange(1, len(members) + 1)
        position = 0
        while position < len(members):
            before = int(costs[position]) - _MEMBER
            behind = max(int(np.searchsorted(costs, before + self._size, side="right")), position + 1)
            start, stop = int(members[position]), int(members[behind - 1]) + 1
            self._cost, self.again = int(costs[behind - 1]) - before, False
            yield Run(start, stop - start)
            position = position if self.again else behind

    def took(self, seconds: float) -> None:
        """In the slice at hand, pages stayed protected for so long."""
        factor = min(max(self._limit * _AIM / max(seconds, 1e-9), _SHRINK), _GROW)
        right = min(max(int(self._cost * factor), _LEAST), _MOST)
        self.again = seconds >= self._limit and right < self._cost
        # A short one that was fast says little of how long a full one would take.
        self._size = right if factor < 1 else max(self._size, right)
