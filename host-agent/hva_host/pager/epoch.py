"""One epoch: propose, protect, prove, discard (the discard transaction).

The rules, and what in here keeps them:

* Nothing is discarded on a report. Copies are compared byte for byte while protected; UNUSED pages are confirmed free
  by two scans of the guest that began after protection, answering an identifier made after protection.
* STABLE pages go with the bytes that were read, under that same protection, for the store.
* Where a disk does direct I/O, bytes may still come past the protection until that was drained: nothing is compared
  before somebody said, answering an identifier made after protection, that it was (:meth:`Epoch.drained`).
* Only pages present after protecting are candidates: :meth:`hva_host.pager.protection.Protection.protect`.
* Any event on a page takes it out before it is answered: whoever answers calls :meth:`Epoch.leave` first. Whoever
  answers is the thread that runs :meth:`Epoch.steps`, which discards without giving way between looking at the
  membership and punching, so there is no moment between "still in" and "punched".
* The ledger entry is stored before the page is punched: :meth:`hva_host.pager.ram.Ram.discard`.
* Protection ends at the deadline whatever the guest does.

Beside it, discarded pages that the guest has freed become ZERO by the same two scans: :mod:`hva_host.pager.freed`.
"""

from __future__ import annotations

import enum
import math
import os
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.ledger import ZERO_ENTRY, Counter, preserved_of
from hva_host.memory.runs import chunks_of, runs_of_pfns
from hva_host.pager.freed import Freed
from hva_host.pager.membership import SWAP_CACHE, Member, Membership
from hva_host.pager.preserve import BEHIND_MAX, SLICE_PAGES, Preserved, Preserver
from hva_host.pager.protection import Protection
from hva_host.pager.prove import Prover
from hva_host.pager.ram import Ram
from hva_host.pager.sampling import Sampling
from hva_host.pager.selection import Selection
from hvaqemu.faultpoints import reach

IDENTIFIER_BYTES = 16
CONFIRM_ROUNDS = 2

_DISCARD_PAGES = 2048
_NOT_CACHED_PASSES = 3
_COUNTS = (
    *("candidates", "proven", "touched", "unmatched", "unconfirmed", "unpreserved"),
    *("discarded_zero", "discarded_layer", "discarded_store", "discarded_swap_cache", "freed", "later", "resting"),
)


class Phase(enum.StrEnum):
    """Where an epoch is."""

    SIFTING = "sifting"
    PROTECTING = "protecting"
    DRAINING = "draining"
    PROVING = "proving"
    PRESERVING = "preserving"
    CONFIRMING = "confirming"
    DISCARDING = "discarding"
    DONE = "done"


class Step(enum.Enum):
    """What an epoch that gave way is waiting for."""

    #: Nothing: call again once faults are answered.
    WORK = enum.auto()
    #: A confirmation, word that I/O was drained, or the deadline.
    CONFIRM = enum.auto()
    #: The disk.
    DISK = enum.auto()


class Epoch:
    """An epoch over a part of a VM's pages.

    :param wanted: uint8 :class:`Member` values, perhaps with :data:`SWAP_CACHE`, of pfns from ``first`` on, shape
        ``(n,)``; pages that are not RESIDENT are ignored.
    :param seconds: how long pages may stay protected.
    :param preserver: pages out what is STABLE; None: such pages are only compared.
    :param sampling: which pages are tried; None: every free one and every copy, and no other.
    :param drain: wait for :meth:`drained` before anything is compared.
    :ivar identifier: what confirmations must answer; empty until the pages are protected.
    """

    def __init__(
        self,
        ram: Ram,
        prover: Prover,
        wanted: NDArray[np.uint8],
        seconds: float,
        first: int = 0,
        preserver: Preserver | None = None,
        sampling: Sampling | None = None,
        *,
        drain: bool = False,
    ) -> None:
        """:raise ValueError: RAM has no such part."""
        if not 0 <= first < first + len(wanted) <= ram.pages:
            raise ValueError(f"classes of pages {first} to {first + len(wanted)} for {ram.pages} pages")
        ram.ledger.count(Counter.EPOCHS)
        self.number = int(ram.ledger.counters[Counter.EPOCHS])
        self.phase = Phase.SIFTING
        self._limit = seconds
        self._deadline = math.inf
        self.identifier = b""
        self.note = ""
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.seconds = dict.fromkeys(("protect", "prove", "preserve", "confirm", "discard"), 0.0)
        #: For how long pages were protected.
        self.protected_seconds = 0.0
        self.resident_before = ram.backing.used_bytes() >> 12
        self._ram = ram
        self._prover = prover
        self._preserver = preserver
        self._sampling = sampling
        self._draining = drain
        self._freed = Freed(ram, wanted == Member.UNUSED, first)
        self._first = first
        #: By pfn - first.
        self._swap_cache = (wanted & SWAP_CACHE) != 0
        resident = ram.ledger.entries[first : first + len(wanted)] == 0
        self._members = Membership(np.where(resident, wanted & ~np.uint8(SWAP_CACHE), np.uint8(Member.OUT)), first)
        self._abandoned = False
        self._selection = Selection(ram, prover, self._members, sampling, self.counts, pages_out=preserver is not None)
        self._protection = Protection(ram, self._members, first + len(wanted))
        self._confirmed: dict[int, NDArray[np.bool_]] = {}

    def leave(self, start: int, stop: int) -> None:
        """Take pfns ``[start, stop)`` out. To be called before anything that happened to them is answered."""
        touched = self._members.take_out(start, stop)
        if self.phase is not Phase.SIFTING:
            self.counts["touched"] += touched
        self._freed.leave(start, stop)

    def confirm(self, identifier: bytes, number: int, free: NDArray[np.bool_]) -> bool:
        """A scan of the guest found these pages free; answers whether that counts for this epoch.

        :param number: the scan's number, 1 to :data:`CONFIRM_ROUNDS`; each counts once.
        :param free: of the epoch's pages, shape ``(n,)``.
        """
        if self.phase is Phase.DONE or not self.identifier or identifier != self.identifier:
            return False
        if not 1 <= number <= CONFIRM_ROUNDS or number in self._confirmed or free.shape != (self.pages,):
            return False
        self._confirmed[number] = free
        return True

    @property
    def pages(self) -> int:
        """How many pages the epoch was begun over."""
        return self._members.pages

    def drained(self, identifier: bytes) -> bool:
        """No I/O that began before protection is under way any more; answers whether that was waited for."""
        if not self._draining or not self.identifier or identifier != self.identifier:
            return False
        self._draining = False
        return True

    def wants_drain(self) -> bool:
        """Is :meth:`drained` waited for?"""
        return self._draining and (self._members.has(Member.COPY) or self._members.has(Member.STABLE))

    def wants_confirmation(self) -> bool:
        """Is there an UNUSED candidate?"""
        return bool(self._freed) or self._members.has(Member.UNUSED)

    def abandon(self, why: str) -> None:
        """Stop discarding; :meth:`steps` goes on to unprotect."""
        self.note = self.note or why
        self._abandoned = True
        self._give_up(Member.COPY, "unmatched")
        self._give_up(Member.STABLE, "unpreserved")
        self._give_up(Member.NO_COPY, "unpreserved")
        self._give_up(Member.UNUSED, "unconfirmed")
        self._freed.forget()

    def steps(self) -> Iterator[Step]:
        """The epoch's work, in slices of about a millisecond; iterate until it ends.

        :raise PeerLost: QEMU is gone.
        """
        began = time.monotonic()
        try:
            for _ in self._selection.steps():
                yield Step.WORK
            reach("pager.epoch.sifted")
            if self._abandoned:
                # Meanwhile, what was still being chosen from was no member yet.
                self._members.clear()
            began = time.monotonic()
            self._deadline = began + self._limit
            yield from self._timed("protect", self._protect())
            reach("pager.epoch.protected")
            self._freed.note()
            # What comes before it is what the scans that answer it come after: protection, and entries noted.
            self.identifier = os.urandom(8) + self.number.to_bytes(8, "big")
            yield from self._await_drain()
            reach("pager.epoch.drained")
            yield from self._timed("prove", self._prove_copies())
            reach("pager.epoch.proven")
            yield from self._timed("preserve", self._preserve())
            reach("pager.epoch.preserved")
            yield from self._timed("confirm", self._await_confirmation())
            reach("pager.epoch.confirmed")
            yield from self._timed("discard", self._discard_unused())
            reach("pager.epoch.discarded")
        except OSError as error:
            # The host has no memory for page tables or for punching: what is done is done right, the rest stays.
            self.abandon(f"abandoned while {self.phase}: {error.strerror or error}")
        self._members.clear()
        yield from self._timed("protect", self._unprotect())
        self.protected_seconds = time.monotonic() - began
        yield from self._timed("discard", self._turn_freed())
        self.phase = Phase.DONE

    def _timed(self, name: str, steps: Iterator[Step]) -> Iterator[Step]:
        """Charge the time between giving way and coming back to nobody but ourselves."""
        while True:
            start = time.monotonic()
            step = next(steps, None)
            self.seconds[name] += time.monotonic() - start
            if step is None:
                return
            waiting = time.monotonic()
            yield step
            if step is Step.CONFIRM:
                self.seconds[name] += time.monotonic() - waiting

    def _protect(self) -> Iterator[Step]:
        self.phase = Phase.PROTECTING
        for _ in self._protection.protect(lambda: self._late("the deadline came before all pages were protected")):
            yield Step.WORK
        self.counts["candidates"] = self._members.count() + self.counts["touched"]

    def _await_drain(self) -> Iterator[Step]:
        while self.wants_drain():
            self.phase = Phase.DRAINING
            if self._late("direct I/O was not drained in time"):
                self._give_up(Member.COPY, "unmatched")
                self._give_up(Member.STABLE, "unpreserved")
                return
            yield Step.CONFIRM

    def _prove_copies(self) -> Iterator[Step]:
        self.phase = Phase.PROVING
        for _ in range(_NOT_CACHED_PASSES):
            pfns = self._members.of(Member.COPY, Member.STABLE)
            if not len(pfns):
                break
            waited = False
            for chunk in chunks_of(pfns, self._prover.pages):
                chunk = self._members.still(chunk, Member.COPY, Member.STABLE)
                waited |= self._prove_chunk(chunk)
                yield Step.WORK
                if self._late("the deadline came before all copies were compared"):
                    self._give_up(Member.COPY, "unmatched")
                    self._give_up(Member.STABLE, "unpreserved")
                    self._give_up(Member.NO_COPY, "unpreserved")
                    return
            if not waited:
                break
            yield Step.DISK
        self._give_up(Member.COPY, "unmatched")
        self._members.set(self._members.of(Member.STABLE), Member.NO_COPY)

    def _prove_chunk(self, pfns: NDArray[np.int64]) -> bool:
        """Discard what of ``pfns`` is proven; answers whether some must wait for the disk."""
        if not len(pfns):
            return False
        entries, postponed = self._prover.prove(pfns)
        proven = entries != 0
        reach("pager.epoch.compared")
        # No event was answered since the membership was looked at: all of these are still in.
        self._discard(pfns[proven], entries[proven])
        unmatched = pfns[~proven & ~postponed]
        stable = self._members.still(unmatched, Member.STABLE)
        self.counts["unmatched"] += len(unmatched) - len(stable)
        if self._sampling is not None:
            self._sampling.stayed(np.setdiff1d(unmatched, stable, assume_unique=True))
        self._members.set(pfns[~postponed], Member.OUT)
        self._members.set(stable, Member.NO_COPY)
        return bool(np.any(postponed))

    def _preserve(self) -> Iterator[Step]:
        pfns = self._members.of(Member.NO_COPY)
        if self._preserver is None or not len(pfns):
            return
        self.phase = Phase.PRESERVING
        self._preserver.begin()
        try:
            yield from self._preserve_chunks(self._preserver, chunks_of(pfns, SLICE_PAGES))
        finally:
            self._preserver.drop()
        self._give_up(Member.NO_COPY, "unpreserved")

    def _preserve_chunks(self, preserver: Preserver, chunks: Iterator[NDArray[np.int64]]) -> Iterator[Step]:
        while True:
            behind = preserver.under_way > BEHIND_MAX
            chunk = None if behind else next(chunks, None)
            if chunk is not None:
                preserver.compress(self._members.still(chunk, Member.NO_COPY))
            for preserved in preserver.written():
                if self._discard_preserved(preserved):
                    return
            if chunk is None and not preserver.under_way:
                return
            yield Step.WORK if chunk is not None else Step.DISK
            if self._late("the deadline came before all stable pages were compressed"):
                return

    def _discard_preserved(self, preserved: Preserved) -> bool:
        """Page out what is still in of pages whose bytes are in the store; answers whether that is full."""
        reach("pager.preserve.written")
        stays = preserved.pfns[preserved.entries == 0]
        still = self._members.still(preserved.pfns, Member.NO_COPY)
        stored = np.isin(preserved.pfns, still) & (preserved.entries != 0)
        # What has left meanwhile may have other bytes by now.
        self._ram.store.free(preserved.entries[~stored])
        # No event was answered since the membership was looked at: all of these are still in, with these bytes.
        self._discard(preserved.pfns[stored], preserved.entries[stored])
        self._members.set(preserved.pfns[stored], Member.OUT)
        if preserved.full:
            self.note = self.note or preserved.full
            self.counts["later"] = 0
            return True
        stays = self._members.still(stays, Member.NO_COPY)
        if self._sampling is not None:
            self._sampling.stayed(stays)
        self._give_up_pages(stays, "unpreserved")
        return False

    def _await_confirmation(self) -> Iterator[Step]:
        self.phase = Phase.CONFIRMING
        while self.wants_confirmation() and len(self._confirmed) < CONFIRM_ROUNDS:
            if self._late("the guest agent did not confirm in time"):
                break
            yield Step.CONFIRM

    def _discard_unused(self) -> Iterator[Step]:
        self.phase = Phase.DISCARDING
        if len(self._confirmed) == CONFIRM_ROUNDS:
            free = np.logical_and.reduce(list(self._confirmed.values()))
            for chunk in chunks_of(self._members.chosen(free, Member.UNUSED), _DISCARD_PAGES):
                chunk = self._members.still(chunk, Member.UNUSED)
                self._discard(chunk, np.full(len(chunk), ZERO_ENTRY, dtype=np.uint64))
                self._members.set(chunk, Member.OUT)
                yield Step.WORK
                if self._late("the deadline came before all free pages were discarded"):
                    break
        self._give_up(Member.UNUSED, "unconfirmed")

    def _late(self, note: str) -> bool:
        """Is it time to let pages go? Then the first such ``note`` says why."""
        late = time.monotonic() > self._deadline
        if late:
            self.note = self.note or note
        return late

    def _turn_freed(self) -> Iterator[Step]:
        """What the guest has freed of its discarded pages. Those are absent: this comes when nothing is protected."""
        if len(self._confirmed) == CONFIRM_ROUNDS:
            for turned in self._freed.turn(np.logical_and.reduce(list(self._confirmed.values()))):
                self.counts["freed"] += turned
                yield Step.WORK
        self._freed.forget()

    def _discard(self, pfns: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        if not len(pfns):
            return
        self._ram.discard(pfns, entries, runs_of_pfns(pfns))
        if self._sampling is not None:
            self._sampling.went(pfns, entries)
        zero, store = int(np.count_nonzero(entries == np.uint64(ZERO_ENTRY))), len(preserved_of(entries))
        self.counts["proven"] += len(pfns)
        self.counts["discarded_zero"] += zero
        self.counts["discarded_store"] += store
        self.counts["discarded_layer"] += len(pfns) - zero - store
        self.counts["discarded_swap_cache"] += int(np.count_nonzero(self._swap_cache[pfns - self._first]))

    def _give_up(self, member: Member, count: str) -> None:
        self._give_up_pages(self._members.of(member), count)

    def _give_up_pages(self, pfns: NDArray[np.int64], count: str) -> None:
        self._members.set(pfns, Member.OUT)
        self.counts[count] += len(pfns)

    def _unprotect(self) -> Iterator[Step]:
        for _ in self._protection.unprotect():
            yield Step.WORK
