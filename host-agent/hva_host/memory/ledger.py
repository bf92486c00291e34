"""The ledger: per VM, in a memfd that lives as long as QEMU, where each non-resident page's bytes come from.

File layout (host byte order; the memfd never leaves the host)::

    0        header page: magic, version, page count, inode of the RAM; counters at 512; the histogram of waits at 1024
    4096     LAYERS slots of 4096 bytes: the layers entries may name
    ENTRIES  one 8-byte entry a page

An entry is changed by one aligned 8-byte store, so whoever dies, it is the old one or the new one. Whatever can be
derived (totals, use counts) is derived at attach. Three rules every reader keeps (presence wins):

* a present page is RESIDENT whatever its entry says,
* an absent page is what its entry says,
* an absent page without entry is ZERO (QEMU's balloon punched it, or it was never touched).

The memfd lies in QEMU's table, so a compromised QEMU could write it: entries are bounds-checked before use, and the
memfd is sealed against being cut, which would end its readers by SIGBUS. All of it is allocated when it is laid out, so
no store ever meets a host without memory.
"""

from __future__ import annotations

import enum
import fcntl
import mmap
import os
import struct
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvaqemu.errors import HostError, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SIZE, Residence

#: The memfd's name, given by the shim.
LEDGER_NAME = "hva-ledger"
VERSION = 3
LAYERS = 63
_MAGIC = int.from_bytes(b"HVALEDGR", "little")
_HEADER = struct.Struct("=QQQQ")
_COUNTERS_OFFSET = 512
_HISTOGRAM_OFFSET = 1024
_ENTRIES_OFFSET = (1 + LAYERS) * PAGE_SIZE

#: Counters wrap: one that a compromised QEMU has set to the limit must not end its pager at every fault.
_WORD = (1 << 64) - 1

_KIND_SHIFT = 60
_KINDS = 16
_LAYER_SHIFT = 48
_LAYER_MASK = 0xFF
_BLOCK_MASK = (1 << 40) - 1

#: A PRESERVED entry: 20 bits of the page's checksum, the slot's length and its place, both in granules of the store.
CHECK_BITS = 20
_CHECK_SHIFT = 40
_CHECK_MASK = (1 << CHECK_BITS) - 1
_GRANULES_SHIFT = 34
_GRANULES_MASK = (1 << 6) - 1
_PLACE_MASK = (1 << 34) - 1

ZERO_ENTRY = Residence.ZERO << _KIND_SHIFT
NO_ENTRY = 0

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

#: struct flock of 64-bit Linux.
_FLOCK = struct.Struct("@hhqqi4x")

_SLOT = struct.Struct("=QQQQQQQII")
#: A slot's first word. Withdrawn: what depends on it is served from it, and nothing new is matched with it.
_FREE, _VALID, _WITHDRAWN = 0, 1, 2


class Counter(enum.IntEnum):
    """Counters that outlive the pager, by place in the header."""

    REFAULTS = 0
    REFAULT_PAGES = 1
    EPOCHS = 2
    DISCARDED_PAGES = 3
    WRITE_FAULTS = 4
    #: Faults on pages that were absent without having been discarded.
    FIRST_TOUCHES = 5
    #: Pages that refaults and read-ahead brought from a layer.
    LAYER_PAGES_LOADED = 6
    #: LAYER and PRESERVED entries that became ZERO because the guest had freed the page.
    FREED_PAGES = 7
    #: Of the refaults, those answered with zeros, from a layer, and from the compressed store.
    ZERO_REFAULTS = 8
    LAYER_REFAULTS = 9
    PRESERVED_REFAULTS = 10


@dataclass(frozen=True)
class LayerRecord:
    """What the ledger keeps of a layer, enough to find it again and to know that it is the same.

    ``device``, ``inode``, ``size`` (bytes) and ``mtime_ns`` are the file's; ``seed`` and ``digest`` its index's.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    seed: int
    digest: int
    path: str
    index_path: str


def layer_entry(layer: int, block: int) -> int:
    """The entry of a page that equals 4 KiB block ``block`` of layer slot ``layer``; later blocks' entries count up.

    :raise ValueError: a number is out of range.
    """
    if not 0 <= layer < LAYERS or not 0 <= block <= _BLOCK_MASK:
        raise ValueError(f"layer {layer}, block {block}: out of range")
    return Residence.LAYER << _KIND_SHIFT | layer << _LAYER_SHIFT | block


def entry_kind(entry: int) -> int:
    """The :class:`Residence` an entry names; a number outside it if the entry is damaged."""
    return entry >> _KIND_SHIFT


def entry_layer(entry: int) -> int:
    """The layer slot of a LAYER entry; may be beyond ``LAYERS`` if the entry is damaged."""
    return entry >> _LAYER_SHIFT & _LAYER_MASK


def entry_block(entry: int) -> int:
    """The block of a LAYER entry; may be beyond the layer's end if the entry is damaged."""
    return entry & _BLOCK_MASK


def preserved_entry(place: int, granules: int, checksum: int) -> int:
    """The entry of a page whose bytes are in the compressed store.

    :param place: of its slot, in granules from the store's beginning.
    :param granules: how long the slot is.
    :param checksum: of the page; the entry keeps its low :data:`CHECK_BITS` bits.
    :raise ValueError: a number is out of range.
    """
    if not 0 <= place <= _PLACE_MASK or not 1 <= granules <= _GRANULES_MASK:
        raise ValueError(f"a slot of {granules} granules at {place}: out of range")
    check = checksum & _CHECK_MASK
    return Residence.PRESERVED << _KIND_SHIFT | check << _CHECK_SHIFT | granules << _GRANULES_SHIFT | place


def entry_place(entry: int) -> int:
    """Where the slot of a PRESERVED entry is, in granules; may be beyond the store if the entry is damaged."""
    return entry & _PLACE_MASK


def entry_granules(entry: int) -> int:
    """How long the slot of a PRESERVED entry is, in granules; may be 0 if the entry is damaged."""
    return entry >> _GRANULES_SHIFT & _GRANULES_MASK


def entry_check(entry: int) -> int:
    """The low :data:`CHECK_BITS` bits of the checksum of a PRESERVED entry's page."""
    return entry >> _CHECK_SHIFT & _CHECK_MASK


def entry_kinds(entries: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """:func:`entry_kind` of each of ``entries``; shape ``(n,)``."""
    return (entries >> np.uint64(_KIND_SHIFT)).astype(np.uint8)


def preserved_of(entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The PRESERVED ones of ``entries`` (shape ``(n,)``), in order; shape ``(m,)``."""
    found: NDArray[np.uint64] = entries[entries >> np.uint64(_KIND_SHIFT) == np.uint64(Residence.PRESERVED)]
    return found


def places(entries: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """:func:`entry_place` and :func:`entry_granules` of PRESERVED entries; shapes ``(n,)``."""
    granules = entries >> np.uint64(_GRANULES_SHIFT) & np.uint64(_GRANULES_MASK)
    return (entries & np.uint64(_PLACE_MASK)).astype(np.int64), granules.astype(np.int64)


class Ledger:
    """A mapped ledger, locked to this process.

    :ivar entries: uint64, shape ``(pages,)``; to be changed through :meth:`store` and :meth:`erase`.
    :ivar words: the same memory for single entries, several times faster than through numpy.
    :ivar counters: by :class:`Counter`.
    :ivar histogram: memory for how long faults waited (:class:`hva_host.pager.stalls.Stalls`), writable bytes.
    """

    def __init__(self, fd: int, pages: int, ram: int) -> None:
        """Open the ledger in ``fd``, or lay a new one out where the memfd is still empty.

        The lock is a POSIX record lock: the descriptor's open file description is shared with QEMU and with every
        earlier pager, so ``flock`` and OFD locks would be shared too (fcntl(2)); a record lock is the process's own.

        :param fd: owned from now on.
        :param ram: inode number of the memfd whose pages these are.
        :raise RefusedError: another process has it, or it is of another version, size or RAM.
        :raise HostError: the host has no memory for it.
        """
        self.fd = fd
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RefusedError("another pager serves this VM", "leave it in charge, or end it first") from error
        size = _ENTRIES_OFFSET + pages * 8
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, size)
        elif os.fstat(fd).st_size != size:
            raise RefusedError(f"the VM's ledger is not one for {pages} pages of RAM")
        _allocate(fd, size)
        self._map = mmap.mmap(fd, size)
        magic, version, stored_pages, stored_ram = _HEADER.unpack_from(self._map)
        if magic == 0:
            # The magic comes last, so that a pager killed in here leaves a ledger that is laid out anew.
            _HEADER.pack_into(self._map, 0, 0, VERSION, pages, ram)
            self._map[0:8] = _MAGIC.to_bytes(8, "little")
        elif magic != _MAGIC or version != VERSION or stored_pages != pages:
            raise RefusedError(
                f"the VM's ledger has version {version} for {stored_pages} pages; this pager knows version {VERSION}",
                "use the hvaqemu the VM was started with until the VM is down",
            )
        elif stored_ram != ram:
            raise RefusedError("the VM's ledger is not that of this RAM")
        self.pages = pages
        self.entries: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, pages, _ENTRIES_OFFSET)
        self.words = memoryview(self._map)[_ENTRIES_OFFSET:].cast("Q")
        self._totals = [0] * _KINDS
        self.count_totals()
        self.counters = memoryview(self._map)[_COUNTERS_OFFSET : _COUNTERS_OFFSET + 8 * len(Counter)].cast("Q")
        self.histogram = memoryview(self._map)[_HISTOGRAM_OFFSET:PAGE_SIZE]

    def count(self, counter: Counter, by: int = 1) -> None:
        """Add to a counter."""
        self.counters[counter] = self.counters[counter] + by & _WORD

    def store(self, pfns: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        """Write the entries of pages that have none; shapes ``(n,)``."""
        self.entries[pfns] = entries
        kinds = np.bincount((entries >> np.uint64(_KIND_SHIFT)).astype(np.uint8), minlength=_KINDS)
        self._totals = [total + int(more) for total, more in zip(self._totals, kinds, strict=True)]

    def turn_to_zero(self, pfns: NDArray[np.int64], entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Store ZERO for the pages whose entry still is the one in ``entries`` (shapes ``(n,)``); what theirs were."""
        same = self.entries[pfns] == entries
        turned: NDArray[np.uint64] = entries[same]
        self.entries[pfns[same]] = ZERO_ENTRY
        kinds = np.bincount((turned >> np.uint64(_KIND_SHIFT)).astype(np.uint8), minlength=_KINDS).tolist()
        self._totals = [total - less for total, less in zip(self._totals, kinds, strict=True)]
        self._totals[Residence.ZERO] += len(turned)
        return turned

    def kinds(self, pfns: NDArray[np.int64] | slice) -> NDArray[np.uint8]:
        """The :class:`Residence` that entries name, 0 where there is none, other numbers where one is damaged."""
        return entry_kinds(self.entries[pfns])

    def erase(self, start: int, count: int) -> int:
        """Drop the entries of ``count`` pages from ``start`` on; how many had one."""
        if count == 1:
            kind = self.words[start] >> _KIND_SHIFT
            self._totals[kind] -= 1
            self.words[start] = NO_ENTRY
            return int(kind != 0)
        part = self.entries[start : start + count]
        kinds = np.bincount((part >> np.uint64(_KIND_SHIFT)).astype(np.uint8), minlength=_KINDS).tolist()
        self._totals = [total - less for total, less in zip(self._totals, kinds, strict=True)]
        part[:] = NO_ENTRY
        return count - int(kinds[0])

    def count_totals(self) -> None:
        """Count the totals anew from the entries."""
        self._totals = np.bincount(entry_kinds(self.entries), minlength=_KINDS).tolist()

    def totals(self) -> dict[Residence, int]:
        """Pages whose entry names each non-resident residence."""
        return {kind: self._totals[kind] for kind in (Residence.ZERO, Residence.LAYER, Residence.PRESERVED)}

    @property
    def preserved(self) -> int:
        """Pages whose entry is PRESERVED."""
        return self._totals[Residence.PRESERVED]

    def layers(self) -> dict[int, LayerRecord]:
        """The recorded layers by slot.

        :raise RefusedError: a record is damaged.
        """
        found = {}
        for slot in range(LAYERS):
            offset = (1 + slot) * PAGE_SIZE
            valid, device, inode, size, mtime_ns, seed, digest, path_length, index_length = _SLOT.unpack_from(
                self._map, offset
            )
            if valid not in (_VALID, _WITHDRAWN):
                continue
            start = offset + _SLOT.size
            if path_length + index_length > PAGE_SIZE - _SLOT.size:
                raise RefusedError(f"the VM's ledger is damaged: layer slot {slot}")
            path = os.fsdecode(self._map[start : start + path_length])
            index_path = os.fsdecode(self._map[start + path_length : start + path_length + index_length])
            found[slot] = LayerRecord(device, inode, size, mtime_ns, seed, digest, path, index_path)
        return found

    def record_layer(self, slot: int, record: LayerRecord) -> None:
        """Write a layer into a free slot; its valid word is stored last.

        :raise RefusedError: the paths are too long, or the slot is taken.
        """
        path, index_path = os.fsencode(record.path), os.fsencode(record.index_path)
        offset = (1 + slot) * PAGE_SIZE
        if len(path) + len(index_path) > PAGE_SIZE - _SLOT.size:
            raise RefusedError(f"{record.path}: the path is too long for a layer")
        if self._state(slot) != _FREE:
            raise RefusedError(f"layer slot {slot} is taken")
        fields = (record.device, record.inode, record.size, record.mtime_ns, record.seed, record.digest)
        _SLOT.pack_into(self._map, offset, _FREE, *fields, len(path), len(index_path))
        start = offset + _SLOT.size
        self._map[start : start + len(path) + len(index_path)] = path + index_path
        self._set_state(slot, _VALID)

    def withdrawn(self) -> set[int]:
        """Slots of layers that only serve what depends on them already."""
        return {slot for slot in range(LAYERS) if self._state(slot) == _WITHDRAWN}

    def withdraw_layer(self, slot: int) -> None:
        """From now on, and for every pager to come, nothing new may be matched with the layer.

        :raise ValueError: there is none in the slot.
        """
        if self._state(slot) == _FREE:
            raise ValueError(f"layer slot {slot} is free")
        self._set_state(slot, _WITHDRAWN)

    def free_layer(self, slot: int) -> None:
        """Give the slot to another layer. It must be withdrawn, and counted since: what an entry that still names it
        stands for would change under that page.

        :raise ValueError: it is not withdrawn, or an entry names it.
        """
        if self._state(slot) != _WITHDRAWN or len(self.dependants({slot})):
            raise ValueError(f"layer slot {slot} is in use")
        self._set_state(slot, _FREE)

    def dependants(self, slots: Collection[int] | None = None) -> NDArray[np.int64]:
        """Pages whose entry names one of the layer slots, or any entry at all (None); ascending, shape ``(n,)``."""
        if slots is None:
            return np.flatnonzero(self.entries)
        names = self.entries >> np.uint64(_LAYER_SHIFT)
        found = np.zeros(self.pages, dtype=np.bool_)
        for slot in slots:
            found |= names == np.uint64(Residence.LAYER << (_KIND_SHIFT - _LAYER_SHIFT) | slot)
        return np.flatnonzero(found)

    def _state(self, slot: int) -> int:
        return int(_SLOT.unpack_from(self._map, (1 + slot) * PAGE_SIZE)[0])

    def _set_state(self, slot: int, state: int) -> None:
        # One aligned store: whoever dies, the slot is in the one state or in the other.
        offset = (1 + slot) * PAGE_SIZE
        memoryview(self._map)[offset : offset + 8].cast("Q")[0] = state


def holder(fd: int) -> int:
    """The process that holds the lock on the ledger in ``fd``, 0 if none does (fcntl(2), F_GETLK)."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def recorded_ram(fd: int) -> int:
    """Inode number of the memfd that the ledger in ``fd`` is for, 0 if none is laid out."""
    header = os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0")
    magic, version, _, ram = _HEADER.unpack(header)
    return int(ram) if (magic, version) == (_MAGIC, VERSION) else 0


def _allocate(fd: int, size: int) -> None:
    """Give the ledger all of its memory, and keep its size as it is from now on (memfd_create(2), file sealing).

    :raise HostError: the host has no memory for it.
    :raise RefusedError: it is not a memfd that can be sealed.
    """
    try:
        reach("ledger.allocate")
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise HostError(
            f"the VM's ledger: {error.strerror} for {-(-size >> 20)} MiB of host memory", "free memory on the host"
        ) from error
    # EPERM: sealed already, by an earlier pager; or not to be sealed, and then none that our shim made.
    with suppress(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise RefusedError("the VM's ledger can be cut at any time", "start QEMU through hvaqemu, with its own shim")
