"""Pages of the compressed store, whoever dies and whatever it has become: a pager of its own, and who replaces it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from hva_host.agent.pager_process import call
from hva_host.memory.backing import Backing
from hva_host.pager.coldness import WATCHED_SECONDS
from hva_host.pager.process_files import descriptors
from hvaqemu.pages import PAGE_SIZE
from tests.kernel.faults import COLD, COPIES, FREE, PAGES, PRECIOUS, Machine, cold
from tests.kernel.harness import ZERO, crc

EPOCH = [
    "store.write",
    "pager.preserve.written",
    "pager.discard.stored",
    "pager.discard.punch",
    "pager.discard.punched",
    "pager.epoch.preserved",
]
REFAULT = [
    "store.read",
    "pager.refault.checked",
    "uffd.copy",
    "pager.refault.filled",
    "pager.erase.freed",
    "store.punch",
]
TURN = ["pager.freed.proven", "pager.freed.turned", "store.punch"]
ATTACH = ["pager.attach.erased", "pager.attach.derived"]


@pytest.fixture
async def machine(tmp_path: Path, on_disk: bool) -> AsyncIterator[Machine]:
    found = Machine(tmp_path, dict.fromkeys([*EPOCH, *REFAULT, *ATTACH, *TURN], "kill"), on_disk=on_disk)
    try:
        await found.start()
        yield found
    finally:
        await found.close()


async def page_out(machine: Machine) -> None:
    """Everything that compresses, and is not in use."""
    while True:
        done = await machine.epoch(stable=True)
        assert done is not None
        if not done["later"]:
            return
        await asyncio.sleep(WATCHED_SECONDS)


async def occupies(machine: Machine, size: int) -> None:
    """Wait until the store occupies so many bytes; a file's room is given back in its own time."""
    async with asyncio.timeout(30):
        while (found := (await call(machine.pager, "status"))["store_bytes"]) != size:
            assert machine.on_disk, found
            await asyncio.sleep(0.01)


async def occupies_less(machine: Machine, size: int) -> int:
    """Wait in the same way until it occupies less; bytes it does then."""
    async with asyncio.timeout(30):
        while (found := int((await call(machine.pager, "status"))["store_bytes"])) >= size:
            assert machine.on_disk, found
            await asyncio.sleep(0.01)
        return found


async def everything_works(machine: Machine) -> None:
    """Every byte is right, all can go and come back once more, and nothing of the store is left behind."""
    await machine.check()
    assert (await call(machine.pager, "restore"))["left"] == 0
    await occupies(machine, 0)
    restarts = machine.restarts
    await page_out(machine)
    await machine.check()
    assert (await call(machine.pager, "restore"))["left"] == 0
    await occupies(machine, 0)
    assert (await call(machine.pager, "status"))["preserved_pages"] == 0
    assert machine.restarts == restarts


@pytest.mark.parametrize("point", EPOCH)
async def test_killed_while_it_pages_out(machine: Machine, point: str) -> None:
    machine.arm(point)
    while (done := await machine.epoch(stable=True)) is not None:
        # By chance a first sample has none of the pages that are stored.
        assert done["later"]
        await asyncio.sleep(WATCHED_SECONDS)
    assert not machine.armed(point)
    await machine.restarted(1)
    await everything_works(machine)


@pytest.mark.parametrize("point", [*REFAULT, *ATTACH])
async def test_killed_while_it_brings_back(machine: Machine, point: str) -> None:
    await page_out(machine)
    status = await call(machine.pager, "status")
    assert status["preserved_pages"] > len(COLD) // 2
    machine.arm(point)
    if point in ATTACH:
        machine.kill_pager()
    # Two pages of one content among them: freed twice, their slot would be another's.
    await machine.check()
    assert not machine.armed(point)
    # Killed at the last page, nobody has waited for the next pager yet.
    await machine.restarted(1)
    await everything_works(machine)


@pytest.mark.parametrize("point", [*TURN, "none"])
async def test_killed_while_freed_pages_become_zero(machine: Machine, point: str) -> None:
    """Two pages share each slot: one that is given back twice, or once too early, is another page's."""
    await page_out(machine)
    before = await call(machine.pager, "status")
    machine.arm(point)
    done = await machine.turn(COLD[1:])
    # A medium's thread gives the space back beside the pager, which may have answered by then.
    if not (point == "store.punch" and machine.on_disk):
        assert (done is None) == (point in TURN)
    if point in TURN:
        await machine.restarted(1)
        assert not machine.armed(point)
        done = await machine.turn(COLD[1:])
    assert done is not None
    now = await call(machine.pager, "status")
    gone = sum(preserved(machine, pfn) for pfn in COLD) - 1
    assert gone > len(COLD) // 2
    assert before["preserved_pages"] - now["preserved_pages"] == gone
    assert await occupies_less(machine, before["store_bytes"]) > 0
    for pfn in COLD[1:]:
        if preserved(machine, pfn):
            assert await machine.read(pfn) == crc(ZERO)
    assert await machine.read(COLD[0]) == crc(cold(COLD[0]))
    await everything_works(machine)


async def test_the_next_pager_counts_what_the_last_one_shared(machine: Machine) -> None:
    await page_out(machine)
    before = await call(machine.pager, "status")
    await machine.replace_pager()
    now = await call(machine.pager, "status")
    assert now["preserved_pages"] == before["preserved_pages"]
    await occupies(machine, before["store_bytes"])
    # One of each two alike: the other's slot must stay.
    for pfn in COLD[::2]:
        assert await machine.read(pfn) in machine.expected[pfn]
    await page_out(machine)
    await everything_works(machine)


async def test_bytes_of_a_dead_pager_that_no_entry_names_are_given_back(machine: Machine) -> None:
    fd = machine.open_store()
    os.pwrite(fd, os.urandom(20 * PAGE_SIZE), 8 * PAGE_SIZE)
    await machine.replace_pager()
    await occupies(machine, 0)
    os.close(fd)
    await everything_works(machine)


@pytest.mark.parametrize("how", ["altered", "cut", "zeroed"])
@pytest.mark.parametrize("killed", [False, True], ids=["same pager", "new pager"])
async def test_a_store_that_somebody_wrote(machine: Machine, how: str, killed: bool) -> None:
    """A compromised QEMU: its guest stands still, and reads no wrong byte; put right, it goes on."""
    await page_out(machine)
    fd = machine.open_store()
    size = os.fstat(fd).st_size
    right = os.pread(fd, size, 0)
    if how == "altered":
        os.pwrite(fd, bytes(byte ^ 0x10 for byte in right), 0)
    elif how == "cut":
        os.ftruncate(fd, 0)
    else:
        os.pwrite(fd, bytes(size), 0)
    if killed:
        await machine.replace_pager()
    pfn = [pfn for pfn in COLD if preserved(machine, pfn)][3]
    reading = asyncio.create_task(machine.read(pfn))
    (held,) = await machine.held()
    assert held["layer"] == "the store"
    assert held["pages"] == [pfn]
    assert "slot" in held["reason"]
    assert (await call(machine.pager, "resume"))["held"] == 1
    assert not reading.done()
    # What does not come from the store is served; its own vCPU waits, so by asking for a restore.
    answer = await call(machine.pager, "restore", timeout=30)
    assert answer["left"] >= 1
    assert "slot" in answer["why"]
    os.pwrite(fd, right, 0)
    os.close(fd)
    assert (await call(machine.pager, "resume"))["held"] == 0
    assert await reading in machine.expected[pfn]
    await machine.check()


def preserved(machine: Machine, pfn: int) -> bool:
    """Is this page in the store? Its absence from RAM tells: it is neither zeros nor in a layer."""
    number = next(fd for fd, link in descriptors(machine.child.pid).items() if "memory-backend" in link)
    ram = Backing(os.open(f"/proc/{machine.child.pid}/fd/{number}", os.O_RDWR))
    try:
        return not ram.presence(pfn, pfn + 1)[0]
    finally:
        ram.close()


async def test_a_store_without_room_on_the_host(tmp_path: Path, on_disk: bool) -> None:
    machine = Machine(tmp_path, {"store.write": "ENOSPC"}, on_disk=on_disk)
    try:
        await machine.start()
        machine.arm("store.write")
        done = await machine.epoch(stable=True)
        assert done is not None
        assert done["discarded_layer"] == len(COPIES)
        assert done["discarded_zero"] == len(FREE) - 1
        while not done["note"] and done["later"]:
            # A first sample need not have a page that compresses.
            assert done["discarded_store"] == 0
            await asyncio.sleep(WATCHED_SECONDS)
            done = await machine.epoch(stable=True)
            assert done is not None
        assert done["note"].startswith("the store can not be written: No space left on device")
        assert done["discarded_store"] == 0
        assert machine.restarts == 0
        await everything_works(machine)
    finally:
        await machine.close()


async def test_entries_of_nonsense_hold_and_end_nobody(machine: Machine) -> None:
    """The ledger itself written: PRESERVED entries with every bit at random."""
    await page_out(machine)
    number = next(fd for fd, link in descriptors(machine.child.pid).items() if "hva-ledger" in link)
    ledger = os.open(f"/proc/{machine.child.pid}/fd/{number}", os.O_RDWR)
    entries = np.random.default_rng(3).integers(0, 1 << 60, PAGES, dtype=np.uint64) | np.uint64(3 << 60)
    os.pwrite(ledger, entries.tobytes(), 64 * PAGE_SIZE)
    os.close(ledger)
    await machine.replace_pager()
    gone = [pfn for pfn in range(PAGES) if preserved(machine, pfn)]
    assert gone
    present = next(pfn for pfn in PRECIOUS if pfn not in gone)
    assert await machine.read(present) in machine.expected[present]
    reading = asyncio.create_task(machine.read(gone[0]))
    (held,) = await machine.held()
    assert held["layer"] == "the store"
    assert (await call(machine.pager, "restore", timeout=30))["left"] == len(gone)
    await machine.replace_pager()
    assert await machine.held()
    reading.cancel()


def test_what_the_machine_has_is_what_these_tests_need() -> None:
    assert cold(COLD[0]) == cold(COLD[1]) != cold(COLD[2])
