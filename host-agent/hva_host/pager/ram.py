"""A VM's RAM as the pager holds it: userfaultfd, backing, ledger, layers and store, and how a page moves.

Only the pager's one thread calls in here, so between two calls nothing but QEMU changes memory, and QEMU can only
write unprotected present pages or punch holes (its balloon).
"""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.backing import Backing
from hva_host.memory.layers import Layer
from hva_host.memory.ledger import LAYERS, Counter, Ledger
from hva_host.memory.store import Store
from hva_host.memory.userfaultfd import Userfaultfd
from hvaqemu.errors import PeerLost, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT, Run


class Ram:
    """One VM's RAM.

    :ivar base: where QEMU has the RAM mapped (a byte address in QEMU).
    :ivar layers: open layers by ledger slot; a recorded layer that can not be opened is in ``broken`` with the reason.
    :ivar withdrawn: slots of layers that serve what depends on them, and that nothing new is matched with.
    """

    def __init__(self, uffd: Userfaultfd, base: int, backing: Backing, ledger: Ledger, store: Store) -> None:
        if ledger.pages != backing.pages:
            raise ValueError(f"a ledger for {ledger.pages} pages does not fit a backing of {backing.pages}")
        self.uffd = uffd
        self.base = base
        self.backing = backing
        self.ledger = ledger
        self.store = store
        self.pages = backing.pages
        self.layers: dict[int, Layer] = {}
        self.broken: dict[int, str] = {}
        self.withdrawn = ledger.withdrawn()

    @property
    def matched(self) -> dict[int, Layer]:
        """Layers that pages may be made to depend on, by slot."""
        return {slot: layer for slot, layer in self.layers.items() if slot not in self.withdrawn}

    def address(self, pfn: int) -> int:
        """Where QEMU has page ``pfn``."""
        return self.base + (pfn << PAGE_SHIFT)

    def pfn(self, address: int) -> int | None:
        """The page at a byte address of QEMU, None outside RAM."""
        pfn = (address - self.base) >> PAGE_SHIFT
        return pfn if 0 <= pfn < self.pages else None

    def protect(self, run: Run) -> None:
        """Stop writes to a run.

        :raise PeerLost: QEMU is gone.
        :raise OSError: the host has no memory for page tables.
        """
        if not self.uffd.protect(self.address(run.start), run.pages << PAGE_SHIFT):
            raise PeerLost("QEMU is gone")

    def unprotect(self, run: Run) -> None:
        """Let writes to a run through and wake who waits to write.

        :raise PeerLost: QEMU is gone.
        """
        if not self.uffd.unprotect(self.address(run.start), run.pages << PAGE_SHIFT):
            raise PeerLost("QEMU is gone")

    def wake(self, run: Run) -> None:
        """Have everyone who waits in a run fault again.

        :raise PeerLost: QEMU is gone.
        """
        if not self.uffd.wake(self.address(run.start), run.pages << PAGE_SHIFT):
            raise PeerLost("QEMU is gone")

    def discard(self, pfns: NDArray[np.int64], entries: NDArray[np.uint64], runs: list[Run]) -> None:
        """Make protected, proven pages non-resident: every ledger entry is stored before its page is punched.

        Killed in between, a page is present with an entry, and presence wins.

        :param pfns: ascending; shape ``(n,)``.
        :param entries: what each page becomes; shape ``(n,)``.
        :param runs: the same pages as runs.
        :raise OSError: the kernel could not punch; pages still present have no entry then.
        """
        self.ledger.store(pfns, entries)
        reach("pager.discard.stored")
        try:
            for run in runs:
                reach("pager.discard.punch")
                self.backing.punch(run)
        except OSError:
            for run in runs:
                self.erase_present(run.start, run.stop)
            raise
        reach("pager.discard.punched")
        self.ledger.count(Counter.DISCARDED_PAGES, len(pfns))

    def erase(self, start: int, count: int) -> int:
        """Drop the entries of ``count`` resident pages from ``start`` on; how many had one.

        Their slots of the store are freed after that: killed in between, a slot is left that no entry names.
        """
        if not self.ledger.preserved:
            return self.ledger.erase(start, count)
        entries = self.ledger.entries[start : start + count].copy()
        erased = self.ledger.erase(start, count)
        reach("pager.erase.freed")
        self.store.free(entries)
        return erased

    def turn_to_zero(self, pfns: NDArray[np.int64], entries: NDArray[np.uint64]) -> int:
        """Have absent pages whose entry still is the one in ``entries`` (shapes ``(n,)``) come back as zeros; how many.

        Their slots of the store are freed after that, as in :meth:`erase`.
        """
        turned = self.ledger.turn_to_zero(pfns, entries)
        reach("pager.freed.turned")
        self.store.free(turned)
        return len(turned)

    def erase_present(self, start: int, stop: int) -> None:
        """Presence wins: drop the entries of present pages in pfns ``[start, stop)``."""
        for run in self.backing.present_runs(start, stop):
            self.erase(run.start, run.pages)

    def add_layer(self, layer: Layer) -> int:
        """Record a layer and let pages be matched against it; one recorded before keeps its slot, and stays withdrawn.

        :raise RefusedError: all slots are taken, or its path is too long.
        """
        record = layer.record()
        recorded = self.ledger.layers()
        for slot, known in recorded.items():
            if known == record:
                if slot in self.layers:
                    layer.close()
                else:
                    self.layers[slot] = layer
                    self.broken.pop(slot, None)
                return slot
        slot = next((slot for slot in range(LAYERS) if slot not in recorded), -1)
        if slot < 0:
            raise RefusedError(f"the VM has {LAYERS} layers already; merge some first")
        self.ledger.record_layer(slot, record)
        self.layers[slot] = layer
        return slot

    def withdraw_layer(self, slot: int) -> None:
        """Match nothing new with a layer; what depends on it is served from it as before.

        :raise ValueError: there is none in the slot.
        """
        self.ledger.withdraw_layer(slot)
        self.withdrawn.add(slot)

    def drop_layer(self, slot: int) -> None:
        """Forget a withdrawn layer that no page depends on. Nothing may be being fetched: what comes then would be
        taken for the slot's next layer.

        :raise ValueError: a page depends on it.
        """
        self.ledger.free_layer(slot)
        reach("pager.layer.freed")
        self.withdrawn.discard(slot)
        self.broken.pop(slot, None)
        # Not closed but let go: a helper thread may be inside a read of what nobody waits for any more.
        self.layers.pop(slot, None)


class PageBuffer:
    """Page-aligned memory of ours that the kernel copies from.

    :ivar view: its bytes.
    :ivar address: where it starts.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._map = mmap.mmap(-1, pages << PAGE_SHIFT)
        self.view = memoryview(self._map)
        self.address = int(np.frombuffer(self.view, np.uint8).ctypes.data)
