"""The proof for copies: a page's bytes now, compared with zero and with the layer block its fingerprint proposes."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.ledger import ZERO_ENTRY, layer_entry
from hva_host.memory.native import SCRATCH_PAGES, fingerprints, lookup, prove_copies, zero_pages
from hva_host.memory.runs import runs_of_pfns
from hva_host.pager.ram import PageBuffer, Ram
from hvaqemu.pages import PAGE_SHIFT


class Prover:
    """Proves copies of one VM's pages, up to ``pages`` at a time."""

    def __init__(self, ram: Ram, pages: int = 512) -> None:
        self.pages = pages
        self._ram = ram
        self._scratch = PageBuffer(SCRATCH_PAGES)

    def look_zero(self, pfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``pfns`` (ascending, shape ``(n,)``) are all zeros just now. A hint: nothing is protected."""
        found = np.empty(len(pfns), dtype=np.bool_)
        for start in range(0, len(pfns), SCRATCH_PAGES):
            part = pfns[start : start + SCRATCH_PAGES]
            count = self._ram.backing.read(runs_of_pfns(part), self._scratch.view)
            found[start : start + count] = zero_pages(self._scratch.view, count)
        return found

    def prove(self, pfns: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """The ledger entries of protected pages whose bytes are zeros or a layer's; ``NO_ENTRY`` for the others.

        :param pfns: ascending; shape ``(n,)``.
        :return: the entries, and which pages are to be tried again once the host has read their block from the
            disk, which this asked it to; shapes ``(n,)``.
        :raise OSError: guest RAM could not be read.
        """
        tables = [layer.table(layer_entry(slot, 0)) for slot, layer in self._ram.matched.items()]
        entries, postponed = prove_copies(self._ram.backing.fd, pfns, tables, ZERO_ENTRY, self._scratch.address)
        if postponed.any():
            self._read_ahead(pfns[postponed])
        return entries, postponed

    def _read_ahead(self, pfns: NDArray[np.int64]) -> None:
        """Have the host read what pages may be copies of, without waiting for it."""
        for start in range(0, len(pfns), SCRATCH_PAGES):
            count = self._ram.backing.read(runs_of_pfns(pfns[start : start + SCRATCH_PAGES]), self._scratch.view)
            for layer in self._ram.matched.values():
                blocks = lookup(layer.table(0), fingerprints(self._scratch.view, count, layer.index.seed))
                for run in runs_of_pfns(np.unique(blocks[blocks >= 0])):
                    offset, length = run.start << PAGE_SHIFT, run.pages << PAGE_SHIFT
                    os.posix_fadvise(layer.fd, offset, length, os.POSIX_FADV_WILLNEED)
