"""Scans of all page states, piece by piece, and the answers made of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from hva_guest.classify import classify, count_states, free_bitmap, with_potential
from hva_guest.mappings import SharedMappings
from hva_guest.memory import Ranges, part_of, read_memory
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PageState
from hvaqemu.protocol import Confirm, ConfirmEnd, ConfirmPiece, Message, Scan, ScanEnd, ScanPiece, pack_map

#: Pages read and classified in one go: 256 KiB of words. Pieces begin at multiples of it, so compound pages (whose
#: size and place are powers of two) do not straddle pieces, save huge ones, which are STABLE anyway.
CHUNK_PAGES = 32 * 1024


class PageFlags:
    """The words of /proc/kpageflags, or of a file laid out alike, in this machine's byte order."""

    def __init__(self, path: str) -> None:
        """:raise OSError: ``path`` cannot be opened: not root, or a kernel without CONFIG_PROC_PAGE_MONITOR."""
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._descriptor)

    def _words(self, start: int, pages: int) -> bytes:
        """The words of ``pages`` pages from pfn ``start``, or fewer where the file ends."""
        words = os.pread(self._descriptor, pages * 8, start * 8)
        while len(words) < pages * 8:
            more = os.pread(self._descriptor, pages * 8 - len(words), start * 8 + len(words))
            if not more:
                break
            words += more
        return words[: len(words) & ~7]

    def pieces(self, ranges: Ranges, swapcache: bool) -> Iterator[tuple[int, bytes]]:
        """(start pfn, class map) for all of ``ranges``, ascending, each read when it is asked for.

        :raise OSError: the kernel refuses to say.
        """
        for range_start, count in ranges:
            start, stop = range_start, range_start + count
            while start < stop:
                end = min(stop, (start // CHUNK_PAGES + 1) * CHUNK_PAGES)
                words = self._words(start, end - start)
                if words:
                    yield start, classify(words, sys.byteorder, swapcache)
                start = end


def scan_answer(
    request: Scan, flags: PageFlags, ranges: Ranges, swapcache: bool, shared: SharedMappings | None
) -> Iterator[Message | None]:
    """The messages that answer ``request``; the work of each is done when it is asked for. None only gives way.

    :param shared: tells POTENTIAL from VOLATILE pages; None: all are VOLATILE.
    :raise OSError: see :meth:`PageFlags.pieces`.
    """
    marks, busy = None, 0.0
    if shared is not None:
        marks = yield from shared.look(max((start + count for start, count in ranges), default=0))
        busy = shared.seconds
    number, totals, begun = 0, [0] * len(PageState), time.monotonic()
    for start, classes in flags.pieces(ranges, swapcache):
        if marks is not None and (mapped := marks.part(start, len(classes))):
            classes = with_potential(classes, mapped)
        for state, count in enumerate(count_states(classes)):
            totals[state] += count
        piece = ScanPiece(request.request, number, start, len(classes), pack_map(classes))
        busy += time.monotonic() - begun
        yield piece
        reach("guest.scanning")
        begun = time.monotonic()
        number += 1
    memory = read_memory()
    busy += time.monotonic() - begun
    stable, unused, volatile, potential = totals
    spent = int(busy * 1e6)
    yield ScanEnd(
        request.request,
        number,
        stable,
        unused,
        volatile,
        potential,
        spent,
        memory.total,
        memory.free,
        memory.available,
    )


def confirm_answer(request: Confirm, flags: PageFlags, ranges: Ranges) -> Iterator[Message]:
    """The same for a confirm: a scan of its own, begun now, of the pages asked for.

    :raise OSError: see :meth:`PageFlags.pieces`.
    """
    if request.pages:
        ranges = part_of(ranges, request.start, request.start + request.pages)
    key = (request.request, request.epoch, request.round)
    number, begun, busy = 0, time.monotonic(), 0.0
    for start, classes in flags.pieces(ranges, False):
        piece = ConfirmPiece(*key, number, start, len(classes), pack_map(free_bitmap(classes)))
        busy += time.monotonic() - begun
        yield piece
        reach(f"guest.confirming-{request.round}")
        begun = time.monotonic()
        number += 1
    yield ConfirmEnd(*key, number, int((busy + time.monotonic() - begun) * 1e6))
