"""The words of the domain: page size, page states, residences, runs of pages. Standard library only, Python >= 3.9.

A *page state* is the guest's view of one page, a *residence* the host's. A page frame number (pfn) counts pages of
guest RAM from guest physical address 0.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT


class PageState(enum.IntEnum):
    """What the guest says of a page; the low bits of a class-map byte."""

    STABLE = 0
    UNUSED = 1
    VOLATILE = 2
    POTENTIAL = 3


class PageAttribute(enum.IntFlag):
    """What else the guest says of a page; the high bits of a class-map byte."""

    NONE = 0
    REFERENCED = 1 << 4
    SWAPCACHE = 1 << 5


STATE_MASK = 0x0F


class Residence(enum.IntEnum):
    """Where a page's bytes are; the kind field of a ledger entry."""

    RESIDENT = 0
    ZERO = 1
    LAYER = 2
    PRESERVED = 3


class Run(NamedTuple):
    """``pages`` pages from ``start`` (a pfn) on; never empty."""

    start: int
    pages: int

    @property
    def stop(self) -> int:
        """The first pfn behind the run."""
        return self.start + self.pages
