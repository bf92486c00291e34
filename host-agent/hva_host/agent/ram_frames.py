"""A map of guest RAM at one moment, coarse enough to keep hundreds of them: for each cell of RAM, how its pages are.

A cell is a run of pages; of each it is kept how large a share has which residence and which state. What is discarded
is the pager's word, what is resident the kernel's, and the state the guest's, in its newest scan. Shares are in 255ths.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import zlib
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hva_host.agent import accounts, residences
from hva_host.agent.guest_exchange import ScanReport
from hva_host.agent.model import Record
from hva_host.agent.pager_process import PagerHandle
from hva_host.pager.attach import RAM_LINK
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import PeerLost, ProtocolError
from hvaqemu.pages import STATE_MASK, PageState, Residence, Run
from hvaqemu.protocol import unpack_map

#: Cells a map has at most.
CELLS = 512
#: What is kept of a cell; the rest of it was never touched, or is stable.
RESIDENCES: Final = (Residence.RESIDENT, Residence.ZERO, Residence.LAYER, Residence.PRESERVED)
STATES: Final = (PageState.UNUSED, PageState.VOLATILE, PageState.POTENTIAL)
_WHOLE = 255
#: Seconds between two maps: at least so many, and so many for each GiB that is looked at.
_LEAST_SECONDS = 1.0
_SECONDS_PER_GIB = 2.0
_PAGES_PER_GIB = 1 << 18

Shares = NDArray[np.uint8]


class RamFrame(Record):
    """The map at one moment."""

    #: Seconds since the VM started.
    at_s: float
    cells: int
    #: Shares of :data:`RESIDENCES` and of :data:`STATES` as base64 of zlib of uint8, shape ``(kinds, cells)``; the
    #: latter empty before the guest's first scan.
    residence: str
    states: str = ""

    def residence_shares(self) -> Shares:
        """Of each cell, in 255ths, what was ever touched; shape ``(4, cells)``, in the order of :data:`RESIDENCES`.

        :raise ProtocolError: these are no shares.
        """
        return _unpacked(self.residence, len(RESIDENCES), self.cells)

    def state_shares(self) -> Shares | None:
        """Of each cell, in 255ths, what is not stable; shape ``(3, cells)``, in the order of :data:`STATES`.

        :raise ProtocolError: these are no shares.
        """
        return _unpacked(self.states, len(STATES), self.cells) if self.states else None


def pages_per_cell(pages: int) -> int:
    """How many pages a cell holds; the last one of a RAM may hold fewer."""
    return -(-pages // CELLS)


def seconds_between(pages: int) -> float:
    """How long after a map of so many pages the next may be made, so that making them costs little."""
    return max(_LEAST_SECONDS, _SECONDS_PER_GIB * pages / _PAGES_PER_GIB)


def shares(values: NDArray[np.uint8], wanted: tuple[int, ...]) -> Shares:
    """Of each cell of RAM, in 255ths, how many of its pages have each of the ``wanted`` values.

    A share above nothing is at least 1, so that a single page among thousands is not lost.

    :param values: a byte a page, shape ``(pages,)``.
    :return: shape ``(len(wanted), cells)``.
    """
    size = pages_per_cell(len(values))
    starts = np.arange(0, len(values), size)
    lengths = np.diff(starts, append=len(values))
    made = np.empty((len(wanted), len(starts)), dtype=np.uint8)
    for row, value in enumerate(wanted):
        counts = np.add.reduceat(values == value, starts, dtype=np.int64)
        made[row] = np.maximum(counts * _WHOLE // lengths, counts > 0)
    return made


def packed(made: Shares) -> str:
    """Shares as text for JSON."""
    return base64.b64encode(zlib.compress(made.tobytes(), 6)).decode()


def _unpacked(text: str, rows: int, cells: int) -> Shares:
    try:
        raw = unpack_map(base64.b64decode(text, validate=True), rows * cells)
    except binascii.Error as error:
        raise ProtocolError("a map of RAM is damaged") from error
    return np.frombuffer(raw, np.uint8).reshape(rows, cells)


class RamMapper:
    """Makes the maps of one VM.

    :param qemu: the pid of its QEMU.
    """

    def __init__(self, pages: int, qemu: int) -> None:
        self._pages = pages
        self._qemu = qemu
        self._report: ScanReport | None = None
        self._states = ""

    async def frame(self, at: float, pager: PagerHandle, report: ScanReport | None) -> RamFrame:
        """The map now.

        :param at: seconds since the VM started.
        :param report: the guest's newest.
        :raise HvaError: a peer went or was silent.
        """
        # Before and after: what is discarded or comes back meanwhile was touched.
        before = await asyncio.to_thread(self._present)
        kinds = np.empty(self._pages, dtype=np.uint8)
        for part in residences.parts(self._pages):
            raw = unpack_map(await residences.compressed_part(pager, part), part.pages)
            kinds[part.start : part.stop] = np.frombuffer(raw, np.uint8)
        found = shares(kinds, RESIDENCES)
        after = await asyncio.to_thread(self._present)
        if before is not None and after is not None:
            discarded = np.minimum(found[1:].sum(axis=0, dtype=np.int64), _WHOLE)
            found[0] = np.minimum(np.maximum(before, after), _WHOLE - discarded)
        if report is not self._report:
            # Several maps are made of one scan.
            self._report = report
            self._states = packed(shares(report.classes & np.uint8(STATE_MASK), STATES)) if report is not None else ""
        return RamFrame(at_s=at, cells=found.shape[1], residence=packed(found), states=self._states)

    def _present(self) -> list[int] | None:
        """Of each cell, in 255ths, what occupies host memory; None where the kernel does not tell (before Linux 6.5).

        :raise HvaError: QEMU is gone, or may not be looked into.
        """
        size = pages_per_cell(self._pages)
        cells = [Run(start, min(size, self._pages - start)) for start in range(0, self._pages, size)]
        ram = next((number for number, link in descriptors(self._qemu).items() if link == RAM_LINK), None)
        if ram is None:
            raise PeerLost(f"process {self._qemu} has no guest RAM")
        with suppress(OSError):
            # Not kept open: a descriptor of ours would keep the RAM of a guest that has ended.
            fd = os.open(f"/proc/{self._qemu}/fd/{ram}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                counts = accounts.present_pages(fd, cells)
            finally:
                os.close(fd)
            return [count * _WHOLE // cell.pages for count, cell in zip(counts, cells, strict=True)]
        return None
