"""Answers to faults: from the ledger, in runs, checked, and never wrong.

Ordering, kept by every answer here:

1. the pages leave the epoch,
2. the bytes are read and checked,
3. the page is filled (``UFFDIO_COPY``/``UFFDIO_ZEROPAGE``), which also wakes who waits,
4. its ledger entry is erased. Killed between 3 and 4: present with an entry, and presence wins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hva_host.memory.layers import LayerBetrayed
from hva_host.memory.ledger import NO_ENTRY, Counter, entry_block, entry_kind, entry_layer
from hva_host.memory.store import StoreBetrayed
from hva_host.memory.userfaultfd import Fault, Fill, FillResult
from hva_host.memory.waiting import NotCached
from hva_host.pager.fetch import STORE, Fetched, Fetcher
from hva_host.pager.ram import PageBuffer, Ram
from hva_host.pager.stalls import Stalls
from hva_host.pager.streams import AROUND, AROUND_MAX, Streams
from hvaqemu.errors import PeerLost
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT, Residence, Run

_RETRY_SECONDS = 0.005
#: By kind of entry.
_REFAULTS_FROM: dict[int, Counter] = {
    Residence.ZERO: Counter.ZERO_REFAULTS,
    Residence.LAYER: Counter.LAYER_REFAULTS,
    Residence.PRESERVED: Counter.PRESERVED_REFAULTS,
}
UNSERVED_MAX = 4096


class Held(NamedTuple):
    """A fault that must not be answered."""

    layer: str
    reason: str


class Refaults:
    """Answers faults of one VM.

    :param leave: told of every run before it is answered (the epoch's ``leave``).
    :param came_back: told of every discarded page that somebody touched, and of what it was; not of its neighbours.
    """

    def __init__(
        self,
        ram: Ram,
        leave: Callable[[int, int], None],
        fetcher: Fetcher,
        came_back: Callable[[int, int], None] = lambda _pfn, _kind: None,
    ) -> None:
        self._ram = ram
        self._came_back = came_back
        self._leave = leave
        self._fetcher = fetcher
        self._buffer = PageBuffer(AROUND_MAX)
        self._streams = Streams()
        self._waiting: dict[int, float] = {}
        self._retry: dict[int, float] = {}
        self._steps = np.arange(AROUND_MAX, dtype=np.uint64)
        #: Pages somebody waits for, and whose fault must not be answered.
        self.held: dict[int, Held] = {}
        #: A page was held since somebody last cleared this.
        self.newly_held = False
        #: Pages that could not be filled though nobody waits for them, at most :data:`UNSERVED_MAX`.
        self.unserved: dict[int, Held] = {}
        self.stalls = Stalls(ram.ledger.histogram)

    def answer(self, faults: list[Fault], ready_at: float) -> None:
        """Answer what was read from the userfaultfd.

        :param ready_at: when the faults became readable, on the monotonic clock, in seconds.
        :raise PeerLost: QEMU is gone.
        """
        reach("pager.refault.read")
        for fault in faults:
            pfn = self._ram.pfn(fault.address)
            if pfn is None:
                # Only RAM was registered, so this is no address of ours to fill; let the kernel sort it out.
                self._ram.uffd.wake(fault.address, 1 << PAGE_SHIFT)
            elif fault.write_protect:
                self._leave(pfn, pfn + 1)
                reach("pager.write.left")
                self._ram.unprotect(Run(pfn, 1))
                self._ram.ledger.count(Counter.WRITE_FAULTS)
                self.stalls.add(time.monotonic() - ready_at)
            else:
                self._waiting[pfn] = ready_at
                self._refault(pfn)

    def read_ahead(self) -> bool:
        """Fill one more run for a sequential reader, if there is one; is there more to fill?

        :raise PeerLost: QEMU is gone.
        """
        ahead = self._streams.ahead()
        if ahead is not None:
            # Resident pages are passed over, and so are pages never touched: they are left to whoever touches them.
            discarded = np.flatnonzero(self._ram.ledger.entries[ahead.next : ahead.stop])
            start = ahead.next + int(discarded[0]) if len(discarded) else ahead.stop
            if ahead.mark <= start < ahead.stop:
                self._streams.left_out(ahead, start)
            else:
                stop = min(ahead.stop, ahead.mark if start < ahead.mark else ahead.stop)
                filled = self.fill(start, min(AROUND, stop - start)) if start < stop else 0
                self._streams.filled(ahead, start + filled)
        return self._streams.reading_ahead

    def fill(self, pfn: int, length: int) -> int:
        """Make a page resident, and up to ``length`` - 1 pages behind it that come from the same place.

        :param length: at most ``AROUND_MAX``.

        :return: pages filled now; 0 if the page is being fetched, is held, or must be tried again later.
        :raise PeerLost: QEMU is gone.
        """
        ram = self._ram
        entry = ram.ledger.words[pfn]
        kind = entry_kind(entry)
        if kind in (Residence.RESIDENT, Residence.ZERO):
            run = self._zero_run(pfn, length)
            self._leave(run.start, run.stop)
            return self._filled(run, ram.uffd.zero(ram.address(pfn), run.pages << PAGE_SHIFT))
        if kind == Residence.LAYER:
            return self._fill_from_layer(entry, self._layer_run(pfn, entry, length))
        if kind == Residence.PRESERVED:
            return self._fill_from_store(pfn, length)
        self._can_not_serve(pfn, "ledger", f"damaged entry {entry:#018x}")
        return 0

    def fetched(self, result: Fetched) -> None:
        """Apply bytes a helper thread fetched, if the entries are still those it fetched for.

        :raise PeerLost: QEMU is gone.
        """
        run = result.run
        changed = np.flatnonzero(self._ram.ledger.entries[run.start : run.stop] != result.entries)
        count = int(changed[0]) if len(changed) else run.pages
        if count == 0:
            # Somebody was faster with the first page, the one that is waited for; it may wait for another reason now.
            self._waiting.pop(run.start, None)
            self.held.pop(run.start, None)
            self._ram.wake(Run(run.start, 1))
        elif result.error and run.pages > 1:
            # A neighbour's block may be the one that can not be read.
            self.fill(run.start, 1)
        elif result.error:
            self._can_not_serve(run.start, result.source, result.error)
        elif result.slots:
            self._serve_slots(Run(run.start, count), result)
        else:
            whole = Run(run.start, count)
            self._buffer.view[: count << PAGE_SHIFT] = result.blocks[: count << PAGE_SHIFT]
            self._serve_checked(int(result.entries[0]), whole)
        # Last: before, room they use can not become another page's.
        self._ram.store.free(np.array(result.pinned, dtype=np.uint64))

    def resume(self) -> int:
        """Try the held faults again; answers how many are still held, among them those being fetched from the disk.

        :raise PeerLost: QEMU is gone.
        """
        for pfn in list(self.held):
            self.fill(pfn, 1)
        return len(self.held)

    @property
    def trying(self) -> bool:
        """Is the disk being asked for a held page?"""
        return any(self._fetcher.fetches(pfn) for pfn in self.held)

    def retry(self, now: float) -> float | None:
        """Try again what the host had no memory for; answers when to call next (monotonic seconds), if at all.

        :raise PeerLost: QEMU is gone.
        """
        for pfn in [pfn for pfn, when in self._retry.items() if when <= now]:
            del self._retry[pfn]
            self.fill(pfn, 1)
        return min(self._retry.values(), default=None)

    def _refault(self, pfn: int) -> None:
        """Answer a fault on a missing page, and remember where its reader may go on."""
        window = self._streams.window(pfn)
        entry = self._ram.ledger.words[pfn]
        if entry != NO_ENTRY:
            self._came_back(pfn, entry_kind(entry))
        filled = self.fill(pfn, window.now)
        if filled:
            self._streams.refaulted(pfn, filled, window.pages)

    def _count_refault(self, entry: int) -> None:
        """Somebody waited for a page with this entry, and has it now."""
        count = self._ram.ledger.count
        if entry == NO_ENTRY:
            count(Counter.FIRST_TOUCHES)
            return
        count(Counter.REFAULTS)
        # A compromised QEMU may have written to the ledger since the page was filled.
        if (source := _REFAULTS_FROM.get(entry_kind(entry))) is not None:
            count(source)

    def _zero_run(self, pfn: int, length: int) -> Run:
        """Pages from ``pfn`` on that come back as zeros. A RESIDENT one among them ends the fill, not the bytes."""
        if length == 1:
            return Run(pfn, 1)
        kinds = self._ram.ledger.entries[pfn : pfn + length] >> np.uint64(60)
        other = np.flatnonzero(kinds > Residence.ZERO)
        return Run(pfn, int(other[0]) if len(other) else len(kinds))

    def _layer_run(self, pfn: int, entry: int, length: int) -> Run:
        if length == 1:
            return Run(pfn, 1)
        entries = self._ram.ledger.entries[pfn : pfn + length]
        other = np.flatnonzero(entries != np.uint64(entry) + self._steps[: len(entries)])
        return Run(pfn, int(other[0]) if len(other) else len(entries))

    def _fill_from_store(self, pfn: int, length: int) -> int:
        """Neighbours need not be neighbours in the store: each is read and checked by itself, up to one that fails."""
        ram, count = self._ram, 0
        for entry in ram.ledger.words[pfn : pfn + length]:
            if entry_kind(entry) != Residence.PRESERVED:
                break
            try:
                ram.store.get(entry, self._buffer.view[count << PAGE_SHIFT :])
            except NotCached:
                if not count:
                    run = self._store_run(pfn, length)
                    self._fetcher.fetch_slots(ram.store, run, ram.ledger.entries[run.start : run.stop].copy())
                    return 0
                break
            except StoreBetrayed as error:
                if not count:
                    self._can_not_serve(pfn, STORE, error.message)
                    return 0
                break
            count += 1
        return self._serve_buffer(Run(pfn, count))

    def _store_run(self, pfn: int, length: int) -> Run:
        other = np.flatnonzero(self._ram.ledger.kinds(slice(pfn, pfn + length)) != Residence.PRESERVED)
        return Run(pfn, int(other[0]) if len(other) else min(length, self._ram.pages - pfn))

    def _serve_slots(self, run: Run, result: Fetched) -> None:
        """Fill what is right of what was fetched from the store."""
        count = 0
        for entry, slot in zip(result.entries[: run.pages].tolist(), result.slots, strict=False):
            try:
                self._ram.store.decode(entry, slot, self._buffer.view[count << PAGE_SHIFT :])
            except StoreBetrayed as error:
                if not count:
                    self._can_not_serve(run.start, STORE, error.message)
                    return
                break
            count += 1
        self._serve_buffer(Run(run.start, count))

    def _serve_buffer(self, run: Run) -> int:
        """Fill pages with what was read and checked."""
        self._leave(run.start, run.stop)
        reach("pager.refault.checked")
        ram = self._ram
        return self._filled(run, ram.uffd.copy(ram.address(run.start), self._buffer.address, run.pages << PAGE_SHIFT))

    def _fill_from_layer(self, entry: int, run: Run) -> int:
        slot, block = entry_layer(entry), entry_block(entry)
        layer = self._ram.layers.get(slot)
        if layer is None:
            self._can_not_serve(run.start, f"slot {slot}", self._ram.broken.get(slot, "no such layer"))
            return 0
        if block + run.pages > layer.blocks:
            if block >= layer.blocks:
                self._can_not_serve(run.start, str(layer.path), f"no block {block}")
                return 0
            run = Run(run.start, layer.blocks - block)
        try:
            layer.read(block, run.pages, self._buffer.view, wait=False)
        except NotCached:
            self._fetcher.fetch_blocks(layer, block, run, np.uint64(entry) + self._steps[: run.pages])
            return 0
        except LayerBetrayed as error:
            if run.pages > 1:
                return self._fill_from_layer(entry, Run(run.start, 1))
            self._can_not_serve(run.start, str(layer.path), error.message)
            return 0
        return self._serve_checked(entry, run)

    def _serve_checked(self, entry: int, run: Run) -> int:
        """Fill from the buffer what is right in it."""
        layer = self._ram.layers[entry_layer(entry)]
        right = layer.check(entry_block(entry), run.pages, self._buffer.view)
        if right == 0:
            self._can_not_serve(run.start, str(layer.path), f"block {entry_block(entry)} has changed")
            return 0
        run = Run(run.start, right)
        self._leave(run.start, run.stop)
        reach("pager.refault.checked")
        ram = self._ram
        result = ram.uffd.copy(ram.address(run.start), self._buffer.address, run.pages << PAGE_SHIFT)
        ram.ledger.count(Counter.LAYER_PAGES_LOADED, result.filled >> PAGE_SHIFT)
        return self._filled(run, result)

    def _filled(self, run: Run, result: FillResult) -> int:
        ram = self._ram
        count = result.filled >> PAGE_SHIFT
        reach("pager.refault.filled")
        if self.held:
            for pfn in [pfn for pfn in self.held if run.start <= pfn < run.start + max(count, 1)]:
                del self.held[pfn]
        if count:
            if run.start in self._waiting:
                self._count_refault(ram.ledger.words[run.start])
            ram.ledger.count(Counter.REFAULT_PAGES, ram.erase(run.start, count))
        elif result.outcome is Fill.PRESENT:
            ram.erase(run.start, 1)
            ram.wake(Run(run.start, 1))
        elif result.outcome is Fill.AGAIN:
            self._retry[run.start] = 0.0
            return 0
        elif result.outcome is Fill.NO_MEMORY:
            self._retry[run.start] = time.monotonic() + _RETRY_SECONDS
            return 0
        elif result.outcome is Fill.GONE:
            raise PeerLost("QEMU is gone")
        self._answered(run.start, max(count, 1))
        return count

    def _answered(self, start: int, count: int) -> None:
        """Every wait in the run is over, also of those who wait for a page that came by fault-around."""
        if not self._waiting:
            return
        now = time.monotonic()
        pfns = range(start, start + count)
        for pfn in [pfn for pfn in self._waiting if pfn in pfns]:
            self.stalls.add(now - self._waiting.pop(pfn))

    def _can_not_serve(self, pfn: int, layer: str, reason: str) -> None:
        """Only a page somebody waits for holds the VM; another may be right again before anybody asks for it."""
        if pfn in self._waiting:
            self.newly_held |= pfn not in self.held
            self.held[pfn] = Held(layer, reason)
        elif len(self.unserved) < UNSERVED_MAX:
            self.unserved[pfn] = Held(layer, reason)
