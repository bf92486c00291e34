"""Refaults: every page comes back with exactly its bytes, whoever was faster, whatever happened to the layer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from hva_host.memory.ledger import ZERO_ENTRY, Counter, layer_entry
from hva_host.pager.fetch import Fetched
from hva_host.pager.membership import Member
from hvaqemu.pages import Run
from tests.kernel.harness import PAGE, ZERO, Guest, block, crc, make_layer


def discard_layer(guest: Guest, tmp_path: Path, count: int = 32) -> list[bytes]:
    blocks = [block(i) for i in range(count)]
    guest.ram.add_layer(make_layer(tmp_path, blocks))
    for pfn, data in enumerate(blocks):
        guest.fill(pfn, data)
    guest.run(guest.begin(dict.fromkeys(range(count), Member.COPY)))
    assert guest.ram.backing.used_bytes() == 0
    return blocks


def serve_until_held(guest: Guest) -> None:
    """Serve faults until one of a page is met with that must not be served."""
    deadline = time.monotonic() + 10
    while not guest.refaults.held:
        guest.serve()
        assert not guest.answered(0.005)
        assert time.monotonic() < deadline, "nothing is held"


def test_layer_pages_come_back_in_runs(guest: Guest, tmp_path: Path) -> None:
    blocks = discard_layer(guest, tmp_path)
    assert [guest.checksum(pfn) for pfn in range(32)] == [crc(data) for data in blocks]
    status = guest.ram.ledger.counters
    assert status[1] == 32
    assert status[0] <= 7
    assert not guest.ram.ledger.entries.any()


def test_random_access_brings_one_page(guest: Guest, tmp_path: Path) -> None:
    blocks = discard_layer(guest, tmp_path)
    assert guest.checksum(20) == crc(blocks[20])
    assert guest.ram.backing.used_bytes() == PAGE


def test_zero_pages_and_pages_never_touched_read_as_zeros(guest: Guest) -> None:
    guest.fill(5, ZERO)
    guest.run(guest.begin({5: Member.COPY}))
    assert guest.ram.ledger.entries[5] == ZERO_ENTRY
    assert guest.checksum(5) == crc(ZERO)
    assert guest.checksum(40) == crc(ZERO)


def test_a_page_the_balloon_punched_is_zero(guest: Guest) -> None:
    guest.write(3, "abc")
    guest.ram.backing.punch(Run(3, 1))
    assert guest.checksum(3) == crc(ZERO)


def test_present_wins_over_an_entry(guest: Guest) -> None:
    guest.write(7, "kept")
    guest.ram.ledger.entries[7] = ZERO_ENTRY
    guest.ram.erase_present(0, guest.ram.pages)
    assert guest.ram.ledger.entries[7] == 0


def test_a_changed_block_is_held_and_served_after_repair(guest: Guest, tmp_path: Path) -> None:
    blocks = discard_layer(guest, tmp_path)
    golden = tmp_path / "golden.raw"
    golden.write_bytes(golden.read_bytes().replace(blocks[9], block(999)))
    guest.send("r 9")
    serve_until_held(guest)
    assert not guest.answered(0.1)
    assert guest.refaults.held[9].reason == "block 9 has changed"
    guest.refaults.resume()
    assert 9 in guest.refaults.held
    with golden.open("r+b") as file:
        file.seek(9 * PAGE)
        file.write(blocks[9])
    assert guest.refaults.resume() == 0
    assert int(guest.reply().split()[1]) == crc(blocks[9])


def test_a_run_ends_before_a_changed_block(guest: Guest, tmp_path: Path) -> None:
    blocks = discard_layer(guest, tmp_path)
    with (tmp_path / "golden.raw").open("r+b") as file:
        file.seek(4 * PAGE)
        file.write(block(999))
    assert [guest.checksum(pfn) for pfn in range(4)] == [crc(data) for data in blocks[:4]]
    guest.send("r 4")
    serve_until_held(guest)
    assert list(guest.refaults.held) == [4]


def test_reading_ahead_into_a_changed_block_holds_nobody(tmp_path: Path) -> None:
    with Guest(256) as guest:
        blocks = discard_layer(guest, tmp_path, 256)
        with (tmp_path / "golden.raw").open("r+b") as file:
            file.seek(128 * PAGE)
            file.write(block(9999))
        # Windows of 1, 2, 4, 8, 16 and 32 end before page 63, and the one from there on reaches over page 128 or to it.
        for pfn in range(127):
            assert guest.checksum(pfn) == crc(blocks[pfn])
        for _ in range(20):
            guest.refaults.read_ahead()
        assert not guest.refaults.held
        assert guest.checksum(127) == crc(blocks[127])
        guest.refaults.read_ahead()
        assert not guest.refaults.held
        guest.send("r 128")
        serve_until_held(guest)
        assert list(guest.refaults.held) == [128]


def test_a_truncated_layer_is_held(guest: Guest, tmp_path: Path) -> None:
    discard_layer(guest, tmp_path)
    os.truncate(tmp_path / "golden.raw", 4 * PAGE)
    guest.send("r 10")
    serve_until_held(guest)
    assert "ends inside block 10" in guest.refaults.held[10].reason


def test_damaged_entries_are_held(guest: Guest, tmp_path: Path) -> None:
    """What a compromised QEMU could write into its ledger: no such residence, no such layer, no such block."""
    blocks = discard_layer(guest, tmp_path, 8)
    damaged = [np.uint64(15 << 60), np.uint64(layer_entry(62, 0)), np.uint64(layer_entry(0, 1 << 39))]
    for pfn, entry in enumerate(damaged):
        right = guest.ram.ledger.entries[pfn]
        guest.ram.ledger.entries[pfn] = entry
        assert guest.refaults.fill(pfn, 1) == 0
        assert not guest.refaults.held, "nobody waits for it"
        guest.send(f"r {pfn}")
        serve_until_held(guest)
        assert set(guest.refaults.held) == {pfn}
        assert guest.refaults.resume() == 1
        guest.ram.ledger.entries[pfn] = right
        assert guest.refaults.resume() == 0
        assert int(guest.reply().split()[1]) == crc(blocks[pfn])


def test_a_block_not_in_the_page_cache_is_fetched_by_the_helper(guest: Guest, tmp_path: Path) -> None:
    blocks = discard_layer(guest, tmp_path)
    layer = guest.ram.layers[0]
    os.sync()
    os.posix_fadvise(layer.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert guest.checksum(13) == crc(blocks[13])
    assert guest.ram.ledger.counters[Counter.REFAULTS] == 1
    assert guest.ram.ledger.counters[Counter.LAYER_REFAULTS] == 1


def test_a_fetch_overtaken_by_a_fill_changes_nothing(guest: Guest, tmp_path: Path) -> None:
    blocks = discard_layer(guest, tmp_path)
    entries = guest.ram.ledger.entries[2:3].copy()
    assert guest.checksum(2) == crc(blocks[2])
    guest.write(2, "newer")
    after = guest.checksum(2)
    guest.refaults.fetched(Fetched("golden", Run(2, 1), entries, memoryview(bytearray(blocks[2]))))
    assert guest.checksum(2) == after
