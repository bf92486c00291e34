"""Epochs that take little at a time, and what is least missed: what policy asks for unless it must. Arithmetic only.

Of content, samples of each region go first (:mod:`hva_host.pager.sampling`); of free pages only those that have been
free for a while, because the guest's kernel hands out first what was freed last.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hvaqemu.pages import STATE_MASK, PageState

#: Seconds a page must have been free.
FREE_SECONDS = 10.0


class Step(NamedTuple):
    """At most so many pages, and what else the region of 2 MiB holds that the last one is of.

    ``sampled``: copies go by samples, and free pages after :data:`FREE_SECONDS`; else whatever the guest said last.
    """

    pages: int
    sampled: bool = True

    def after(self, pages: int) -> Self | None:
        """What of it is left after ``pages``; None: nothing."""
        left = self.pages - pages
        return self._replace(pages=left) if left > 0 else None


class FreePages:
    """Which pages every report has called free, for how long."""

    def __init__(self, pages: int) -> None:
        #: Free in all reports since :attr:`_since`; those also since a later moment are kept to follow them.
        self._free = np.zeros(pages, dtype=np.bool_)
        self._since = math.inf
        self._next = np.zeros(pages, dtype=np.bool_)
        self._next_since = -math.inf

    def reported(self, classes: NDArray[np.uint8], now: float) -> None:
        """A report came.

        :param classes: page states, shape ``(pages,)``.
        :param now: seconds, of a clock that only goes forward.
        """
        free = classes & STATE_MASK == PageState.UNUSED
        self._free &= free
        self._next &= free
        if now - self._next_since >= FREE_SECONDS:
            self._free, self._since = self._next, self._next_since
            self._next, self._next_since = free, now

    def long_free(self, now: float) -> NDArray[np.bool_]:
        """Pages that have been free for :data:`FREE_SECONDS` as far as reports tell; shape ``(pages,)``."""
        if now - self._since < FREE_SECONDS:
            return np.zeros(len(self._free), dtype=np.bool_)
        return self._free
