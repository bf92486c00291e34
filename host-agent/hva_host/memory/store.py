"""The compressed store: bytes of pages that are neither zeros nor in a layer, in a memfd that lives as long as QEMU.

A slot begins with the XXH3-64 of its page and the length of the compressed bytes that follow. Zstandard, because on a
guest's own pages it needs two thirds of what LZ4 needs, and a page that was chosen for being cold comes back 5 µs later
for it (docs/design.md has both figures).

Ordering, which whoever calls keeps: bytes are written (:meth:`Store.put`) before the ledger entry, the entry before the
page is punched; a slot is freed (:meth:`Store.free`) only once the page is filled and its entry erased. So whoever is
killed in between leaves a slot without entry, which the next pager finds free, or an entry of a present page, and
presence wins.

The memfd lies in QEMU's table, so a compromised QEMU could write, cut or lengthen it. It is only ever read with
``pread``; whatever is found is bounded and checked before it is served.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from hva_host.memory.backing import Backing
from hva_host.memory.ledger import (
    CHECK_BITS,
    entry_check,
    entry_granules,
    entry_place,
    places,
    preserved_entry,
    preserved_of,
)
from hva_host.memory.slots import GRANULE, Slots, StoreFull
from hvaqemu.errors import HostError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT, PAGE_SIZE, Run

_HEADER = struct.Struct("=QH")
_LEVEL = 1
#: In the first byte of a Zstandard frame without magic: it says how long its content is (RFC 8878, 3.1.1.1.1). Ours
#: never do; the library would allocate whatever such a frame says.
_SAYS_LENGTH = 0xE0
#: A page that does not become shorter than this stays where it is (bytes).
WORTH_IT = 3072
_LINES_MAX = CHECK_BITS


class StoreBetrayed(HostError):
    """The store no longer holds the bytes that were written. They must not be served."""


class Store:
    """The store of one VM.

    :param fd: the memfd; owned from now on.
    :param pages: of guest RAM.
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._fd = fd
        self._file = Backing(fd)
        self._slots = Slots(pages)
        self._pages = pages
        # Parameters for inputs of a page: tables of 8 KiB instead of a megabyte.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL,
            source_size=PAGE_SIZE,
            format=zstandard.FORMAT_ZSTD1_MAGICLESS,
            write_content_size=False,
            write_checksum=False,
            write_dict_id=False,
        )
        self._compress = zstandard.ZstdCompressor(compression_params=parameters).compress
        self._decompress = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS).decompress
        # By the entry's checksum bits, the entry that was put last: where equal content may be. One of a freed slot
        # is taken out, so what is found here is in use.
        lines = 1 << min(_LINES_MAX, max(10, (pages >> 4).bit_length()))
        self._alike = np.zeros(lines, dtype=np.uint64)
        self._line_mask = lines - 1

    def derive(self, entries: NDArray[np.uint64]) -> None:
        """Count what the ledger uses, and give the host back what nobody does; to be called at attach, once.

        :param entries: of absent pages, uint64, shape ``(pages,)``.
        """
        preserved = preserved_of(entries)
        self._slots.derive(*places(preserved))
        for start in range(0, len(preserved), 1 << 16):
            some = preserved[start : start + (1 << 16)]
            checks = (some >> np.uint64(40)).astype(np.int64) & self._line_mask
            self._alike[checks] = some
        with suppress(OSError):
            for run in self._file.present_runs(0, self._pages):
                # The file ends with its last slot, inside a page that is not counted.
                self._punch(run.start, run.stop + 1)

    def used_bytes(self) -> int:
        """What the store occupies on the host."""
        return self._file.used_bytes()

    def begin(self, limit: int) -> None:
        """A series of :meth:`put` begins: room that was freed since the last may be used again.

        :param limit: bytes the store may occupy.
        """
        self._slots.rewind(limit // GRANULE)

    def put(self, page: memoryview) -> int:
        """Write a page's bytes, or find them written; the ledger entry for it, 0 where they are not worth it.

        The slot has a use more from now on, which :meth:`free` takes back.

        :param page: a copy that nobody changes, 4096 bytes.
        :raise StoreFull: there is no room for it.
        """
        checksum = xxhash.xxh3_64_intdigest(page)
        if alike := self._shared(checksum, page):
            return alike
        data = self._compress(page)
        size = _HEADER.size + len(data)
        if size > WORTH_IT:
            return 0
        granules = -(-size // GRANULE)
        place = self._slots.allocate(granules)
        entry = preserved_entry(place, granules, checksum)
        try:
            reach("store.write")
            written = os.pwrite(self._fd, _HEADER.pack(checksum, len(data)) + data, place * GRANULE)
        except OSError as error:
            self._take_back(entry)
            raise StoreFull(f"the store can not be written: {error.strerror}") from error
        if written != size:
            self._take_back(entry)
            raise StoreFull("the store can not be written: no room")
        self._alike[checksum & self._line_mask] = entry
        return entry

    def get(self, entry: int, into: memoryview) -> None:
        """The bytes of a page, checked, into the first 4096 bytes of ``into``.

        :raise StoreBetrayed: they are not what was written, or the entry is none of a slot.
        """
        place, granules = entry_place(entry), entry_granules(entry)
        try:
            reach("store.read")
            data = os.pread(self._fd, granules * GRANULE, place * GRANULE)
        except OSError as error:
            raise StoreBetrayed(f"slot {place} can not be read: {error.strerror}") from error
        if len(data) <= _HEADER.size:
            raise StoreBetrayed(f"slot {place} is beyond its end")
        checksum, size = _HEADER.unpack_from(data)
        frame = data[_HEADER.size : _HEADER.size + size]
        if not frame or len(frame) != size or frame[0] & _SAYS_LENGTH:
            raise StoreBetrayed(f"slot {place} has changed")
        try:
            page = self._decompress(frame, max_output_size=PAGE_SIZE)
        except zstandard.ZstdError as error:
            raise StoreBetrayed(f"slot {place} has changed") from error
        found = xxhash.xxh3_64_intdigest(page)
        if len(page) != PAGE_SIZE or found != checksum or found & (1 << CHECK_BITS) - 1 != entry_check(entry):
            raise StoreBetrayed(f"slot {place} has changed")
        into[:PAGE_SIZE] = page

    def free(self, entries: NDArray[np.uint64]) -> None:
        """Pages are resident and their entries erased; other than PRESERVED ones among ``entries`` are ignored.

        Room that nobody uses any more goes back to the host, page by page of the store.
        """
        for entry in preserved_of(entries).tolist():
            self._take_back(entry)

    def _take_back(self, entry: int) -> None:
        place, granules = entry_place(entry), entry_granules(entry)
        if not self._slots.free(place, granules):
            return
        line = entry_check(entry) & self._line_mask
        if self._alike[line] == np.uint64(entry):
            self._alike[line] = 0
        stop = (place + granules) * GRANULE
        self._punch(place * GRANULE >> PAGE_SHIFT, -(-stop // PAGE_SIZE))

    def _punch(self, start: int, stop: int) -> None:
        for run in self._slots.empty_pages(start, stop):
            # What stays is used again, or given back by the next pager.
            with suppress(OSError):
                reach("store.punch")
                self._file.punch(Run(run.start, run.pages))

    def _shared(self, checksum: int, page: memoryview) -> int:
        """The entry of a slot that holds these very bytes, with a use more; 0 where none is known."""
        entry = int(self._alike[checksum & self._line_mask])
        if not entry or entry_check(entry) != checksum & (1 << CHECK_BITS) - 1:
            return 0
        found = bytearray(PAGE_SIZE)
        try:
            self.get(entry, memoryview(found))
        except StoreBetrayed:
            return 0
        # Compared, because XXH3 can be made to collide.
        return entry if found == page and self._slots.share(entry_place(entry)) else 0
