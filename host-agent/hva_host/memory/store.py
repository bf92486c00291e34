"""The compressed store: bytes of pages that are neither zeros nor in a layer, in a file that lives as long as QEMU.

A slot begins with the XXH3-64 of its page and the length of the compressed bytes that follow. Zstandard, because on a
guest's own pages it needs two thirds of what LZ4 needs, and a page that was chosen for being cold comes back 5 µs later
for it (docs/design.md has both figures).

Ordering, which whoever calls keeps: bytes are written (:meth:`Store.put`, :meth:`Store.written`) before the ledger
entry, the entry before the page is punched; a slot is freed (:meth:`Store.free`) only once the page is filled and its
entry erased. So whoever is killed in between leaves a slot without entry, which the next pager finds free, or an entry
of a present page, and presence wins.

The file is a memfd, or one on a disk (:mod:`hva_host.memory.medium`). It lies in QEMU's table, so a compromised QEMU
could write, cut or lengthen it, and a disk may lose what it was given. It is only ever read with ``pread``; whatever is
found is bounded and checked before it is served.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
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
from hva_host.memory.medium import InMemory, Medium, OnDisk
from hva_host.memory.slots import GRANULE, Slots, StoreFull
from hva_host.memory.waiting import NotCached
from hvaqemu.errors import HostError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT, PAGE_SIZE

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

    :param fd: its file; owned from now on.
    :param pages: of guest RAM.
    :param on_disk: it is a file on a disk, not a memfd.
    """

    def __init__(self, fd: int, pages: int, *, on_disk: bool = False) -> None:
        self.fd = fd
        self.on_disk = on_disk
        self._file = Backing(fd)
        self._medium: Medium = OnDisk(fd) if on_disk else InMemory(fd)
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
        self._medium.forgive()

    def put(self, page: memoryview) -> int:
        """Write a page's bytes, or find them written; the ledger entry for it, 0 where they are not worth it.

        The slot has a use more from now on, which :meth:`free` takes back. The entry may be used once
        :meth:`written` says so of the number of writes there are now, :attr:`asked`.

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
            self._medium.write(place * GRANULE, _HEADER.pack(checksum, len(data)) + data)
        except OSError as error:
            self._take_back(entry)
            raise _full(error) from error
        self._alike[checksum & self._line_mask] = entry
        return entry

    @property
    def asked(self) -> int:
        """How much has been asked of the file: what :meth:`put` returned before depends on no more than that."""
        return self._medium.asked

    def written(self, number: int) -> bool:
        """Was what had been asked for when :attr:`asked` was ``number`` carried out?

        :raise StoreFull: it could not be, or nothing is tried any more since something before could not be.
        """
        try:
            return self._medium.carried_out(number)
        except OSError as error:
            raise _full(error) from error

    def get(self, entry: int, into: memoryview) -> None:
        """The bytes of a page, checked, into the first 4096 bytes of ``into``.

        :raise StoreBetrayed: they are not what was written, or the entry is none of a slot.
        :raise NotCached: the disk would have to be waited for; see :meth:`pin`.
        """
        place, granules = entry_place(entry), entry_granules(entry)
        try:
            reach("store.read")
            data = self._medium.read(place * GRANULE, granules * GRANULE)
        except OSError as error:
            raise StoreBetrayed(f"slot {place} can not be read: {error.strerror}") from error
        self.decode(entry, data, into)

    def pin(self, entries: Iterable[int]) -> list[int]:
        """Keep slots from being used for anything else while a helper thread reads them; :meth:`free` lets go of those
        returned. Nonsense among ``entries`` is left out."""
        return [entry for entry in entries if entry_granules(entry) and self._slots.pin(entry_place(entry))]

    def read_waiting(self, entry: int) -> bytes:
        """For a helper thread: what a slot holds, for :meth:`decode`, however long that takes.

        :raise StoreBetrayed: it can not be read.
        """
        place = entry_place(entry)
        try:
            reach("store.fetch")
            return os.pread(self.fd, entry_granules(entry) * GRANULE, place * GRANULE)
        except OSError as error:
            raise StoreBetrayed(f"slot {place} can not be read: {error.strerror}") from error

    def decode(self, entry: int, data: bytes, into: memoryview) -> None:
        """The page in what was read of its slot, checked, into the first 4096 bytes of ``into``.

        :raise StoreBetrayed: it is not what was written, or the entry is none of a slot.
        """
        place = entry_place(entry)
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
            self._medium.punch(run)

    def _shared(self, checksum: int, page: memoryview) -> int:
        """The entry of a slot that holds these very bytes, with a use more; 0 where none is known."""
        entry = int(self._alike[checksum & self._line_mask])
        if not entry or entry_check(entry) != checksum & (1 << CHECK_BITS) - 1:
            return 0
        found = bytearray(PAGE_SIZE)
        try:
            self.get(entry, memoryview(found))
        except (StoreBetrayed, NotCached):
            return 0
        # Compared, because XXH3 can be made to collide.
        return entry if found == page and self._slots.share(entry_place(entry)) else 0


def _full(error: OSError) -> StoreFull:
    return StoreFull(f"the store can not be written: {error.strerror}")
