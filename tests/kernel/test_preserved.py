"""Pages without a copy go into the compressed store and come back: one pager, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hva_host.memory.ledger import Counter
from hva_host.pager.membership import Member
from hva_host.pager.restore import restore
from hvaqemu.pages import PAGE_SIZE, Residence
from tests.kernel.harness import ZERO, Guest, block, crc, make_layer, soft


def kinds(guest: Guest) -> list[int]:
    return [int(entry) >> 60 for entry in guest.ram.ledger.entries]


@pytest.fixture
def store_folder(on_disk: bool, tmp_path: Path) -> Path | None:
    return tmp_path if on_disk else None


def test_out_and_back(cold_guest: Guest) -> None:
    guest = cold_guest
    for pfn in range(40):
        guest.fill(pfn, soft(pfn))
    epoch = guest.begin(dict.fromkeys(range(40), Member.STABLE))
    guest.run(epoch)
    assert epoch.counts["discarded_store"] == 40
    assert set(kinds(guest)[:40]) == {Residence.PRESERVED}
    assert guest.ram.backing.used_bytes() == 0
    assert 40 * 700 < guest.stored() < 40 * 1024
    # One in the middle, then all in order: neighbours come in runs.
    assert guest.checksum(20) == crc(soft(20))
    guest.write(21, "written")
    assert guest.checksum(21) == crc(b"written" + soft(21)[7:])
    for pfn in [*range(20), *range(22, 40)]:
        assert guest.checksum(pfn) == crc(soft(pfn))
    assert guest.stored() == 0, "everything is back, and its room is not"
    assert guest.ram.ledger.totals()[Residence.PRESERVED] == 0


def test_refaults_are_counted_by_what_answered_them(cold_guest: Guest, tmp_path: Path) -> None:
    guest = cold_guest
    guest.ram.add_layer(make_layer(tmp_path, [block(1)]))
    for pfn, page in {2: block(1), 20: ZERO, 30: soft(30)}.items():
        guest.fill(pfn, page)
    guest.run(guest.begin(dict.fromkeys((2, 20, 30), Member.STABLE)))
    for pfn in (2, 20, 20, 30, 40):
        guest.checksum(pfn)
    counters = guest.ram.ledger.counters
    by_source = [counters[name] for name in (Counter.ZERO_REFAULTS, Counter.LAYER_REFAULTS, Counter.PRESERVED_REFAULTS)]
    assert by_source == [1, 1, 1]
    assert counters[Counter.REFAULTS] == 3
    assert counters[Counter.FIRST_TOUCHES] == 1


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
    assert guest.stored() == PAGE_SIZE
    guest.write(7, "another")
    assert guest.checksum(7) == crc(b"another" + soft(0)[7:])
    # Out again, into a slot of its own; the others' must not have been freed.
    guest.run(guest.begin({7: Member.STABLE}))
    for pfn in [*range(7), *range(8, 30)]:
        assert guest.checksum(pfn) == crc(soft(0))
    assert guest.checksum(7) == crc(b"another" + soft(0)[7:])
    assert guest.stored() == 0


@pytest.mark.parametrize("on_disk", [False], indirect=True, ids=["in memory"])
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
    assert guest.stored() <= 3 * PAGE_SIZE
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
    assert guest.stored() == 0
    assert [guest.checksum(pfn) for pfn in range(4)] == [crc(soft(pfn)) for pfn in range(4)]


def test_restore_brings_everything_back(cold_guest: Guest) -> None:
    guest = cold_guest
    for pfn in range(60):
        guest.fill(pfn, soft(pfn % 50))
    guest.run(guest.begin(dict.fromkeys(range(60), Member.STABLE)))
    for _ in restore(guest.ram, guest.refaults, guest.fetcher):
        pass
    assert kinds(guest)[:60] == [0] * 60
    assert guest.stored() == 0
    assert [guest.checksum(pfn) for pfn in range(60)] == [crc(soft(pfn % 50)) for pfn in range(60)]


def test_only_a_sample_goes_first_and_what_comes_back_is_left_alone(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hva_host.pager.coldness.WATCHED_SECONDS", 0.0)
    # Of so few pages, a sample may by chance be as large as the next.
    monkeypatch.setattr(guest.samples.stable, "_random", np.random.default_rng(1))
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
