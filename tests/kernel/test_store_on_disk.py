"""A store that is a file: nobody waits for its disk who does not want its bytes, and what is late is never wrong."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hva_host.agent.pager_process import call
from hva_host.memory import medium
from hva_host.memory.ledger import entry_place
from hva_host.memory.slots import StoreFull
from hva_host.memory.store import Store
from hva_host.memory.store_file import STORE_AT_NAME, make_store_file
from hva_host.pager.coldness import WATCHED_SECONDS
from hva_host.pager.epoch import Phase
from hva_host.pager.membership import Member
from hva_host.pager.process_files import descriptors, take_file
from hvaqemu.pages import PAGE_SIZE, Residence
from tests.kernel.faults import COLD, Machine
from tests.kernel.harness import ZERO, Guest, block, crc, evict, soft

_PAGES = 16


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def out(cold_guest: Guest) -> Guest:
    """Pages 0 to 15 are in the store, and not in the host's page cache."""
    page_out(cold_guest)
    cold_guest.evict_store()
    return cold_guest


def page_out(guest: Guest) -> None:
    for pfn in range(_PAGES):
        guest.fill(pfn, soft(pfn))
    guest.run(guest.begin(dict.fromkeys(range(_PAGES), Member.STABLE)))
    assert kinds(guest) == [Residence.PRESERVED] * _PAGES


def kinds(guest: Guest) -> list[int]:
    return [int(kind) for kind in guest.ram.ledger.kinds(slice(0, _PAGES))]


def serve_until(guest: Guest, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        guest.serve()
        assert time.monotonic() < deadline


class Gate:
    """Whoever comes by waits until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self) -> None:
        assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def slow_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The disk reads nothing until the gate is opened."""
    gate, read = Gate(), Store.read_waiting

    def late(store: Store, entry: int) -> bytes:
        found = read(store, entry)
        gate()
        return found

    monkeypatch.setattr(Store, "read_waiting", late)
    yield gate
    gate.open()


@pytest.fixture
def slow_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The disk takes nothing until the gate is opened."""
    gate, write = Gate(), medium._write

    def late(fd: int, offset: int, data: bytes) -> None:
        gate()
        write(fd, offset, data)

    monkeypatch.setattr(medium, "_write", late)
    yield gate
    gate.open()


def test_what_the_page_cache_lost_comes_from_the_disk(out: Guest) -> None:
    guest = out
    for pfn in (7, 3, *range(_PAGES)):
        assert guest.checksum(pfn) == crc(soft(pfn))
    assert guest.stored() == 0


def test_others_are_answered_while_one_waits_for_the_disk(out: Guest, slow_reads: Gate) -> None:
    guest = out
    guest.send("r 6")
    serve_until(guest, lambda: guest.fetcher.fetches(6))
    assert not guest.answered(0.05)
    # The pager's one thread is free: it fills a page that needs no disk.
    assert guest.refaults.fill(40, 1) == 1
    slow_reads.open()
    assert int(guest.reply().split()[1]) == crc(soft(6))


def test_freed_while_it_is_read(out: Guest, slow_reads: Gate) -> None:
    """It is zeros then, not what its last owner left; and its room is given back only after the read."""
    guest = out
    guest.send("w 6 fresh")
    serve_until(guest, lambda: guest.fetcher.fetches(6))
    guest.run(guest.begin(dict.fromkeys(range(_PAGES), Member.UNUSED)))
    assert kinds(guest)[6] == Residence.ZERO
    assert guest.stored() > 0, "room that is still being read"
    slow_reads.open()
    assert guest.reply() == "ok"
    assert guest.checksum(6) == crc(b"fresh" + ZERO[5:])
    assert guest.stored() == 0


def test_paged_out_again_with_other_bytes_while_it_is_read(out: Guest, slow_reads: Gate) -> None:
    """Its slot is kept until the read is over: no entry made meanwhile can be taken for the one that was read."""
    guest = out
    before = int(guest.ram.ledger.words[6])
    guest.send("w 6 fresh")
    serve_until(guest, lambda: guest.fetcher.fetches(6))
    # Somebody else is faster: the page is resident, gets other bytes, and goes again.
    guest.ram.erase(6, 1)
    guest.fill(6, soft(60))
    guest.epoch = None
    guest.run(guest.begin({6: Member.STABLE}))
    again = int(guest.ram.ledger.words[6])
    assert entry_place(again) != entry_place(before)
    slow_reads.open()
    assert guest.reply() == "ok"
    assert guest.checksum(6) == crc(b"fresh" + soft(60)[5:])


def test_neighbours_come_in_one_fetch(out: Guest) -> None:
    guest = out
    assert guest.refaults.fill(0, 8) == 0
    serve_until(guest, lambda: not guest.fetcher.under_way)
    assert kinds(guest)[:9] == [Residence.RESIDENT] * 8 + [Residence.PRESERVED]
    assert guest.checksum(5) == crc(soft(5))


@pytest.mark.parametrize("written", [False, True])
def test_a_page_goes_once_the_disk_has_taken_it_and_not_if_it_was_written(
    cold_guest: Guest, slow_writes: Gate, written: bool
) -> None:
    guest = cold_guest
    for pfn in range(_PAGES):
        guest.fill(pfn, soft(pfn % 4))
    epoch = guest.begin(dict.fromkeys(range(_PAGES), Member.STABLE))
    steps = epoch.steps()
    while guest.preserver.under_way < _PAGES:
        next(steps)
    assert kinds(guest) == [Residence.RESIDENT] * _PAGES
    if written:
        guest.write(5, "late")
    slow_writes.open()
    for _ in steps:
        pass
    assert epoch.counts["discarded_store"] == _PAGES - written
    assert epoch.counts["touched"] == written
    # Pages that share a slot with the one that left.
    assert [guest.checksum(pfn) for pfn in (1, 9, 13)] == [crc(soft(1))] * 3
    assert guest.checksum(5) == crc(b"late" + soft(1)[4:] if written else soft(1))
    for pfn in range(_PAGES):
        guest.checksum(pfn)
    assert guest.stored() == 0


def test_a_disk_that_is_too_slow_keeps_no_page_protected(cold_guest: Guest, slow_writes: Gate) -> None:
    guest = cold_guest
    for pfn in range(_PAGES):
        guest.fill(pfn, soft(pfn))
    epoch = guest.begin(dict.fromkeys(range(_PAGES), Member.STABLE), seconds=0.2)
    guest.run(epoch)
    assert epoch.phase is Phase.DONE
    assert "deadline" in epoch.note
    assert epoch.counts["unpreserved"] == _PAGES
    assert kinds(guest) == [Residence.RESIDENT] * _PAGES
    slow_writes.open()
    assert guest.stored() == 0
    page_out(guest)
    assert [guest.checksum(pfn) for pfn in range(_PAGES)] == [crc(soft(pfn)) for pfn in range(_PAGES)]


def test_a_write_that_fails_keeps_what_shares_its_slot(cold_guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slot is written, the second is not; of the pages that would share the second none goes, nor any later,
    whichever write fails then."""
    guest, write, gate = cold_guest, medium._write, Gate()
    monkeypatch.setattr("hva_host.pager.epoch.SLICE_PAGES", 1)
    calls: list[int] = []

    def fails(fd: int, offset: int, data: bytes) -> None:
        gate()
        calls.append(offset)
        if len(calls) in (2, 4):
            raise OSError(28, "No space left on device")
        write(fd, offset, data)

    for pfn in range(_PAGES):
        guest.fill(pfn, soft(0 if pfn < 2 else 1 if pfn < 8 else pfn))
    with monkeypatch.context() as patch:
        patch.setattr(medium, "_write", fails)
        epoch = guest.begin(dict.fromkeys(range(_PAGES), Member.STABLE))
        steps = epoch.steps()
        while guest.preserver.under_way < _PAGES:
            next(steps)
        gate.open()
        with pytest.raises(StoreFull):
            while not guest.ram.store.written(guest.ram.store.asked):
                pass
        for _ in steps:
            pass
    assert epoch.note == "the store can not be written: No space left on device"
    assert kinds(guest) == [Residence.PRESERVED] * 2 + [Residence.RESIDENT] * (_PAGES - 2)
    assert guest.stored() == PAGE_SIZE
    guest.run(guest.begin(dict.fromkeys(range(_PAGES), Member.STABLE)))
    assert kinds(guest) == [Residence.PRESERVED] * _PAGES
    guest.evict_store()
    for pfn in range(_PAGES):
        assert guest.checksum(pfn) == crc(soft(0 if pfn < 2 else 1 if pfn < 8 else pfn))
    assert guest.stored() == 0


# A pager of its own


async def some_paged_out(machine: Machine) -> None:
    """Until something is in the store: a first sample need not have a page that compresses."""
    async with asyncio.timeout(30):
        while not (await call(machine.pager, "status"))["preserved_pages"]:
            assert await machine.epoch(stable=True) is not None
            await asyncio.sleep(WATCHED_SECONDS)


async def test_killed_while_it_reads_the_disk_and_a_disk_that_can_not_be_read(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {"store.fetch": "kill"}, on_disk=True)
    try:
        await machine.start()
        await some_paged_out(machine)
        drop_cache(machine)
        machine.arm("store.fetch")
        await machine.check()
        assert not machine.armed("store.fetch")
        await machine.restarted(1)
    finally:
        await machine.close()


async def test_a_disk_that_can_not_be_read_holds_the_page_and_no_other(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {"store.fetch": "EIO"}, on_disk=True)
    try:
        await machine.start()
        await some_paged_out(machine)
        drop_cache(machine)
        machine.arm("store.fetch")
        holding, readings = asyncio.create_task(machine.held()), {}
        for pfn in COLD:
            readings[pfn] = asyncio.create_task(machine.read(pfn))
            await asyncio.wait({readings[pfn], holding}, return_when=asyncio.FIRST_COMPLETED)
            if not readings[pfn].done():
                break
        ((pfn, reading),) = [each for each in readings.items() if not each[1].done()]
        (held,) = await holding
        assert held["pages"] == [pfn]
        assert "can not be read: Input/output error" in held["reason"]
        # It was the disk, and for a moment.
        assert (await call(machine.pager, "resume"))["held"] == 0
        assert await reading in machine.expected[pfn]
        await machine.check()
        assert machine.restarts == 0
    finally:
        await machine.close()


def drop_cache(machine: Machine) -> None:
    """Have the host's page cache hold nothing of the store."""
    fd = machine.open_store()
    evict(fd)
    os.close(fd)


# The file


def test_the_file_has_no_name_and_is_for_its_owner_only(tmp_path: Path) -> None:
    fd = make_store_file(tmp_path, 1 << 20)
    try:
        status = os.fstat(fd)
        assert (status.st_mode & 0o7777, status.st_nlink, status.st_size, status.st_blocks) == (0o600, 0, 1 << 20, 0)
        assert list(tmp_path.iterdir()) == []
        root = os.open("/", os.O_PATH)
        with pytest.raises(OSError, match="No such file"):
            os.link(f"/proc/self/fd/{fd}", tmp_path / "named", src_dir_fd=root, follow_symlinks=True)
        os.close(root)
    finally:
        os.close(fd)


def test_only_a_file_that_qemu_has_open_is_taken(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(block(1))
    status = other.stat()
    with Guest(folder=tmp_path) as guest:
        pid = guest.child.pid
        assert take_file(pid, guest.pidfd, status.st_dev, status.st_ino) is None
        number = next(fd for fd, link in descriptors(pid).items() if STORE_AT_NAME in link)
        said = struct.unpack("=QQ", Path(f"/proc/{pid}/fd/{number}").read_bytes())
        found = take_file(pid, guest.pidfd, *said)
        assert found is not None
        assert os.path.sameopenfile(found.fileno(), guest.ram.store.fd)
        found.close()
        assert os.fstat(guest.ram.store.fd).st_size == 64 * PAGE_SIZE
