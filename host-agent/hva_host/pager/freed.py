"""Discarded pages that the guest has freed since: LAYER and PRESERVED become ZERO, so that no old content is loaded
for nothing, and the store keeps none.

A guest kernel that frees a page and uses it again writes it as a whole before anybody reads it. Where the host has
discarded that page meanwhile, the first touch would still fetch the old content from its layer or from the store. It
need not, once it is known that the guest has no use for it. The rules, and what in here keeps them:

* **Only on scans begun after the entry was made** (a report older than the entry may speak of the page's life before
  it). Entries are noted in :meth:`Freed.note`, then the epoch makes its identifier, then the guest scans twice, each
  scan begun after the identifier was received. Only a page whose entry is still the noted one is turned.
* **Absent all the time.** A page can change only by being touched, and a touch of an absent page is a missing fault,
  which is answered by a fill, before which the page leaves (:meth:`Freed.leave`). QEMU's own accesses fault alike; its
  balloon punches, which leaves an absent page as it is.
* **One aligned 8-byte store**, in the thread that answers faults, which does not give way between looking at the page
  and storing. Killed before or after: the entry is the old one or ZERO, and both are right for a page nobody has a use
  for. A slot of the store is freed after that; killed in between, the next pager finds that no entry names it.
* **A fetch under way** carries the entry it was begun for and is applied only if the entry is unchanged, so old bytes
  do not come after the zeros: who waits is woken, faults again and gets zeros.

What may happen between the second scan and the store, and why zeros are right in each case:

=============================================  ========================================================================
the guest, meanwhile,                          so
=============================================  ========================================================================
does nothing                                   the page is free; zeros or old bytes, nobody can tell
allocates the page, has not touched it         whoever allocated it knows nothing of its content and asks for none:
                                               what counts on zeros (``__GFP_ZERO``, init_on_alloc) writes them, except
                                               where freeing has written them (init_on_free), and zeros are what
                                               it gets. What will be read is written before, which is a touch
allocates and touches it                       missing fault, fill, RESIDENT, left: its entry is gone
touches it, its bytes must come from the disk  it is not left, for nothing was answered; it may be turned, the fetch is
                                               dropped, and it reads zeros where it might have read what its last
                                               owner left: for a page just allocated neither means anything
reads a file into it (page cache, DMA)         virtio copies into it through QEMU's mapping: a touch as any other
puts it on a per-CPU list, isolates it         as allocated; content goes nowhere without being touched
frees and allocates it several times           as the last of them; the two scans need not see the same freedom
=============================================  ========================================================================

A guest that looks at the content of its free pages (``page_poison``) is never asked to confirm free pages, so no page
of its is turned, as none is discarded as UNUSED.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.ledger import Counter
from hva_host.pager.ram import Ram
from hvaqemu.faultpoints import reach
from hvaqemu.pages import Residence

#: Turned between two looks at faults: giving a slot of the store back takes some microseconds.
_CHUNK_PAGES = 256


class Freed:
    """The LAYER and PRESERVED pages of one epoch that the guest reports free.

    :param free: what the guest's newest report says is free, of pfns from ``first`` on; shape ``(n,)``. A hint.
    """

    def __init__(self, ram: Ram, free: NDArray[np.bool_], first: int = 0) -> None:
        self._ram = ram
        self._first = first
        pfns = np.flatnonzero(free) + first
        #: What the epoch began with; what has left since is only taken off :attr:`_members`.
        self._pfns = pfns[np.isin(ram.ledger.kinds(pfns), (Residence.LAYER, Residence.PRESERVED))]
        self._entries = np.empty(0, dtype=np.uint64)
        #: By pfn - first.
        self._members = np.zeros(len(free), dtype=np.bool_)
        self._members[self._pfns - first] = True

    def __bool__(self) -> bool:
        """Is there one left?"""
        return len(self._pfns) > 0 and bool(self._members.any())

    def leave(self, start: int, stop: int) -> None:
        """Something happened to pfns ``[start, stop)``."""
        self._members[max(start - self._first, 0) : max(stop - self._first, 0)] = False

    def note(self) -> None:
        """Note the entries there are now. The scans that count begin after this."""
        self._entries = self._ram.ledger.entries[self._pfns]

    def turn(self, free: NDArray[np.bool_]) -> Iterator[int]:
        """Turn what two scans, both begun after :meth:`note`, found free; how many, after each slice of them.

        :param free: in both scans; shape ``(n,)``.
        """
        confirmed = np.flatnonzero(free[self._pfns - self._first])
        for at in range(0, len(confirmed), _CHUNK_PAGES):
            which = confirmed[at : at + _CHUNK_PAGES]
            # Looked at and stored without giving way: no event comes in between.
            which = which[self._members[self._pfns[which] - self._first]]
            pfns, entries = self._pfns[which], self._entries[which]
            if len(pfns):
                absent = ~self._ram.backing.presence(int(pfns[0]), int(pfns[-1]) + 1)
                still = absent[pfns - pfns[0]]
                reach("pager.freed.proven")
                turned = self._ram.turn_to_zero(pfns[still], entries[still])
                self._ram.ledger.count(Counter.FREED_PAGES, turned)
                yield turned

    def forget(self) -> None:
        """Nothing more will be turned."""
        self._members[:] = False
