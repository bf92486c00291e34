"""The proof for copies: a page's bytes now, compared with zero and with the layer block its fingerprint proposes."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.index import NOT_FOUND
from hva_host.memory.layers import Layer, LayerBetrayed, NotCached
from hva_host.memory.ledger import NO_ENTRY, ZERO_ENTRY, layer_entry
from hva_host.memory.native import equal_pages, fingerprints, zero_pages
from hva_host.memory.runs import runs_of_pfns
from hva_host.pager.ram import PageBuffer, Ram
from hvaqemu.pages import PAGE_SHIFT


class Prover:
    """Proves copies of one VM's pages, up to ``pages`` at a time."""

    def __init__(self, ram: Ram, pages: int = 512) -> None:
        self.pages = pages
        self._ram = ram
        self._guest = PageBuffer(pages)
        self._layer = PageBuffer(pages)

    def look_zero(self, pfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``pfns`` (ascending, shape ``(n,)``) are all zeros just now. A hint: nothing is protected."""
        return zero_pages(self._guest.view, self._ram.backing.read(runs_of_pfns(pfns), self._guest.view))

    def prove(self, pfns: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """The ledger entries of protected pages whose bytes are zeros or a layer's; ``NO_ENTRY`` for the others.

        :param pfns: ascending, at most :attr:`pages`; shape ``(n,)``.
        :return: the entries, and which pages are to be tried again once the host has read their block from the
            disk, which this asked it to; shapes ``(n,)``.
        """
        count = self._ram.backing.read(runs_of_pfns(pfns), self._guest.view)
        entries = np.full(count, NO_ENTRY, dtype=np.uint64)
        postponed = np.zeros(count, dtype=np.bool_)
        entries[zero_pages(self._guest.view, count)] = ZERO_ENTRY
        for slot, layer in self._ram.layers.items():
            if np.all(entries != NO_ENTRY):
                break
            self._match(slot, layer, count, entries, postponed)
        postponed &= entries == NO_ENTRY
        return entries, postponed

    def _match(
        self, slot: int, layer: Layer, count: int, entries: NDArray[np.uint64], postponed: NDArray[np.bool_]
    ) -> None:
        blocks = layer.index.lookup(fingerprints(self._guest.view, count, layer.index.seed))
        wanted = np.flatnonzero((entries == NO_ENTRY) & (blocks != NOT_FOUND))
        if not len(wanted):
            return
        have = np.zeros(count, dtype=np.bool_)
        # Pages in a row whose blocks are in a row are read in one call, to where the page is in the guest's buffer.
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(blocks[wanted]) != 1)) + 1
        for part in np.split(wanted, breaks):
            first, block = int(part[0]), int(blocks[part[0]])
            into = self._layer.view[first << PAGE_SHIFT : (first + len(part)) << PAGE_SHIFT]
            try:
                layer.read(block, len(part), into, wait=False)
            except NotCached:
                os.posix_fadvise(layer.fd, block << PAGE_SHIFT, len(part) << PAGE_SHIFT, os.POSIX_FADV_WILLNEED)
                postponed[part] = True
            except LayerBetrayed:
                continue
            else:
                have[part] = True
        equal = equal_pages(self._guest.view, self._layer.view, count)
        proven = np.flatnonzero(have & equal)
        entries[proven] = np.uint64(layer_entry(slot, 0)) + blocks[proven].astype(np.uint64)
