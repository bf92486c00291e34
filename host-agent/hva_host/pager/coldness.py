"""Which STABLE pages are cold: found by paging out samples and seeing what comes back. Arithmetic only.

The guest's flags do not tell which pages it uses, and write protection sees only writes; but a refault costs
microseconds, so coldness is measured (statistical sampling, as ESX did it). RAM is looked at in regions. Of each a
small random sample goes first, then more, then all, each step only if little of what went has come back; where much
has, the region is left alone for a while and begins anew. A page that came back is left alone for a while in any case.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

#: Pages to a region.
REGION = 512
#: Shares of a region's candidates that go in one epoch, from step to step.
SHARES = (1 / 16, 1 / 4, 1.0)
#: A region is hot if more than this share of what went came back; of a quarter of it where nothing went since. Not
#: less: a refault is cheap, what came back rests by itself, and each region has something that is used.
HOT = 1 / 2
#: How long a sample is watched at least, and a page or region that is hot is left alone, in seconds.
WATCHED_SECONDS = 0.4
REST_SECONDS = 60.0

#: Rests are kept in one byte a page.
_TICK = 0.5
_REST_TICKS = int(REST_SECONDS / _TICK)


class Choice(NamedTuple):
    """What to page out now: ``pfns``, ascending; and how many candidates will go ``later`` or are ``resting``."""

    pfns: NDArray[np.int64]
    later: int
    resting: int


class Coldness:
    """What has been seen of one VM's pages.

    :param pages: of guest RAM.
    :param seed: of the samples; None: nobody knows them.
    """

    def __init__(self, pages: int, seed: int | None = None) -> None:
        regions = -(-pages // REGION)
        self._random = default_rng(seed)
        self._page_rest = np.zeros(pages, dtype=np.uint8)
        self._region_rest = np.zeros(regions, dtype=np.uint8)
        self._step = np.zeros(regions, dtype=np.uint8)
        self._out = np.zeros(regions, dtype=np.int32)
        self._back = np.zeros(regions, dtype=np.int32)
        #: When each region was last asked for pages; NaN: not since it was judged.
        self._asked = np.full(regions, np.nan)
        #: And in which epoch.
        self._asked_in = np.full(regions, -1, dtype=np.int64)
        self._epoch = -1
        self._now = self._ticked = 0.0

    def went(self, pfns: NDArray[np.int64]) -> None:
        """These were paged out; shape ``(n,)``."""
        self._out += np.bincount(pfns // REGION, minlength=len(self._out)).astype(np.int32)

    def came_back(self, pfn: int) -> None:
        """Somebody wanted this one."""
        self._back[pfn // REGION] += 1
        self._page_rest[pfn] = _REST_TICKS

    def begin(self, now: float, number: int) -> None:
        """Candidates are about to be chosen from.

        :param now: seconds, of a clock that only goes forward.
        :param number: of the epoch. Its parts have the same, so that each may take its share of a region they cut.
        """
        self._now, self._epoch = now, number
        self._rest(now)
        self._judge(now)

    def choose(self, pfns: NDArray[np.int64]) -> Choice:
        """Which of the candidates ``pfns`` to page out now.

        :param pfns: ascending; shape ``(n,)``.
        """
        rested = pfns[(self._page_rest[pfns] == 0) & (self._region_rest[pfns // REGION] == 0)]
        resting = len(pfns) - len(rested)
        ready = rested[(np.isnan(self._asked) | (self._asked_in == self._epoch))[rested // REGION]]
        if not len(ready):
            return Choice(ready, len(rested), resting)
        regions = ready // REGION
        first = np.flatnonzero(np.diff(regions, prepend=-1))
        lots = self._random.random(len(ready), dtype=np.float32)
        # At least one of each region, or a region with few candidates would be judged by nothing.
        least = np.repeat(np.minimum.reduceat(lots, first), np.diff(np.append(first, len(ready))))
        share = np.array(SHARES, dtype=np.float32)[self._step[regions]]
        chosen = ready[(lots < share) | (lots == least)]
        self._asked[regions[first]] = self._now
        self._asked_in[regions[first]] = self._epoch
        return Choice(chosen, len(rested) - len(chosen), resting)

    def _rest(self, now: float) -> None:
        ticks = int((now - self._ticked) / _TICK)
        if ticks <= 0:
            return
        self._ticked += ticks * _TICK
        for rest in (self._page_rest, self._region_rest):
            rest -= np.minimum(rest, np.uint8(min(ticks, 255)))

    def _judge(self, now: float) -> None:
        """Step up regions that stayed cold, and give the hot ones their rest."""
        others = self._asked_in != self._epoch
        watched = others & (np.nan_to_num(now - self._asked, nan=-1.0) >= WATCHED_SECONDS)
        looked = watched | (np.isnan(self._asked) & (self._back > 0))
        base = np.where(self._out > 0, self._out, REGION // 4)
        hot = looked & (self._back > HOT * base)
        cold = watched & ~hot
        self._step[hot] = 0
        self._region_rest[hot] = _REST_TICKS
        self._step[cold] = np.minimum(self._step[cold] + 1, len(SHARES) - 1)
        done = hot | cold
        self._asked[done] = np.nan
        self._out[done] = 0
        self._back[done] = 0
