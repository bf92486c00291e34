"""The ledger without a userfaultfd: layout, version, bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.memory import ledger as module
from hva_host.memory.ledger import (
    LAYERS,
    ZERO_ENTRY,
    LayerRecord,
    Ledger,
    entry_block,
    entry_check,
    entry_granules,
    entry_kind,
    entry_layer,
    entry_place,
    layer_entry,
    places,
    preserved_entry,
    preserved_of,
)
from hvaqemu.errors import RefusedError
from hvaqemu.pages import Residence

#: Inode number of the RAM.
_RAM = 4711


@pytest.fixture
def fd() -> Iterator[int]:
    found = os.memfd_create("ledger", os.MFD_ALLOW_SEALING)
    yield found
    os.close(found)


@given(st.integers(0, LAYERS - 1), st.integers(0, (1 << 40) - 1))
def test_layer_entries_round_trip(layer: int, block: int) -> None:
    entry = layer_entry(layer, block)
    assert (entry_kind(entry), entry_layer(entry), entry_block(entry)) == (Residence.LAYER, layer, block)
    assert entry < 1 << 64


@given(st.integers(0, (1 << 34) - 1), st.integers(1, 63), st.integers(0, (1 << 64) - 1))
def test_preserved_entries_round_trip(place: int, granules: int, checksum: int) -> None:
    entry = preserved_entry(place, granules, checksum)
    assert (entry_kind(entry), entry_place(entry), entry_granules(entry)) == (Residence.PRESERVED, place, granules)
    assert entry_check(entry) == checksum & (1 << 20) - 1
    array = np.array([entry, ZERO_ENTRY, layer_entry(1, 2)], dtype=np.uint64)
    assert preserved_of(array).tolist() == [entry]
    assert [found.tolist() for found in places(array[:1])] == [[place], [granules]]
    assert entry < 1 << 64


def test_numbers_out_of_range_are_refused() -> None:
    for layer, block in ((LAYERS, 0), (-1, 0), (0, 1 << 40), (0, -1)):
        with pytest.raises(ValueError):
            layer_entry(layer, block)
    for place, granules in ((1 << 34, 1), (-1, 1), (0, 0), (0, 64)):
        with pytest.raises(ValueError):
            preserved_entry(place, granules, 0)


def test_what_one_pager_wrote_the_next_one_reads(fd: int) -> None:
    record = LayerRecord(1, 2, 3, 4, 5, 6, "/a/golden image,1.raw", "/b/é.idx")
    first = Ledger(os.dup(fd), 100, _RAM)
    first.store(np.array([7]), np.array([ZERO_ENTRY], dtype=np.uint64))
    first.record_layer(3, record)
    first.count(module.Counter.REFAULTS, 5)
    second = Ledger(os.dup(fd), 100, _RAM)
    assert second.entries[7] == ZERO_ENTRY
    assert second.layers() == {3: record}
    assert second.counters[module.Counter.REFAULTS] == 5
    assert second.totals()[Residence.ZERO] == 1


@given(
    st.lists(st.tuples(st.integers(0, 31), st.integers(1, 8), st.sampled_from(["zero", "layer", "erase"])), max_size=30)
)
def test_totals_are_what_the_entries_say(changes: list[tuple[int, int, str]]) -> None:
    ledger = Ledger(os.memfd_create("ledger", os.MFD_ALLOW_SEALING), 40, _RAM)
    try:
        for start, count, what in changes:
            erased = ledger.erase(start, count)
            assert 0 <= erased <= count
            if what != "erase":
                entry = ZERO_ENTRY if what == "zero" else layer_entry(1, start)
                ledger.store(np.arange(start, start + count), np.full(count, entry, dtype=np.uint64))
        kept = ledger.totals()
        ledger.count_totals()
        assert ledger.totals() == kept
    finally:
        os.close(ledger.fd)


def test_a_slot_is_written_once(fd: int) -> None:
    ledger = Ledger(os.dup(fd), 8, _RAM)
    record = LayerRecord(1, 2, 3, 4, 5, 6, "/a", "/b")
    ledger.record_layer(0, record)
    with pytest.raises(RefusedError, match="taken"):
        ledger.record_layer(0, record)
    with pytest.raises(RefusedError, match="too long"):
        ledger.record_layer(1, LayerRecord(1, 2, 3, 4, 5, 6, "/a" * 4000, "/b"))
    assert list(ledger.layers()) == [0]


def test_another_version_or_size_is_refused(fd: int) -> None:
    Ledger(os.dup(fd), 8, _RAM)
    with pytest.raises(RefusedError, match="not that of this RAM"):
        Ledger(os.dup(fd), 8, _RAM + 1)
    with pytest.raises(RefusedError, match="not one for 16 pages"):
        Ledger(os.dup(fd), 16, _RAM)
    os.pwrite(fd, (2).to_bytes(8, "little"), 8)
    with pytest.raises(RefusedError, match="version 2"):
        Ledger(os.dup(fd), 8, _RAM)


def test_a_ledger_cut_off_while_it_was_laid_out_is_laid_out_anew(fd: int) -> None:
    Ledger(os.dup(fd), 8, _RAM)
    os.pwrite(fd, bytes(8), 0)
    os.pwrite(fd, (77).to_bytes(8, "little"), 8)
    assert Ledger(os.dup(fd), 8, _RAM).pages == 8
    assert Ledger(os.dup(fd), 8, _RAM).totals()[Residence.LAYER] == 0


def test_a_ledger_that_can_be_cut_is_refused() -> None:
    """Whoever shortened it would end every pager by SIGBUS."""
    with pytest.raises(RefusedError, match="can be cut"):
        Ledger(os.memfd_create("ledger"), 8, _RAM)
    sealed = os.memfd_create("ledger", os.MFD_ALLOW_SEALING)
    Ledger(os.dup(sealed), 8, _RAM)
    with pytest.raises(PermissionError):
        os.ftruncate(sealed, 0)
