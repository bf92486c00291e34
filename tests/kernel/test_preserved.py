"""Pages without a copy go into the compressed store and come back, whoever dies and whatever the store has become."""

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
from hva_host.pager.membership import Member
from hva_host.pager.process_files import descriptors
from hva_host.pager.restore import restore
from hvaqemu.pages import PAGE_SIZE, Residence
from tests.kernel.faults import COLD, COPIES, FREE, PAGES, PRECIOUS, Machine, cold
from tests.kernel.harness import ZERO, Guest, block, crc, make_layer

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
ATTACH = ["pager.attach.erased", "pager.attach.derived"]


def kinds(guest: Guest) -> list[int]:
    return [int(entry) >> 60 for entry in guest.ram.ledger.entries]


@pytest.fixture
def cold_guest(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """All of its pages go at once: what is cold is another test's subject."""
    monkeypatch.setattr("hva_host.pager.coldness.SHARES", (1.0,))
    monkeypatch.setattr("hva_host.pager.coldness.WATCHED_SECONDS", 0.0)
    monkeypatch.setattr("hva_host.pager.coldness._REST_TICKS", 0)
    monkeypatch.setattr("hva_host.pager.coldness.HOT", 1e9)
    return guest


def soft(pfn: int) -> bytes:
    """A page that compresses, unlike any other."""
    return block(pfn)[:700] + b"soft" * 849


# One pager, in this process


def test_out_and_back(cold_guest: Guest) -> None:
    guest = cold_guest
    for pfn in range(40):
        guest.fill(pfn, soft(pfn))
    epoch = guest.begin(dict.fromkeys(range(40), Member.STABLE))
    guest.run(epoch)
    assert epoch.counts["discarded_store"] == 40
    assert set(kinds(guest)[:40]) == {Residence.PRESERVED}
    assert guest.ram.backing.used_bytes() == 0
    assert 40 * 700 < guest.ram.store.used_bytes() < 40 * 1024
    # One in the middle, then all in order: neighbours come in runs.
    assert guest.checksum(20) == crc(soft(20))
    guest.write(21, "written")
    assert guest.checksum(21) == crc(b"written" + soft(21)[7:])
    for pfn in [*range(20), *range(22, 40)]:
        assert guest.checksum(pfn) == crc(soft(pfn))
    assert guest.ram.store.used_bytes() == 0, "everything is back, and its room is not"
    assert guest.ram.ledger.totals()[Residence.PRESERVED] == 0


def test_zeros_and_copies_are_preferred_and_noise_stays(cold_guest: Guest, tmp_path: Path) -> None:
    guest = cold_guest
    guest.ram.add_layer(make_layer(tmp_path, [block(0), soft(1)]))
    content = [block(0), soft(1), ZERO, block(3), soft(4)]
    for pfn, page in enumerate(content):
        guest.fill(pfn, page)
    epoch = guest.begin(dict.fromkeys(range(5), Member.STABLE))
    guest.run(epoch)
    assert kinds(guest)[:5] == [
        Residence.LAYER, Residence.LAYER, Residence.ZERO, Residence.RESIDENT, Residence.PRESERVED,
    ]  # fmt: skip
    assert epoch.counts["unpreserved"] == 1
    assert [guest.checksum(pfn) for pfn in range(5)] == [crc(page) for page in content]


def test_pages_of_one_content_share_a_slot(cold_guest: Guest) -> None:
    guest = cold_guest
    for pfn in range(30):
        guest.fill(pfn, soft(0))
    guest.run(guest.begin(dict.fromkeys(range(30), Member.STABLE)))
    assert guest.ram.ledger.totals()[Residence.PRESERVED] == 30
    assert guest.ram.store.used_bytes() == PAGE_SIZE
    guest.write(7, "another")
    assert guest.checksum(7) == crc(b"another" + soft(0)[7:])
    # Out again, into a slot of its own; the others' must not have been freed.
    guest.run(guest.begin({7: Member.STABLE}))
    for pfn in [*range(7), *range(8, 30)]:
        assert guest.checksum(pfn) == crc(soft(0))
    assert guest.checksum(7) == crc(b"another" + soft(0)[7:])
    assert guest.ram.store.used_bytes() == 0


def test_a_write_while_pages_are_compressed_keeps_the_page(cold_guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = cold_guest
    monkeypatch.setattr("hva_host.pager.epoch.SLICE_PAGES", 1)
    for pfn in range(8):
        guest.fill(pfn, soft(pfn))
    epoch = guest.begin(dict.fromkeys(range(8), Member.STABLE))
    steps = epoch.steps()
    while not epoch.counts["discarded_store"]:
        next(steps)
    # One that is still to come, one that has just gone, and a read of a third.
    guest.write(5, "late")
    guest.write(0, "gone")
    guest.checksum(6)
    for _ in steps:
        pass
    assert kinds(guest)[:8] == [0, 3, 3, 3, 3, 0, 3, 3]
    assert epoch.counts["touched"] == 1
    assert guest.checksum(5) == crc(b"late" + soft(5)[4:])
    assert guest.checksum(0) == crc(b"gone" + soft(0)[4:])
    for pfn in (1, 2, 3, 4, 6, 7):
        assert guest.checksum(pfn) == crc(soft(pfn))


def test_a_full_store_stops_paging_out_and_not_the_guest(cold_guest: Guest) -> None:
    guest = cold_guest
    for pfn in range(40):
        guest.fill(pfn, soft(pfn))
    guest.preserver.limit = 3 * PAGE_SIZE
    guest.write(50, "free")
    epoch = guest.begin({**dict.fromkeys(range(40), Member.STABLE), 50: Member.UNUSED})
    guest.run(epoch)
    assert epoch.note == "the store has reached its limit"
    assert 0 < epoch.counts["discarded_store"] < 40
    assert epoch.counts["discarded_store"] + epoch.counts["unpreserved"] == 40
    assert kinds(guest)[50] == Residence.ZERO, "what needs no store goes on"
    assert guest.ram.store.used_bytes() <= 3 * PAGE_SIZE
    for pfn in range(40):
        assert guest.checksum(pfn) == crc(soft(pfn))


def test_a_punch_that_fails_frees_the_slots(cold_guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = cold_guest
    for pfn in range(4):
        guest.fill(pfn, soft(pfn))

    def full(_run: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(guest.ram.backing, "punch", full)
        epoch = guest.begin(dict.fromkeys(range(4), Member.STABLE))
        guest.run(epoch)
    assert "abandoned while preserving: Cannot allocate memory" in epoch.note
    assert kinds(guest)[:4] == [0] * 4
    assert guest.ram.store.used_bytes() == 0
    assert [guest.checksum(pfn) for pfn in range(4)] == [crc(soft(pfn)) for pfn in range(4)]


def test_restore_brings_everything_back(cold_guest: Guest) -> None:
    guest = cold_guest
    for pfn in range(60):
        guest.fill(pfn, soft(pfn % 50))
    guest.run(guest.begin(dict.fromkeys(range(60), Member.STABLE)))
    for _ in restore(guest.ram, guest.refaults, guest.fetcher):
        pass
    assert kinds(guest)[:60] == [0] * 60
    assert guest.ram.store.used_bytes() == 0
    assert [guest.checksum(pfn) for pfn in range(60)] == [crc(soft(pfn % 50)) for pfn in range(60)]


def test_only_a_sample_goes_first_and_what_comes_back_is_left_alone(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hva_host.pager.coldness.WATCHED_SECONDS", 0.0)
    # Of so few pages, a sample may by chance be as large as the next.
    monkeypatch.setattr(guest.preserver.coldness, "_random", np.random.default_rng(1))
    for pfn in range(64):
        guest.fill(pfn, soft(pfn))
    wanted = dict.fromkeys(range(64), Member.STABLE)
    gone = []
    for _ in range(3):
        epoch = guest.begin(wanted)
        guest.run(epoch)
        gone.append(epoch.counts["discarded_store"])
    assert 0 < gone[0] < gone[1] < gone[2], gone
    assert sum(gone) == 64
    # Backwards, which is how no read-ahead goes: each of them by itself.
    for pfn in range(56, -1, -4):
        assert guest.checksum(pfn) == crc(soft(pfn))
    epoch = guest.begin(wanted)
    guest.run(epoch)
    assert epoch.counts["resting"] == 15
    assert not any(kinds(guest)[pfn] for pfn in range(0, 60, 4))


# A pager of its own, and who replaces it


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    found = Machine(tmp_path, dict.fromkeys([*EPOCH, *REFAULT, *ATTACH], "kill"))
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


def store(machine: Machine) -> int:
    """The store, as QEMU has it."""
    number = next(fd for fd, link in descriptors(machine.child.pid).items() if "hva-store" in link)
    return os.open(f"/proc/{machine.child.pid}/fd/{number}", os.O_RDWR)


async def everything_works(machine: Machine) -> None:
    """Every byte is right, all can go and come back once more, and nothing of the store is left behind."""
    await machine.check()
    assert (await call(machine.pager, "restore"))["left"] == 0
    assert (await call(machine.pager, "status"))["store_bytes"] == 0, "a slot that nobody needs"
    restarts = machine.restarts
    await page_out(machine)
    await machine.check()
    assert (await call(machine.pager, "restore"))["left"] == 0
    status = await call(machine.pager, "status")
    assert (status["store_bytes"], status["preserved_pages"]) == (0, 0)
    assert machine.restarts == restarts


@pytest.mark.parametrize("point", EPOCH)
async def test_killed_while_it_pages_out(machine: Machine, point: str) -> None:
    machine.arm(point)
    assert await machine.epoch(stable=True) is None
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
    assert machine.restarts >= 1
    await everything_works(machine)


async def test_the_next_pager_counts_what_the_last_one_shared(machine: Machine) -> None:
    await page_out(machine)
    before = await call(machine.pager, "status")
    await machine.replace_pager()
    now = await call(machine.pager, "status")
    assert (now["preserved_pages"], now["store_bytes"]) == (before["preserved_pages"], before["store_bytes"])
    # One of each two alike: the other's slot must stay.
    for pfn in COLD[::2]:
        assert await machine.read(pfn) in machine.expected[pfn]
    await page_out(machine)
    await everything_works(machine)


async def test_bytes_of_a_dead_pager_that_no_entry_names_are_given_back(machine: Machine) -> None:
    fd = store(machine)
    os.pwrite(fd, os.urandom(20 * PAGE_SIZE), 8 * PAGE_SIZE)
    await machine.replace_pager()
    assert Backing(fd).used_bytes() == 0
    os.close(fd)
    await everything_works(machine)


@pytest.mark.parametrize("how", ["altered", "cut", "zeroed"])
@pytest.mark.parametrize("killed", [False, True], ids=["same pager", "new pager"])
async def test_a_store_that_somebody_wrote(machine: Machine, how: str, killed: bool) -> None:
    """A compromised QEMU: its guest stands still, and reads no wrong byte; put right, it goes on."""
    await page_out(machine)
    fd = store(machine)
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


async def test_a_store_without_room_on_the_host(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {"store.write": "ENOSPC"})
    try:
        await machine.start()
        machine.arm("store.write")
        done = await machine.epoch(stable=True)
        assert done is not None
        assert done["note"].startswith("the store can not be written: No space left on device")
        assert done["discarded_store"] == 0
        assert done["discarded_layer"] == len(COPIES)
        assert done["discarded_zero"] == len(FREE) - 1
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
