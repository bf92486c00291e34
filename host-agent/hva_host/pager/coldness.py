"""Which pages are cold: found by discarding samples and seeing what comes back. Arithmetic only.

The guest's flags do not tell which pages it uses, and write protection sees only writes; but a refault costs
microseconds, so coldness is measured (statistical sampling, as ESX did it). RAM is looked at in regions. Of each a
small random sample goes first, then more, then all, each step only if little of what went has come back; where much
has, the region is left alone for a while and begins anew, for longer each time it is found hot again. A page that came
back is left alone for a while in any case.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from hvaqemu.pages import Run

#: Pages to a region.
REGION = 512
#: Pages chosen from at a time.
PART_PAGES = 64 * REGION
#: Shares of a region's candidates that go in one epoch, from step to step, where not said otherwise.
SHARES = (1 / 16, 1 / 4, 1.0)
#: A region is hot if more than this share of what went came back; of a quarter of it where nothing went since. Not
#: less: a refault is cheap, what came back rests by itself, and each region has something that is used.
HOT = 1 / 2
#: How long a sample is watched at least, and a page or region that is hot is left alone, in seconds.
WATCHED_SECONDS = 0.4
REST_SECONDS = 60.0
#: How fast a region's share of used pages is forgotten for a newer one.
_NEWER = 0.5

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
    :param hot: the share :data:`HOT`.
    :param rest_most: seconds a region that is found hot again and again rests at most.
    :param shares: what :data:`SHARES` says.
    """

    def __init__(
        self,
        pages: int,
        seed: int | None = None,
        *,
        hot: float = HOT,
        rest_most: float = REST_SECONDS,
        shares: tuple[float, ...] = SHARES,
    ) -> None:
        regions = -(-pages // REGION)
        self._random = default_rng(seed)
        self._hot = hot
        self._rest_most = rest_most
        self._shares = np.array(shares, dtype=np.float32)
        self._page_rest = np.zeros(pages, dtype=np.uint8)
        #: Until when each region rests, and for how long it did last.
        self._rests_until = np.zeros(regions)
        self._rested = np.zeros(regions)
        #: Pages of each region that samples were drawn from, and the share that came back; NaN: not known.
        self._offered = np.zeros(regions, dtype=np.int32)
        self._used = np.full(regions, np.nan)
        #: How many of each have gone since its first sample, and how many there were to choose from lately.
        self._tried = np.zeros(regions, dtype=np.int64)
        self._there = np.zeros(regions, dtype=np.int64)
        self._step = np.zeros(regions, dtype=np.uint8)
        self._out = np.zeros(regions, dtype=np.int32)
        self._back = np.zeros(regions, dtype=np.int32)
        #: When each region was last asked for pages; NaN: not since it was judged.
        self._asked = np.full(regions, np.nan)
        #: And in which epoch.
        self._asked_in = np.full(regions, -1, dtype=np.int64)
        self._epoch = -1
        self._now = self._ticked = 0.0

    def went(self, pfns: NDArray[np.int64], *, chosen: bool = True) -> None:
        """These were paged out; shape ``(n,)``.

        :param chosen: as samples had it; what others had discarded comes back for reasons of its own.
        """
        went = np.bincount(pfns // REGION, minlength=len(self._out)).astype(np.int32)
        self._tried += went
        if chosen:
            self._out += went

    def came_back(self, pfn: int) -> None:
        """Somebody wanted this one."""
        self._back[pfn // REGION] += 1
        self._page_rest[pfn] = _REST_TICKS

    @property
    def cold(self) -> int:
        """Pages that have not gone and are not in use, as far as samples of their regions tell.

        What has gone and come back is not among them, whether it was wanted or came with what was: not before it has
        been tried anew.
        """
        known = ~np.isnan(self._used)
        left = np.minimum(np.maximum(0, self._offered[known] - self._tried[known]), self._there[known])
        return int((left * (1.0 - np.minimum(self._used[known], 1.0))).sum())

    def stayed(self, pfns: NDArray[np.int64]) -> None:
        """These were tried and could not go (shape ``(n,)``): others come first for a while."""
        self._page_rest[pfns] = _REST_TICKS

    def there(self, pfns: NDArray[np.int64], part: Run) -> None:
        """All candidates there are in a part of RAM, resting ones too; shape ``(n,)``."""
        first, stop = part.start // REGION, -(-part.stop // REGION)
        self._there[first:stop] = np.bincount(pfns // REGION - first, minlength=stop - first)

    def begin(self, now: float, number: int) -> None:
        """Candidates are about to be chosen from.

        :param now: seconds, of a clock that only goes forward.
        :param number: of the epoch. Its parts have the same, so that each may take its share of a region they cut.
        """
        self._now, self._epoch = now, number
        self._rest(now)
        self._judge(now)

    def parts(self, pfns: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """``pfns`` (ascending) in parts of whole regions, each chosen from in about a millisecond.

        In any order: where few may go, it is not to be always the first ones' turn.
        """
        bounds = np.searchsorted(pfns, np.arange(0, len(self._page_rest) + PART_PAGES, PART_PAGES))
        parts = [(start, stop) for start, stop in itertools.pairwise(bounds.tolist()) if stop > start]
        for place in self._random.permutation(len(parts)).tolist():
            start, stop = parts[place]
            yield pfns[start:stop]

    def choose(self, pfns: NDArray[np.int64], most: int | None = None) -> Choice:
        """Which of the candidates ``pfns`` to discard now.

        :param pfns: ascending; shape ``(n,)``.
        :param most: of them, and what else the region holds that the last one is of; None: any number.
        """
        rested = pfns[(self._page_rest[pfns] == 0) & (self._rests_until <= self._now)[pfns // REGION]]
        resting = len(pfns) - len(rested)
        ready = rested[(np.isnan(self._asked) | (self._asked_in == self._epoch))[rested // REGION]]
        if not len(ready):
            return Choice(ready, len(rested), resting)
        regions = ready // REGION
        first = np.flatnonzero(np.diff(regions, prepend=-1))
        lots = self._random.random(len(ready), dtype=np.float32)
        # At least one of each region, or a region with few candidates would be judged by nothing.
        least = np.repeat(np.minimum.reduceat(lots, first), np.diff(np.append(first, len(ready))))
        share = self._shares[self._step[regions]]
        chosen = (lots < share) | (lots == least)
        asked = regions[first]
        if most is not None:
            # Whole regions, or they would be judged by a part of their sample; which ones is drawn, or what can not go
            # of the first would keep the others from ever being asked.
            turn = self._random.permutation(len(asked))
            sizes = np.add.reduceat(chosen, first, dtype=np.int64)[turn]
            asked = np.sort(asked[turn[np.cumsum(sizes) - sizes < most]])
            chosen &= np.isin(regions, asked)
        begun = asked[self._step[asked] == 0]
        self._offered[begun] = np.bincount(regions, minlength=len(self._offered))[begun]
        self._tried[begun] = 0
        self._asked[asked] = self._now
        self._asked_in[asked] = self._epoch
        return Choice(ready[chosen], len(rested) - int(np.count_nonzero(chosen)), resting)

    def some(self, pfns: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """At most ``most`` of ``pfns``, whatever samples say; both ascending, of shape ``(n,)``.

        By whole regions as far as they go, those that do not rest first, and else in no order that could be told.
        """
        regions = pfns // REGION
        first = np.flatnonzero(np.diff(regions, prepend=-1))
        lots = self._random.random(len(first)) + (self._rests_until[regions[first]] > self._now)
        counts = np.diff(np.append(first, len(pfns)))
        # Page by page in the order of the regions' lots, and in that of pfns within each; what rests by itself last.
        order = np.argsort(np.repeat(lots, counts) + 2.0 * (self._page_rest[pfns] > 0), kind="stable")
        return np.sort(pfns[order[:most]])

    def _rest(self, now: float) -> None:
        ticks = int((now - self._ticked) / _TICK)
        if ticks <= 0:
            return
        self._ticked += ticks * _TICK
        self._page_rest -= np.minimum(self._page_rest, np.uint8(min(ticks, 255)))

    def _judge(self, now: float) -> None:
        """Step up regions that stayed cold, and give the hot ones their rest."""
        others = self._asked_in != self._epoch
        watched = others & (np.nan_to_num(now - self._asked, nan=-1.0) >= WATCHED_SECONDS)
        looked = watched | (np.isnan(self._asked) & (self._back > 0))
        base = np.where(self._out > 0, self._out, REGION // 4)
        hot = looked & (self._back > self._hot * base)
        cold = watched & ~hot
        self._step[hot] = 0
        self._rested[hot] = np.clip(2 * self._rested[hot], REST_SECONDS, self._rest_most)
        self._rests_until[hot] = now + self._rested[hot]
        self._rested[cold] = 0
        self._step[cold] = np.minimum(self._step[cold] + 1, len(self._shares) - 1)
        self._learn(looked & (self._out > 0))
        # Wanted back long after it went: how much of it is used is to be found out anew.
        self._used[hot & (self._out == 0)] = np.nan
        done = hot | cold
        self._asked[done] = np.nan
        self._out[done] = 0
        self._back[done] = 0

    def _learn(self, judged: NDArray[np.bool_]) -> None:
        share = self._back[judged] / self._out[judged]
        known = self._used[judged]
        self._used[judged] = np.where(np.isnan(known), share, known + _NEWER * (share - known))
