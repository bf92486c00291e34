"""What an epoch has each page of a part of RAM for. Arithmetic only."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.runs import runs_of
from hvaqemu.pages import Run


class Member(enum.IntEnum):
    """What an epoch has a page for; one byte a page."""

    OUT = 0
    #: Discard if its bytes are zeros or in a layer.
    COPY = 1
    #: Discard if the guest confirms it free. A LAYER page becomes ZERO.
    UNUSED = 2
    #: Not worth protecting unless a look without protection finds all zeros: then a COPY.
    SIFT = 3
    #: Discard if its bytes are zeros or in a layer, else page out; SIFT where it is not known to be cold.
    STABLE = 4
    #: The same; COPY where it is not known to be cold.
    COPY_OR_STABLE = 5
    #: A STABLE page that is no copy. An epoch's own finding: nobody asks for it.
    NO_COPY = 6


#: Added to a :class:`Member`: the guest says that it is a page of its swap cache. Counted, and nothing else.
SWAP_CACHE = 0x80


class Membership:
    """The members of one epoch.

    :param wanted: uint8 :class:`Member` values of pfns from ``first`` on, shape ``(n,)``.
    :ivar pages: how many pages it was begun over.
    """

    def __init__(self, wanted: NDArray[np.uint8], first: int) -> None:
        self.pages = len(wanted)
        self._first = first
        #: By pfn - first.
        self._members = wanted

    @property
    def part(self) -> Run:
        """The part of RAM."""
        return Run(self._first, self.pages)

    def of(self, *members: Member) -> NDArray[np.int64]:
        """The pfns that are in for one of these; ascending."""
        return np.flatnonzero(_is_one_of(self._members, members)) + self._first

    def still(self, pfns: NDArray[np.int64], *members: Member) -> NDArray[np.int64]:
        """Those of ``pfns`` that are in for one of these."""
        found: NDArray[np.int64] = pfns[_is_one_of(self._members[pfns - self._first], members)]
        return found

    def has(self, member: Member) -> bool:
        """Is any page in for this?"""
        return bool(np.any(self._members == member))

    def chosen(self, which: NDArray[np.bool_], member: Member) -> NDArray[np.int64]:
        """The pfns that are in for this and True in ``which``, shape ``(n,)``."""
        return np.flatnonzero(which & (self._members == member)) + self._first

    def runs(self) -> list[Run]:
        """The runs of pages that are in."""
        return [Run(self._first + run.start, run.pages) for run in runs_of(self._members != Member.OUT)]

    def count(self) -> int:
        """How many pages are in."""
        return int(np.count_nonzero(self._members))

    def set(self, pfns: NDArray[np.int64], member: Member) -> None:
        """From now on ``pfns`` are in for this."""
        self._members[pfns - self._first] = member

    def take_out(self, start: int, stop: int) -> int:
        """Take pfns ``[start, stop)`` out, of which some may lie outside the part; how many were in."""
        part = self._members[max(start - self._first, 0) : max(stop - self._first, 0)]
        taken = int(np.count_nonzero(part))
        part[:] = Member.OUT
        return taken

    def clear(self) -> None:
        """Take all out."""
        self._members[:] = Member.OUT


def _is_one_of(found: NDArray[np.uint8], members: Sequence[Member]) -> NDArray[np.bool_]:
    return np.asarray(np.logical_or.reduce([found == member for member in members]), dtype=np.bool_)
