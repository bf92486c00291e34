"""Small epochs over real memory: a sample of the copies first, all of them if few come back, and never too many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hva_host.pager.coldness import REGION
from hva_host.pager.membership import Member
from hva_host.pager.sampling import COPIES_SHARES
from hvaqemu.pages import Run
from tests.kernel.harness import Guest, block, crc, make_layer

PAGES = 2 * REGION


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """All of its pages are copies."""
    monkeypatch.setattr("hva_host.pager.coldness.WATCHED_SECONDS", 0.0)
    with Guest(PAGES) as guest:
        monkeypatch.setattr(guest.samples.copies, "_random", np.random.default_rng(2))
        guest.ram.add_layer(make_layer(tmp_path, [block(pfn) for pfn in range(PAGES)]))
        for pfn in range(PAGES):
            guest.fill(pfn, block(pfn))
        yield guest


def copies(guest: Guest, *, most: int | None = None, sampled: bool = True) -> int:
    epoch = guest.begin(dict.fromkeys(range(PAGES), Member.COPY), sampled=sampled, most=most)
    guest.run(epoch)
    assert epoch.counts["discarded_layer"] + epoch.counts["later"] + epoch.counts["resting"] == epoch.resident_before
    return epoch.counts["discarded_layer"]


def test_copies_go_by_samples_and_come_back_right(full: Guest) -> None:
    went = [copies(full) for _ in COPIES_SHARES]
    assert 0.5 * PAGES / 64 < went[0] < 2 * PAGES / 64
    assert went == sorted(went)
    assert sum(went) == PAGES
    assert full.samples.copies.cold == 0
    for pfn in range(0, PAGES, 37):
        assert full.checksum(pfn) == crc(block(pfn))


def test_a_region_whose_sample_comes_back_is_left_alone(full: Guest) -> None:
    first = full.begin(dict.fromkeys(range(PAGES), Member.COPY), sampled=True)
    full.run(first)
    for pfn in range(REGION):
        assert full.checksum(pfn) == crc(block(pfn))
    second = full.begin(dict.fromkeys(range(PAGES), Member.COPY), sampled=True)
    full.run(second)
    assert second.counts["resting"] == REGION
    kinds = full.ram.ledger.kinds(slice(0, PAGES))
    assert not kinds[:REGION].any() and kinds[REGION:].any()
    # Whoever asks for all of it at once is not kept from it.
    assert copies(full, sampled=False) > REGION


def test_a_small_epoch_takes_little_of_what_is_free_and_of_what_is_a_copy(full: Guest) -> None:
    half = {**dict.fromkeys(range(REGION), Member.UNUSED), **dict.fromkeys(range(REGION, PAGES), Member.COPY)}
    # Free pages that are not there do not count.
    full.ram.backing.punch(Run(0, 60))
    epoch = full.begin(half, sampled=True, most=100)
    full.run(epoch)
    assert epoch.counts["discarded_zero"] == 100 and epoch.counts["discarded_layer"] == 0
    assert epoch.counts["later"] == PAGES - 160
    epoch = full.begin(half, sampled=True, most=REGION - 150)
    full.run(epoch)
    assert epoch.counts["discarded_zero"] == REGION - 160
    assert 0 < epoch.counts["discarded_layer"] < 4 * REGION / 64 + 10


def test_a_small_epoch_is_small_also_where_whatever_is_there_goes(full: Guest) -> None:
    assert copies(full, sampled=False, most=100) == 100
    assert copies(full, sampled=False, most=REGION + 10) == REGION + 10
    assert copies(full, sampled=False) == PAGES - REGION - 110
