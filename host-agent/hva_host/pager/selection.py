"""Which of the pages an epoch was asked for become its candidates, before any is protected.

Nothing that is chosen here is taken for granted later: to leave a page out costs memory, to leave it in costs time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.runs import chunks_of
from hva_host.pager.coldness import Choice
from hva_host.pager.membership import Member, Membership
from hva_host.pager.prove import Prover
from hva_host.pager.ram import Ram
from hva_host.pager.sampling import Sampling

_LOOK_PAGES = 8192
_CONTENT = (Member.COPY, Member.STABLE, Member.COPY_OR_STABLE)


class Selection:
    """Of one epoch.

    :param members: what was asked for; becomes what is tried.
    :param sampling: which pages are tried; None: every free one and every copy, and no other.
    :param counts: pages that are left for ``later``, and that are ``resting``, are added to those.
    :param pages_out: whether STABLE pages can go at all; otherwise those are only looked through for zeros.
    """

    def __init__(
        self,
        ram: Ram,
        prover: Prover,
        members: Membership,
        sampling: Sampling | None,
        counts: dict[str, int],
        *,
        pages_out: bool,
    ) -> None:
        self._ram = ram
        self._prover = prover
        self._members = members
        self._sampling = sampling
        self._counts = counts
        self._pages_out = pages_out

    def steps(self) -> Iterator[None]:
        """Choose, in slices of about a millisecond; iterate until it ends."""
        if self._sampling is not None and self._sampling.bounded:
            yield from self._free(self._sampling)
            yield from self._present()
        if self._sampling is not None and self._sampling.by_samples:
            yield from self._cold(self._sampling)
        else:
            yield from self._stable()
            yield from self._copies()
        yield from self._sift()

    def _free(self, sampling: Sampling) -> Iterator[None]:
        """As many as may go of those that are there: a guest's kernel has free pages it never touched."""
        free = self._members.of(Member.UNUSED)
        self._members.set(free, Member.OUT)
        for chunk in chunks_of(free, _LOOK_PAGES):
            here = chunk[self._is_there(chunk)]
            chosen = sampling.first(here)
            self._members.set(chosen, Member.UNUSED)
            self._counts["later"] += len(here) - len(chosen)
            yield

    def _present(self) -> Iterator[None]:
        """Leave out what is not there: where few may go, it would be taken for some that did."""
        for chunk in chunks_of(self._members.of(*_CONTENT), _LOOK_PAGES):
            self._members.set(chunk[~self._is_there(chunk)], Member.OUT)
            yield

    def _is_there(self, pfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        first, last = int(pfns[0]), int(pfns[-1])
        there: NDArray[np.bool_] = self._ram.backing.presence(first, last + 1)[pfns - first]
        return there

    def _cold(self, sampling: Sampling) -> Iterator[None]:
        """What samples show to be cold: copies first, which cost no more than a read, then what has to be stored."""
        stable = self._members.of(Member.STABLE, Member.COPY_OR_STABLE)
        either = self._members.of(Member.COPY_OR_STABLE)
        copies = self._members.of(Member.COPY, Member.COPY_OR_STABLE)
        only_stable = self._members.of(Member.STABLE)
        self._members.set(only_stable, Member.SIFT)
        self._members.set(copies, Member.OUT)
        sampling.there(copies, only_stable, self._members.part)
        yield from self._take(sampling.copies(copies) or iter(()), Member.COPY)
        if self._pages_out and len(stable):
            # What is tried as a copy now is stored another time, if it is none.
            chosen = self._members.still(either, Member.COPY)
            yield from self._take(sampling.stable(np.setdiff1d(stable, chosen, assume_unique=True)), Member.STABLE)

    def _stable(self) -> Iterator[None]:
        """Leave in what is worth paging out now; the rest is what it would be if nobody had asked for STABLE."""
        stable, either = self._members.of(Member.STABLE), self._members.of(Member.COPY_OR_STABLE)
        self._members.set(stable, Member.SIFT)
        self._members.set(either, Member.COPY)
        if self._pages_out and self._sampling is not None and len(stable) + len(either):
            yield from self._take(self._sampling.stable(np.sort(np.concatenate([stable, either]))), Member.STABLE)

    def _copies(self) -> Iterator[None]:
        copies = self._members.of(Member.COPY)
        choices = self._sampling.copies(copies) if self._sampling is not None else None
        if choices is not None:
            self._members.set(copies, Member.OUT)
            yield from self._take(choices, Member.COPY)

    def _take(self, choices: Iterator[Choice], member: Member) -> Iterator[None]:
        for choice in choices:
            self._members.set(choice.pfns, member)
            self._count(choice)
            yield

    def _count(self, choice: Choice) -> None:
        self._counts["later"] += choice.later
        self._counts["resting"] += choice.resting

    def _sift(self) -> Iterator[None]:
        """Of other STABLE pages, those that begin like zeros may be copies of them."""
        pfns = self._members.of(Member.SIFT)
        self._members.set(pfns, Member.OUT)
        if self._sampling is not None and self._sampling.full:
            return
        for chunk in chunks_of(pfns, self._prover.pages):
            zeros = chunk[self._prover.look_zero(chunk)]
            self._members.set(zeros if self._sampling is None else self._sampling.first(zeros), Member.COPY)
            yield
